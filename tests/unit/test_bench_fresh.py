"""Fresh processes of the benchmarks: one call, workers that are asked, and their end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tools.bench.fresh import ROOT, Worker, run_fresh, start_fresh


def talk(text: str) -> dict:
    """Answer, after words of a library."""
    os.write(1, b"words of C\n")
    print("words of Python")
    return {"text": text, "threads": os.environ["OMP_NUM_THREADS"], "more": os.environ.get("MORE")}


@contextmanager
def serve(first: int) -> Iterator[dict[str, Callable]]:
    """Offer a sum that grows, and ways to end."""
    total = [first]

    def add(number: int) -> int:
        total[0] += number
        return total[0]

    def fail() -> None:
        raise ValueError("a sum of this worker failed")

    yield {
        "pid": os.getpid,
        "add": add,
        "talk": talk,
        "fail": fail,
        "exit": lambda: os._exit(0),
        "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    }


def start_two(stack: ExitStack) -> tuple[Worker, Worker]:
    """Start two workers, and see that they answer."""
    one, other = (
        stack.enter_context(start_fresh(serve, 1, title=title, first=first))
        for title, first in (("one", 1), ("other", 100))
    )
    assert runs(one.ask("pid")) and runs(other.ask("pid"))
    return one, other


def runs(pid: int) -> bool:
    """Whether a process runs; an orphan that nobody has waited for has ended."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"


def is_gone(worker: Worker) -> bool:
    """Whether a worker has ended and was waited for."""
    return worker.process.returncode is not None


def test_only_what_a_function_returns_is_the_answer():
    answer = {"text": "\u00e4", "threads": "1", "more": None}
    assert run_fresh(talk, 1, text="\u00e4") == answer
    with start_fresh(serve, 1, title="one", environment={"MORE": "yes"}, first=1) as worker:
        assert worker.ask("talk", "\u00e4") == answer | {"more": "yes"}


def test_workers_keep_their_own_state_between_calls():
    with ExitStack() as stack:
        one, other = start_two(stack)
        assert [one.ask("add", 1), other.ask("add", 1), one.ask("add", 5)] == [2, 101, 7]
    assert is_gone(one) and is_gone(other)


@pytest.mark.parametrize(
    "call, code",
    [("fail", "1"), ("exit", "0"), ("die", r"-9 \(SIGKILL, as where memory runs out\)")],
)
def test_a_worker_that_fails_ends_the_others_and_is_named(call, code, capfd):
    with (
        pytest.raises(RuntimeError, match=f"^other: its process ended with code {code}$"),
        ExitStack() as stack,
    ):
        one, other = start_two(stack)
        other.ask(call)
    assert is_gone(one) and is_gone(other)
    assert ("a sum of this worker failed" in capfd.readouterr().err) == (call == "fail")


def test_a_worker_that_ended_before_it_was_asked_is_named():
    with ExitStack() as stack:
        one, other = start_two(stack)
        os.kill(one.process.pid, signal.SIGKILL)
        one.process.wait()
        assert other.ask("add", 1) == 101
        with pytest.raises(RuntimeError, match="^one: its process ended with code -9"):
            one.ask("add", 1)


PARENT = """
import signal
import time
from contextlib import ExitStack
from tests.unit.test_bench_fresh import start_two

# A shell starts a command in the background with SIGINT ignored, and this process inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
with ExitStack() as stack:
    print(*(worker.process.pid for worker in start_two(stack)), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_is_left_when_the_parent_ends(sent):
    """Ctrl-C goes to the whole group, and no worker has its say; a SIGKILL reaches the parent."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    if sent == signal.SIGINT:
        os.killpg(parent.pid, sent)
    else:
        parent.kill()
    _, said = parent.communicate(timeout=30)
    assert said.count("KeyboardInterrupt") == (sent == signal.SIGINT), said
    # What the parent could not end sees its pipe close.
    deadline = time.monotonic() + 30
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))
