"""The watchdog on real runs: who stands still is named, and the run goes on; what is only slow is
left alone."""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.dist.training import base_arguments, losses, stored, train, write_corpus
from tools.faults.launched_run import LaunchedRun

SECONDS = 240
STEPS = 40
SETTINGS = dict(
    train_iters=STEPS,
    save_interval=10,
    global_batch_size=4,
    seq_length=64,
    log_interval=1,
    eval_iters=0,
)

PYTHON = r"""#!/usr/bin/env bash
exec {python} "${{@/#pretrain.train/tests.faults.hooked_trainer}}"
"""


class Run(LaunchedRun):
    """A run of launch/train.sh; with a hook, the trainer has a fault (hooked_trainer.py)."""

    def __init__(self, folder: Path, argv: list[str], *, processes: int, nodes: int = 1, hook=None):
        environment = {"ITHACA_ERRORS": str(folder / "errors"), "MAX_RESTARTS": "3"}
        if hook is not None:
            python = folder / "python"
            python.write_text(PYTHON.format(python=sys.executable))
            python.chmod(0o755)
            environment |= {"ITHACA_PYTHON": str(python), "HOOK": hook, "HERE": str(folder)}
        super().__init__(argv, folder / "save", processes, nodes=nodes, environment=environment)

    def reach(self, condition: Callable[[], object], what: str) -> None:
        assert self.wait_until(condition), f"not reached: {what}\n{''.join(self.lines)}"

    def finish(self) -> list[str]:
        """Wait for the end, which is a good one -> what each node said."""
        ends = self.wait_for_all(SECONDS)
        assert [code for code, _ in ends] == [0] * len(ends), "\n".join(text for _, text in ends)
        return [text for _, text in ends]


def verdict_of(said: str) -> str:
    """Find the line that names who is at fault; there is one."""
    (verdict,) = [line for line in said.splitlines() if "stands still" in line]
    return verdict


def page_of(said: str) -> str:
    """Read the page that the console names."""
    (path,) = re.findall(r"Python stack: (/\S+)", said)
    return Path(path).read_text()


@pytest.fixture
def start(tmp_path):
    runs = []

    def starting(*args, **options) -> Run:
        runs.append(Run(tmp_path, *args, **options))
        return runs[-1]

    yield starting
    for run in runs:
        run.end()


def arguments(folder: Path, **overrides) -> list[str]:
    return base_arguments(write_corpus(folder / "corpus", documents=60), **SETTINGS | overrides)


def check_same_as_alone(pool, folder: Path, argv: list[str], processes: int) -> None:
    """Compare each step and all tensors with those of a run that nobody disturbed."""
    alone = folder / "alone"
    assert pool.run(train, processes, [*argv, "--save", str(alone)]) == ["done"] * processes
    assert losses(folder / "save") == losses(alone)
    expected = stored(alone)
    found = stored(folder / "save")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_a_stopped_rank_is_named_with_its_place_and_the_run_ends_as_if_nothing_was(
    pool, tmp_path, start, processes
):
    argv = arguments(tmp_path, watchdog_seconds=2)
    run = start(argv, processes=processes)
    run.reach(lambda: run.last_step() >= 15, "step 15")
    victim = run.nodes[0].workers()[1]
    os.kill(victim, signal.SIGSTOP)
    (said,) = run.finish()
    verdict = verdict_of(said)
    assert re.search(rf"rank 1 \(\S+, process {victim}\) is stopped by a signal for \d", verdict)
    assert re.search(r"; step \d+; [1-3] ranks? waits? for it", verdict), verdict
    assert "Traceback" not in said
    page = page_of(said)
    for rank in range(processes):
        assert re.search(rf"rank {rank} \(\S+, process \d+\), node 0: step \d+, ", page), page
    assert re.search(r"(dp_cp|world|dp): \w+ [\d,]+, [\d,]+ bytes, begun", page), page
    assert page.count("in _run_phase") >= processes - 1, page
    check_same_as_alone(pool, tmp_path, argv, processes)


@pytest.mark.long
def test_a_rank_that_never_comes_back_from_reading_is_named(pool, tmp_path, start):
    argv = arguments(tmp_path, watchdog_seconds=3, tensor_model_parallel_size=2)
    run = start(argv, processes=4, hook="loop in the reader")
    (said,) = run.finish()
    verdict = verdict_of(said)
    assert re.search(r"rank 1 \(\S+, process \d+\) has been reading data for \d", verdict), verdict
    assert "step 6; 3 ranks wait for it" in verdict
    assert "hooked_trainer.py" in page_of(said), "the stack says where it loops"
    check_same_as_alone(pool, tmp_path, argv, 4)


@pytest.mark.long
def test_slow_plans_evaluations_first_steps_and_saves_are_no_alarm(tmp_path, start):
    argv = arguments(tmp_path, watchdog_seconds=2, train_iters=6, save_interval=3, eval_iters=1)
    (said,) = start(argv, processes=2, hook="slow parts").finish()
    assert "stands still" not in said, said
    assert "restart" not in said, said


@pytest.mark.long
def test_a_slow_rank_is_named_within_twenty_steps_of_its_slowness(tmp_path, start):
    run = start(arguments(tmp_path, train_iters=26), processes=4, hook="slow rank")
    (said,) = run.finish()
    slow = [event for event in run.events() if event["event"] == "slow rank"]
    assert [event["text"].split(" (")[0] for event in slow] == ["rank 1"]
    assert slow[0]["step"] <= 20, slow
    assert said.count("; the others wait for it") == 1, "it is said once"


@pytest.mark.long
def test_a_pause_that_ends_is_said_and_costs_nothing_else(tmp_path, start):
    run = start(arguments(tmp_path), processes=2)
    run.reach(lambda: run.last_step() >= 15, "step 15")
    victim = run.nodes[0].workers()[1]
    os.kill(victim, signal.SIGSTOP)
    run.reach(lambda: any("ranks wait" in line for line in run.lines), "a line about the wait")
    os.kill(victim, signal.SIGCONT)
    (said,) = run.finish()
    assert re.search(rf"ranks wait in .*rank 1 \(\S+, process {victim}\) is stopped", said), said
    assert "stands still" not in said
    # The step that waited is one of many: its rate says nothing of the time that is left.
    times = re.findall(r"ETA (\d+)m(\d+)s", said)
    assert times and max(int(minutes) for minutes, _ in times[5:]) < 5, times


@pytest.mark.long
def test_a_stopped_rank_of_another_node_is_named_on_both_nodes(pool, tmp_path, start):
    argv = arguments(tmp_path, watchdog_seconds=3)
    run = start(argv, nodes=2, processes=2)
    run.reach(lambda: run.last_step() >= 15, "step 15")
    os.kill(run.nodes[1].workers()[1], signal.SIGSTOP)
    outputs = run.finish()
    for said in outputs:
        verdict = verdict_of(said)
        assert "rank 3 (" in verdict and "is stopped by a signal" in verdict, verdict
    assert page_of(outputs[0]).count("in _run_phase") >= 3, "the stacks of both nodes"
    check_same_as_alone(pool, tmp_path, argv, 4)
