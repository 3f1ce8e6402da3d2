"""Saves in the background: what they hold, and how they fail."""

import dataclasses
import errno
import os
import signal
import threading
from unittest.mock import patch

import numpy as np
import pytest

from parallel.layout import World
from pretrain.checkpointing import checkpoint, state_copy
from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.hashing_writer import HashingWriter
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.state_copy import StateCopy
from pretrain.checkpointing.stored_tensors import read_whole_tensors, tensor_names
from tests.dist.training import base_arguments, losses, stored, train, write_corpus

LATE_SECONDS = 0.3
"""What a late copy waits for an update that does not come, after the last step."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def train_with_late_copies(world: World, argv: list[str]) -> str:
    """Train with copies that begin only when the next update waits for them."""
    update_waits = threading.Event()
    copy_all = state_copy._copy_all
    wait = StateCopy.wait

    def copy_late(pairs):
        update_waits.wait(LATE_SECONDS)
        copy_all(pairs)

    def note_and_wait(self):
        update_waits.set()
        wait(self)
        update_waits.clear()

    with (
        patch.object(state_copy, "_copy_all", copy_late),
        patch.object(StateCopy, "wait", note_and_wait),
    ):
        return train(world, argv)


ZBV = {
    "num_layers": 5,
    "untie_embeddings_and_output_weights": False,
    "pipeline_model_parallel_size": 2,
    "pipeline_schedule": "ZBV",
}
TP = {"tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    "world, layout",
    [
        (2, ZBV),
        pytest.param(2, {**TP, "no_save_optim": True}, marks=pytest.mark.long),
        pytest.param(4, {**TP, "context_parallel_size": 2}, marks=pytest.mark.long),
        pytest.param(
            4,
            {**TP, "data_parallel_sharding_strategy": "optim_grads_params"},
            marks=pytest.mark.long,
        ),
        pytest.param(
            4,
            {**TP, "pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": False},
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_late_copy_holds_what_a_waiting_save_holds(pool, corpus, tmp_path, world, layout):
    """Every step is saved, so that each copy is filled while the next step trains."""
    common = dict(save_interval=1, train_iters=3, keep_all=True, **layout)
    waiting = base_arguments(corpus, save=str(tmp_path / "waiting"), async_save=False, **common)
    beside = base_arguments(corpus, save=str(tmp_path / "beside"), **common)
    assert pool.run(train, world, waiting) == ["done"] * world
    assert pool.run(train_with_late_copies, world, beside) == ["done"] * world
    for step in (1, 2, 3):
        name = f"iter_{step:07d}"
        names = tensor_names(tmp_path / "waiting" / name, "")
        assert names == tensor_names(tmp_path / "beside" / name, "")
        expected = read_whole_tensors(tmp_path / "waiting" / name, names)
        found = read_whole_tensors(tmp_path / "beside" / name, names)
        differing = [key for key in names if not np.array_equal(expected[key], found[key])]
        assert not differing, (step, differing)
        progress = [Progress.read(tmp_path / run / name) for run in ("waiting", "beside")]
        one, other = (dataclasses.replace(each, run_id=None) for each in progress)
        assert one == other and one.step == step
    # Were the steps alike, a copy of a later one would not be noticed.
    first = read_whole_tensors(tmp_path / "waiting" / "iter_0000001", ["model.embedding.weight"])
    last = stored(tmp_path / "waiting")["model.embedding.weight"]
    assert not np.array_equal(first["model.embedding.weight"], last)


# ---------------------------------------------------------------- failures


def train_on_a_full_disk(world: World, argv: list[str]) -> str:
    """Train on a disk that is full for one rank from its second checkpoint on."""
    write_data = HashingWriter.write_data

    def write(self, plan, planner):
        if world.rank == world.size - 1 and "0000002" in str(self.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        return write_data(self, plan, planner)

    with patch.object(HashingWriter, "write_data", write):
        try:
            return train(world, argv)
        except ValueError as error:
            return f"{type(error).__name__}: {error}"


def test_a_write_that_fails_on_one_rank_ends_all_ranks_in_one_line(pool, corpus, tmp_path):
    argv = base_arguments(corpus, save=str(tmp_path / "run"), save_interval=2, train_iters=60)
    first, second = pool.run(train_on_a_full_disk, 2, argv)
    assert first == second
    assert first.startswith("Refused: checkpoint ") and "\n" not in first, first
    assert "not written (rank 1: No space left on device at " in first, first
    assert " it needs " in first and " were free. " in first and "Fix: free space" in first, first
    # Not at the end of the run, but at one of the next steps.
    assert len(losses(tmp_path / "run")) < 60
    assert not list((tmp_path / "run").glob("*iter_*")), "nothing half-written stays"


def die_before_publishing(world: World, argv: list[str]) -> None:
    """Train, and die when step 4 is written whole and not published."""
    publish = checkpoint._publish

    def die(partial, final):
        if final.name == "iter_0000004":
            os.kill(os.getpid(), signal.SIGKILL)
        publish(partial, final)

    with patch.object(checkpoint, "_publish", die):
        train(world, argv)


def test_a_kill_between_copy_and_publication_resumes_from_the_one_before(pool, corpus, tmp_path):
    straight = base_arguments(corpus, save=str(tmp_path / "straight"), save_interval=2)
    argv = base_arguments(corpus, save=str(tmp_path / "killed"), save_interval=2)
    assert pool.run(train, 1, straight) == ["done"]
    with pytest.raises(AssertionError, match="the process died with exit code -9"):
        pool.run(die_before_publishing, 1, argv)
    folder = tmp_path / "killed"
    assert find_published(folder).name == "iter_0000002"
    assert (folder / ".iter_0000004.partial").is_dir()
    assert pool.run(train, 1, argv) == ["done"]
    assert losses(folder) == losses(tmp_path / "straight")
    assert {path.name for path in folder.glob(".iter_*")} == set()
    expected = stored(tmp_path / "straight")
    for name, tensor in stored(folder).items():
        assert np.array_equal(tensor, expected[name]), name
