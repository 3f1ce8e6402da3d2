"""Whole runs that delete their old checkpoints, and that save by the clock on the wall."""

import json
from unittest import mock

import pytest

from parallel.layout import World
from pretrain.checkpointing.folders import iteration_folder
from pretrain.checkpointing.manifest import verify_files
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.save_folder import checkpoint_bytes
from pretrain.checkpointing.save_schedule import SaveSchedule
from pretrain.config.flags import spell
from pretrain.config.load import load_config
from pretrain.plan import make_plan
from tests.dist.training import base_arguments, losses, stored, train, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def iterations(save) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in save.glob("iter_*"))


def events(save, kind) -> list[tuple[int, str]]:
    found = [json.loads(line) for line in (save / "events.jsonl").read_text().splitlines()]
    return [(event["step"], event["text"]) for event in found if event["event"] == kind]


def test_a_run_keeps_the_last_ones_and_the_ends_of_phases_through_a_restart(pool, corpus, tmp_path):
    """Two phases of 3 and 7 steps; the restart comes after step 5."""
    config = tmp_path / "phases.yaml"
    config.write_text(
        "phases:\n"
        "  - {name: base, seq_length: 64, train_tokens: 768}\n"
        "  - {name: long, seq_length: 128, train_tokens: 1792}\n"
    )
    argv = base_arguments(corpus, save_interval=1, eval_interval=2, keep_last=2, keep_best=1)
    at = argv.index("--train-iters")
    argv = [*argv[:at], *argv[at + 2 :], "--config", str(config)]
    argv = [*argv, "--global-batch-tokens", "256", "--micro-batch-size", "1"]
    at = argv.index("--global-batch-size")
    argv = argv[:at] + argv[at + 2 :]
    save = tmp_path / "save"
    kept_all = tmp_path / "all"
    straight = [*argv, "--save", str(kept_all), "--keep-all"]
    del straight[straight.index("--keep-last") : straight.index("--keep-last") + 4]
    assert pool.run(train, 2, straight) == ["done"] * 2
    assert iterations(kept_all) == list(range(1, 11))

    argv = [*argv, "--save", str(save)]
    assert pool.run(train, 2, [*argv, "--exit-interval", "5"]) == ["stopped"] * 2
    first = Progress.read(iteration_folder(save, 5))
    assert pool.run(train, 2, argv) == ["done"] * 2

    # Everything that is kept is of one run, and whole.
    progress = {step: Progress.read(iteration_folder(save, step)) for step in iterations(save)}
    assert {found.run_id for found in progress.values()} == {first.run_id}
    assert Progress.read(iteration_folder(kept_all, 10)).run_id != first.run_id
    for step in progress:
        assert verify_files(iteration_folder(save, step)) == []
    assert [step for step in progress if progress[step].ends_phase] == [3, 10]

    # Evaluations: every 2 steps and at the ends of phases, at the phase's length.
    everything = [Progress.read(iteration_folder(kept_all, step)) for step in range(1, 11)]
    scores = {each.step: each.validation for each in everything if each.validation is not None}
    assert {step: score.seq_length for step, score in scores.items()} == {
        2: 64,
        3: 64,
        4: 128,
        6: 128,
        8: 128,
        10: 128,
    }
    best = {
        min((step for step in scores if scores[step].seq_length == length), key=lambda step: scores[step].loss)
        for length in (64, 128)
    }
    # Step 5 is what the second process started from.
    assert set(progress) == {3, 5, 9, 10} | best
    assert events(save, "deleted")[-1][0] == 10
    assert losses(save) == losses(kept_all)

    # The plan's estimate of one: the padded vocabulary and the counts of steps are left out.
    size = sum(tensor.nbytes for tensor in stored(save).values())
    plan = make_plan(load_config(spell(argv)), 2)
    assert checkpoint_bytes(plan.config, plan.vocab_size) == pytest.approx(size, rel=0.1)


def train_with_clock(world: World, argv: list[str], late_after: dict[int, int]) -> str:
    """A run on whose ranks the minutes are over once, after a number of steps of that rank."""
    calls = []

    def is_late(_) -> bool:
        calls.append(0)
        return len(calls) == late_after.get(world.rank)

    with mock.patch.object(SaveSchedule, "is_late", property(is_late)):
        return train(world, argv)


def test_all_ranks_save_at_the_step_at_which_the_minutes_are_over_on_one(pool, corpus, tmp_path):
    argv = base_arguments(
        corpus, save=str(tmp_path), eval_iters=0, save_interval=4, save_interval_in_mins=0.5
    )
    assert pool.run(train_with_clock, 2, argv, {0: 5, 1: 2}) == ["done"] * 2
    assert [step for step, _ in events(tmp_path, "save")] == [2, 4, 5, 6]


def test_minutes_count_from_the_last_checkpoint(monkeypatch):
    from pretrain.checkpointing import save_schedule
    from pretrain.config.checkpoint_config import CheckpointConfig

    now = [1000.0]
    monkeypatch.setattr(save_schedule.time, "monotonic", lambda: now[0])
    schedule = SaveSchedule(CheckpointConfig(save_interval_in_mins=2))
    now[0] += 119.9
    assert not schedule.is_late
    now[0] += 0.1
    assert schedule.is_late and schedule.is_due(7, some_rank_is_late=True)
    schedule.restart()
    assert not schedule.is_late and not schedule.is_due(7, some_rank_is_late=False)
    now[0] += 1e9
    assert not SaveSchedule(CheckpointConfig(save_interval=5)).is_late
    assert SaveSchedule(CheckpointConfig(save_interval=5)).is_due(10, some_rank_is_late=False)
