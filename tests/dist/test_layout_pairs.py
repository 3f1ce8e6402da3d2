"""What one layout of 1, 2 or 4 processes saves, every other loads: the same tensors bit for bit,
and the same tokens come next."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import xxhash
from torch.distributed.tensor import DTensor

from model.hf.architecture import VOCABULARY_ROWS
from parallel.layout import World
from pretrain.config.flags import spell
from pretrain.config.load import load_config
from pretrain.plan import make_plan
from pretrain.state import checkpoint_tensors
from pretrain.train import Trainer
from tests.dist.training import VOCABULARY, base_arguments, stored, train, write_corpus

AXES = ("tp", "pp", "cp", "dp")
LAYOUTS = [
    sizes for sizes in itertools.product((1, 2, 4), repeat=4) if np.prod(sizes) in (1, 2, 4)
]
IN_EVERY_RUN = [((2, 2, 1, 1), (1, 1, 1, 2)), ((1, 1, 1, 1), (2, 1, 2, 1))]
"""A save of 4 processes for 2, and one of 1 process for 4; the others with --all."""


def name_of(sizes: tuple[int, ...]) -> str:
    parts = [f"{axis}{size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1]
    return " ".join(parts) or "one process"


PAIRS = [
    pytest.param(
        source,
        target,
        id=f"{name_of(source)} to {name_of(target)}",
        marks=[] if (source, target) in IN_EVERY_RUN else [pytest.mark.long],
    )
    for source, target in itertools.product(LAYOUTS, repeat=2)
]


def arguments(corpus: str, sizes: tuple[int, ...], save: Path, **more) -> list[str]:
    tp, pp, cp, _ = sizes
    return base_arguments(
        corpus,
        save=str(save),
        num_layers=4,
        train_iters=3,
        eval_iters=0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        **more,
    )


def digest(name: str, values: np.ndarray) -> str:
    """Hash a tensor, whose rows of padding depend on the layout."""
    parameter = name.removeprefix("model.").removeprefix("optimizer.")
    if parameter.startswith(VOCABULARY_ROWS) and values.ndim:
        values = values[:VOCABULARY]
    return f"{values.shape} {xxhash.xxh3_64_hexdigest(np.ascontiguousarray(values).tobytes())}"


class GatheringTrainer(Trainer):
    """Gathers what was loaded before the first step: name -> digest of the whole tensor."""

    def _prepare(self, *args, **kwargs):
        loop = super()._prepare(*args, **kwargs)
        self.loaded = {}
        for name, tensor in checkpoint_tensors(loop.state, with_optimizer=True).items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            self.loaded[name] = digest(name, whole.cpu().numpy())
        return loop


def load_and_train(world: World, argv: list[str]) -> dict[str, str]:
    trainer = GatheringTrainer(make_plan(load_config(spell(argv)), world.size), world)
    assert trainer.run() == "done"
    return trainer.loaded


def tokens_of_steps(save: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["data_digest"] for line in lines}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(scope="module")
def straight(pool, corpus, tmp_path_factory):
    """The tokens of each step in one process that nobody stops."""
    save = tmp_path_factory.mktemp("straight") / "run"
    assert pool.run(train, 1, arguments(corpus, (1, 1, 1, 1), save)) == ["done"]
    return tokens_of_steps(save)


@pytest.fixture(scope="module")
def saved(pool, corpus, tmp_path_factory):
    """Layout -> folder of a run that stopped after two steps, made once."""
    folders = {}

    def get(sizes: tuple[int, ...]) -> Path:
        if sizes not in folders:
            save = tmp_path_factory.mktemp("saved") / "run"
            argv = arguments(corpus, sizes, save, exit_interval=2)
            world = int(np.prod(sizes))
            assert pool.run(train, world, argv) == ["stopped"] * world
            folders[sizes] = save
        return folders[sizes]

    return get


@pytest.mark.parametrize("source, target", PAIRS)
def test_what_a_layout_saves_another_loads(
    pool, corpus, straight, saved, tmp_path, source, target
):
    folder = saved(source)
    expected = {name: digest(name, values) for name, values in stored(folder).items()}
    assert len({name for name in expected if name.startswith("optimizer.")}) > 40
    argv = arguments(corpus, target, tmp_path / "run", load=str(folder))
    found: dict[str, str] = {}
    for part in pool.run(load_and_train, int(np.prod(target)), argv):
        # Ranks that hold the same tensor agree on it.
        assert all(found.setdefault(name, value) == value for name, value in part.items())
    assert found == expected
    tokens = tokens_of_steps(folder) | tokens_of_steps(tmp_path / "run")
    assert tokens == straight and sorted(tokens) == [1, 2, 3]
