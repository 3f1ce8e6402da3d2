"""A run whose newest checkpoint is damaged goes on from the one before it, as if it had been the
last."""

import json
import shutil
from pathlib import Path

import pytest

from parallel.layout import World
from pretrain.checkpointing.folders import MANIFEST, find_published
from pretrain.checkpointing.manifest import DamagedCheckpoint
from tests.damaged import flip
from tests.dist.training import base_arguments, losses, stored, train, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(scope="module")
def finished(pool, corpus, tmp_path_factory):
    """A run of 6 steps on two ranks with a checkpoint after every second one."""
    save = tmp_path_factory.mktemp("finished") / "run"
    assert pool.run(train, 2, arguments(corpus, save)) == ["done"] * 2
    return save


def arguments(corpus: str, save: Path, **more) -> list[str]:
    return base_arguments(corpus, save=str(save), save_interval=2, pipeline_model_parallel_size=2) + [
        word for name, value in more.items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def damage_shard(folder: Path, rank: int) -> None:
    path = folder / f"__{rank}_0.distcp"
    flip(path, 4 * path.stat().st_size)  # in the middle


def test_damaged_tensors_lead_to_the_checkpoint_before_them(pool, corpus, finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    argv = arguments(corpus, run, train_iters=7)
    # The shard of rank 1 in the newest, and a small file of the one before it.
    damage_shard(run / "iter_0000006", 1)
    flip(run / "iter_0000004" / "config.yaml", 9)
    assert pool.run(train, 2, argv) == ["again"] * 2
    assert find_published(run) == run / "iter_0000002"
    assert pool.run(train, 2, argv) == ["done"] * 2

    assert {path.name for path in run.glob("iter_*")} == {
        "iter_0000002",
        "iter_0000004",
        "iter_0000006",
        "iter_0000007",
        "iter_0000004.damaged",
        "iter_0000006.damaged",
    }
    # Each step once, and the same as in the run that nothing happened to.
    found = losses(run)
    assert sorted(found) == list(range(1, 8))
    assert {step: found[step] for step in range(1, 7)} == losses(finished)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    texts = [event["text"] for event in events if event["event"] == "damaged"]
    assert len(texts) == 2 and "__1_0.distcp differs from its checksum" in texts[0], texts
    assert "damaged of: " in texts[0] and "config.yaml differs" in texts[1], texts


def test_with_no_earlier_checkpoint_all_ranks_refuse_and_nothing_is_renamed(
    pool, corpus, finished, tmp_path
):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    damage_shard(run / "iter_0000006", 0)
    flip(run / "iter_0000004" / MANIFEST, 9)
    flip(run / "iter_0000002" / "progress.json", 9)
    before = sorted(run.iterdir())
    said = pool.run(outcome_or_error, 2, arguments(corpus, run, train_iters=7))
    assert said[0] == said[1]
    assert said[0].startswith(f"Refused: save = {run}: holds no checkpoint that can be used: ")
    for step in (2, 4, 6):
        assert f"{run}/iter_000000{step}: damaged: " in said[0], said[0]
    assert sorted(run.iterdir()) == before


def test_a_chosen_checkpoint_with_damaged_tensors_is_refused_by_all_ranks(
    pool, corpus, finished, tmp_path
):
    source = Path(shutil.copytree(finished, tmp_path / "run"))
    damage_shard(source / "iter_0000006", 1)
    argv = arguments(corpus, tmp_path / "new", load=source, train_iters=7)
    said = pool.run(outcome_or_error, 2, argv)
    assert said[0] == said[1]
    assert said[0].startswith(f"Refused: checkpoint {source / 'iter_0000006'}: damaged: "), said[0]
    assert said[0].endswith("Fix: load --ckpt-step 4, the one before it.")
    assert (source / "iter_0000006").is_dir()


def outcome_or_error(world: World, argv: list[str]) -> str:
    try:
        return train(world, argv)
    except ValueError as error:
        assert not isinstance(error, DamagedCheckpoint), "refused by each rank for itself"
        return f"{type(error).__name__}: {error}"
