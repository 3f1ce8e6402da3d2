"""Whole runs of the trainer inside pool workers, on a small corpus with real files."""

import json
from pathlib import Path

import numpy as np

from data.writers.indexed_writer import IndexedWriter
from parallel.layout import World
from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.stored_tensors import read_whole_tensors, tensor_names
from pretrain.config.flags import spell
from pretrain.config.load import load_config
from pretrain.plan import make_plan
from pretrain.train import Trainer

VOCABULARY = 97


def write_corpus(prefix: Path, documents: int = 200, seed: int = 3) -> str:
    """Documents with structure to learn: arithmetic sequences of varied length."""
    generator = np.random.default_rng(seed)
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for _ in range(documents):
            start = generator.integers(0, 90)
            step = generator.integers(1, 5)
            length = generator.integers(1, 120)
            writer.add_document((start + step * np.arange(length)) % (VOCABULARY - 1))
        writer.finish()
    return str(prefix)


def base_arguments(prefix: str, **overrides) -> list[str]:
    """Flags of a small fp64 run; `overrides` by field name."""
    settings = {
        "model": "tiny",
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "data_path": prefix,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": VOCABULARY,
        "seq_length": 64,
        "global_batch_size": 4,
        "train_iters": 6,
        "lr": 1e-2,
        "lr_decay_style": "constant",
        "eval_iters": 1,
        "log_interval": 1000,
    } | overrides
    argv = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else "--no-" + flag[2:])
        else:
            argv += [flag, str(value)]
    return argv


def train(world: World, argv: list[str]) -> str:
    """The outcome of one launch."""
    return Trainer(make_plan(load_config(spell(argv)), world.size), world).run()


def _refused(world: World, argv: list[str]) -> str:
    """Say why a launch is refused: an error that left the worker would cost the session a new
    one."""
    try:
        return f"not refused: {train(world, argv)}"
    except ValueError as error:
        return str(error)


def refusal(pool, argv: list[str], processes: int = 1) -> str:
    """Why all processes of a launch refuse it."""
    (text, *others) = pool.run(_refused, processes, argv)
    assert others == [text] * (processes - 1)
    return text


def losses(save: str | Path) -> dict[int, float]:
    """Step -> loss from metrics.jsonl; a step that is there twice is an error."""
    lines = [json.loads(line) for line in (Path(save) / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), f"steps not exactly once: {steps}"
    return {line["step"]: line["loss"] for line in lines}


def stored(save: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of the latest checkpoint, whole."""
    folder = find_published(save)
    names = tensor_names(folder, "")
    return {
        name: tensor.numpy()
        for name, tensor in read_whole_tensors(folder, names).items()
    }
