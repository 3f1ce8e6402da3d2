"""Steps whose numbers are wrong, in whole runs: not updated on any rank, and the same after a
resume."""

import contextlib
import dataclasses
import json
from unittest import mock

import numpy as np
import pytest
import torch

from model.gpt import GPTStage
from parallel.layout import World
from pretrain.batches import Feed
from pretrain.guards import guards
from pretrain.guards.rewinds import read_rewinds
from tests.dist.training import base_arguments, losses, stored, train, write_corpus

BAD_CLOCKS = (6 * 256, 9 * 256)
"""Where data begins whose loss and gradient are ten times as large."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def spiking_arguments(corpus: str, save, policy: str, **overrides) -> list[str]:
    return base_arguments(
        corpus,
        save=str(save),
        train_iters=12,
        eval_iters=0,
        spike_policy=policy,
        spike_window=8,
        **overrides,
    )


@contextlib.contextmanager
def bad_data():
    """Let some data of the run be bad, wherever in the run the model receives it."""
    read = Feed.read

    def read_some_bad(feed: Feed, clock: int):
        batches = read(feed, clock)
        passed = sum(
            segment.skipped_until - segment.start
            for segment in feed.ledger.segments
            if getattr(segment, "skipped_until", None) is not None
        )
        if clock + passed not in BAD_CLOCKS:
            return batches
        return [
            dataclasses.replace(batch, num_targets=batch.num_targets // 10) for batch in batches
        ]

    with mock.patch.object(Feed, "read", read_some_bad):
        yield


def train_on_bad_data(world: World, argv: list[str]) -> str:
    with bad_data():
        return train(world, argv)


def events(save, kind: str) -> list[int]:
    lines = (save / "events.jsonl").read_text().splitlines()
    return [event["step"] for event in map(json.loads, lines) if event["event"] == kind]


def skipped_steps(save) -> list[int]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["skipped"]]


def test_a_spike_is_skipped_by_all_ranks_and_the_same_after_a_resume(pool, corpus, tmp_path):
    layout = {"tensor_model_parallel_size": 2}
    whole = spiking_arguments(corpus, tmp_path / "whole", "skip", **layout)
    assert pool.run(train_on_bad_data, 2, whole) == ["done"] * 2
    assert skipped_steps(tmp_path / "whole") == [7, 10]
    assert events(tmp_path / "whole", "spike") == [7, 10]

    # The second spike is judged by what a checkpoint kept of the steps before it.
    cut = spiking_arguments(corpus, tmp_path / "cut", "skip", **layout)
    assert pool.run(train_on_bad_data, 2, [*cut, "--exit-interval", "8"]) == ["stopped"] * 2
    assert pool.run(train_on_bad_data, 2, cut) == ["done"] * 2
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert skipped_steps(tmp_path / "cut") == [7, 10]
    one = stored(tmp_path / "whole")
    other = stored(tmp_path / "cut")
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_spike_that_is_only_warned_of_trains_as_any_other(pool, corpus, tmp_path):
    argv = spiking_arguments(corpus, tmp_path, "warn")
    assert pool.run(train_on_bad_data, 1, argv) == ["done"]
    assert skipped_steps(tmp_path) == []
    assert events(tmp_path, "spike") == [7, 10]


# ---------------------------------------------------------------- rewinds


class Killed(Exception):
    """Stands for a process that was killed."""


def train_and_die(world: World, argv: list[str], *, before_note: bool) -> str:
    """Train on bad data; all processes are gone around the writing of a rewind's note."""
    write = guards.write_rewinds

    def die(*args) -> None:
        if not before_note:
            write(*args)
        raise Killed

    with mock.patch.object(guards, "write_rewinds", die):
        try:
            return train_on_bad_data(world, argv)
        except Killed:
            return "killed"


def train_and_die_before(world: World, argv: list[str]) -> str:
    return train_and_die(world, argv, before_note=True)


def train_and_die_after(world: World, argv: list[str]) -> str:
    return train_and_die(world, argv, before_note=False)


def passed_over(save) -> list[dict]:
    """Rows of the last account of data that were passed over."""
    last = json.loads((save / "ledger.jsonl").read_text().splitlines()[-1])
    return [row for row in last["account"] if row["skipped"]]


def test_a_spike_goes_back_and_passes_over_its_data_and_kills_change_nothing(
    pool, corpus, tmp_path
):
    whole = spiking_arguments(corpus, tmp_path / "whole", "rewind", save_interval=4)
    outcomes = [pool.run(train_on_bad_data, 1, whole)[0] for _ in range(3)]
    assert outcomes == ["again", "again", "done"]
    assert skipped_steps(tmp_path / "whole") == [], "lines of steps that are done again are gone"
    assert len(losses(tmp_path / "whole")) == 12
    assert events(tmp_path / "whole", "rewind") == [7, 7]
    # From the checkpoint of step 4 to the end of step 7, twice: 3 steps of 4 samples each.
    assert [row["samples"] for row in passed_over(tmp_path / "whole")] == [12, 12]

    cut = spiking_arguments(corpus, tmp_path / "cut", "rewind", save_interval=4)
    runs = (
        (train_and_die_before, "killed"),
        (train_and_die_after, "killed"),
        (train_on_bad_data, "again"),
        (train_on_bad_data, "done"),
    )
    for function, outcome in runs:
        assert pool.run(function, 1, cut) == [outcome]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one = stored(tmp_path / "whole")
    other = stored(tmp_path / "cut")
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert passed_over(tmp_path / "cut") == passed_over(tmp_path / "whole")


def test_only_the_last_steps_before_a_spike_are_passed_over_on_all_ranks(pool, corpus, tmp_path):
    argv = spiking_arguments(
        corpus,
        tmp_path,
        "rewind",
        rewind_skip_steps=1,
        max_rewinds=1,
        pipeline_model_parallel_size=2,
    )
    assert pool.run(train_on_bad_data, 2, argv) == ["again"] * 2
    # The spike of step 7 is passed over: the second one comes a step earlier, and is one too many.
    for text in pool.run(_outcome_of_bad_data, 2, argv):
        assert text.startswith("refused: step 9 of phase main: spike, "), text
        assert "the run went back 1 times already (max_rewinds)" in text
    rewinds = read_rewinds(str(tmp_path))
    assert [(rewind.start, rewind.end) for rewind in rewinds] == [(6 * 256, 7 * 256)]


def _outcome_of_bad_data(world: World, argv: list[str]) -> str:
    with bad_data():
        return _outcome(world, argv)


# ---------------------------------------------------------------- a loss that is not finite


def train_with_one_bad_loss(world: World, argv: list[str], rank: int) -> tuple[str, list]:
    """Train one step in which the loss, not the gradient, is NaN on one rank.

    Returns:
        The outcome, and the sum of the absolute values of this rank's shards.
    """
    forward = GPTStage.forward
    found = []

    def forward_to_nan(stage: GPTStage, x: torch.Tensor) -> torch.Tensor:
        loss = forward(stage, x)
        found.append(stage)
        if world.rank != rank or not stage.is_last:
            return loss
        # The value is NaN, the gradient that flows back is that of the loss.
        return loss + (torch.full_like(loss, float("nan")) - loss).detach()

    with mock.patch.object(GPTStage, "forward", forward_to_nan):
        outcome = _outcome(world, argv)
    return outcome, float(sum(p.to_local().abs().sum() for p in found[0].parameters()))


def _outcome(world: World, argv: list[str]) -> str:
    try:
        return train(world, argv)
    except ValueError as error:
        return f"refused: {error}"


LAYOUTS = (
    pytest.param({}, marks=pytest.mark.long),
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    pytest.param({"context_parallel_size": 2}, marks=pytest.mark.long),
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(layout) or "dp")
def test_a_loss_that_is_nan_on_one_rank_updates_nothing_on_any(pool, corpus, tmp_path, layout):
    argv = base_arguments(corpus, save=str(tmp_path), train_iters=1, eval_iters=0, **layout)
    # Rank 2 is a first rank of tp, and with pp of the last stage.
    results = pool.run(train_with_one_bad_loss, 4, argv, 2)
    for outcome, _ in results:
        assert outcome.startswith("refused: step 1: all 1 steps of phase main were skipped")
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["skipped"] and np.isfinite(line["grad_norm"]) and np.isnan(line["loss"])
    before = pool.run(untrained_sums, 4, argv)
    assert [total for _, total in results] == before


def untrained_sums(world: World, argv: list[str]) -> float:
    """Sum the absolute values of this rank's shards before any step."""
    from pretrain import training_loop

    found = []

    def stop(stepper, *_):
        found.append(float(sum(p.to_local().abs().sum() for p in stepper.stages[0].parameters())))
        raise ValueError("seen")

    with mock.patch.object(training_loop, "train_step", stop):
        with contextlib.suppress(ValueError):
            train(world, argv)
    return found[0]
