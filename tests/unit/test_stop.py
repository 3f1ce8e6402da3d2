"""Stop signals before the first step, and how often ranks ask each other for them."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.tether import STOP_SIGNALS
from parallel.layout import single_process_layout
from pretrain.processes import stop
from pretrain.processes.stop import Interrupted, StopRequest, StopSignals
from pretrain.train import Trainer

ROOT = Path(__file__).resolve().parents[2]

# Waits for a store that nobody serves, as a process waits for another node: the wait is in C++, far
# from Python.
WAITING = """
import sys
from datetime import timedelta
from torch.distributed import TCPStore
from pretrain.processes.stop import StopSignals

StopSignals().listen(before_end=lambda: print("ended in order", flush=True))
print("listening", flush=True)
TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, timeout=timedelta(seconds=300))
"""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)]
)
def test_a_process_that_waits_for_others_ends_at_once(number):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "9"],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout.readline() == "listening\n"
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert said == "ended in order\n"
    assert process.returncode == 0, "an orderly end, of which the launcher makes no failure"


# A signal that comes while the trainer still imports what answers it.
IMPORTING = """
import os, signal, time
os.kill(os.getpid(), signal.SIGTERM)
from pretrain.processes.stop import StopSignals
StopSignals().listen(before_end=lambda: print("ended in order", flush=True))
time.sleep(60)
"""


def test_a_signal_during_the_imports_ends_the_process_in_order(tmp_path):
    (tmp_path / "importing.py").write_text(IMPORTING)
    found = subprocess.run(
        [sys.executable, "-m", "launch.worker", str(os.getpid()), "importing"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ
        | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "ITHACA_ERRORS": str(tmp_path), "RANK": "0"},
        # As launch/workers.py starts it.
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS),
    )
    assert (found.returncode, found.stdout) == (0, "ended in order\n"), found.stderr


# Rank 0 is where the steps begin and waits for rank 1, which is still loading.
LOADING = """
import sys, time
from torch.distributed import FileStore
from parallel.config import LayoutConfig
from parallel.layout import end_world, start_world
from pretrain.processes.stop import StopSignals, defer_together

signals, rank = StopSignals(), int(sys.argv[1])
signals.listen(before_end=lambda: print("ended in order", flush=True))
world = start_world(LayoutConfig(), FileStore(sys.argv[2], 2), rank, 2)
if rank == 1:
    print("loading", flush=True)
    time.sleep(300)
defer = signals.defer
signals.defer = lambda: (defer(), print("begun", flush=True))
print("all go on" if defer_together(signals, world.axis) else "stopped together", flush=True)
end_world()
"""


def test_a_signal_while_only_some_ranks_have_begun_stops_all_in_order(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOADING, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    try:
        assert [process.stdout.readline() for process in processes] == ["begun\n", "loading\n"]
        for process in processes:
            process.send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert said == ["stopped together\n", "ended in order\n"]
    assert [process.returncode for process in processes] == [0, 0]


def test_signals_are_only_noted_once_the_steps_begin_and_left_alone_after_the_end():
    before = signal.getsignal(signal.SIGUSR1)
    signals = StopSignals()
    signals.listen(before_end=lambda: os.abort())
    signals.defer()
    assert not signals.asked
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.asked
    signals.close()
    assert signal.getsignal(signal.SIGUSR1) == before


class Clock:
    """Time passes only as a test says."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def asked(monkeypatch):
    """(a request of one process, its clock, times at which it asked the ranks)."""
    clock = Clock()
    monkeypatch.setattr(stop, "time", clock)
    times = []
    real = stop.all_reduce

    def counted(x, axis, op):
        times.append(clock.now)
        return real(x, axis, op)

    monkeypatch.setattr(stop, "all_reduce", counted)
    request = StopRequest(
        StopSignals(), single_process_layout(torch.device("cpu")).world, torch.device("cpu")
    )
    return request, clock, times


@pytest.mark.parametrize("seconds", [0.001, 0.03, 0.3])
def test_short_microbatches_are_asked_about_rarely_and_never_a_second_apart(asked, seconds):
    request, clock, times = asked
    count = int(30 / seconds)
    for _ in range(count):
        request.check()
        clock.now += seconds
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert max(gaps) <= 2 * stop.CHECK_SECONDS, max(gaps)
    assert len(times) <= 30 / (stop.CHECK_SECONDS / 2) + 20, len(times)


def test_each_long_microbatch_is_asked_about(asked):
    request, clock, times = asked
    for _ in range(10):
        request.check()
        clock.now += 3.0
    assert len(times) == 10


def test_microbatches_that_become_long_are_asked_about_from_the_first(asked):
    """After a thousand short ones, those of an evaluation at another length."""
    request, clock, times = asked
    for _ in range(1000):
        request.check()
        clock.now += 0.001
    request.restart()
    del times[:]
    for _ in range(5):
        request.check()
        clock.now += 3.0
    assert len(times) == 5


def test_a_request_stays_and_is_not_asked_about_again(asked):
    request, _, times = asked
    assert not request.agreed()
    request.signals.asked = True
    with pytest.raises(Interrupted):
        request.check()
    count = len(times)
    assert request.agreed()
    with pytest.raises(Interrupted):
        request.check()
    assert len(times) == count


@pytest.mark.parametrize(
    "due, first", [("a", "a"), ("b", "b"), ("c", "b"), ("gone", "b"), (None, "b")]
)
def test_an_evaluation_is_made_up_for_only_in_a_phase_that_has_begun(due, first):
    starts = {"a": 0, "b": 10, "c": 20}
    phases = [SimpleNamespace(name=name, start=at, end=at + 10) for name, at in starts.items()]
    resumed = SimpleNamespace(evaluation_due=due, clock=12)
    plan = SimpleNamespace(config=None, phases=phases, resumed=resumed)
    trainer = Trainer(plan, SimpleNamespace(rank=1))
    assert trainer._first_phase().name == first
