"""launch/failures.py and launch/worker.py: which rank failed first, and how it is said."""

import json
import signal
import sys
from types import SimpleNamespace

import pytest

from launch import failures, worker
from launch.failures import find_first
from launch.workers import Ended


class Node:
    """Stands in for the workers of node 1, ranks 2 to 5."""

    def __init__(self, folder):
        self.folder = folder
        self.first_rank = 2
        self.processes = [SimpleNamespace(pid=100 + local_rank) for local_rank in range(4)]

    def error_file(self, rank: int):
        return self.folder / f"rank{rank}.txt"

    def record(self, rank: int, error: BaseException, time: float) -> None:
        """Write what launch/worker.py writes when `error` is raised on a rank."""
        try:
            raise error
        except BaseException as caught:
            found = worker.describe(caught, caught.__traceback__) | {"time": time}
        (self.folder / f"rank{rank}.json").write_text(json.dumps(found))
        self.error_file(rank).write_text(f"Traceback of rank {rank}\n{error}\n")


@pytest.fixture
def node(tmp_path, monkeypatch):
    monkeypatch.setenv("ITHACA_ERRORS", str(tmp_path))
    return Node(tmp_path)


def after_step(error: BaseException, step: int) -> BaseException:
    error.add_note(f"after step {step:,}")
    return error


def ended(rank: int, code: int, time: float) -> Ended:
    return Ended(rank, rank - 2, 98 + rank, code, time)


CONNECTION_LOST = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]"
)


def test_a_lost_connection_is_not_the_cause_although_it_came_first(node):
    node.record(2, RuntimeError(CONNECTION_LOST), time=10.0)
    node.record(4, after_step(RuntimeError("the loss is a pear"), 1200), time=10.2)
    found = find_first(node, [ended(2, 1, 10.1), ended(4, 1, 10.3)])
    assert found.summary.startswith("rank 4 (local rank 2, process 102 on ")
    assert ") failed after step 1,200: RuntimeError: the loss is a pear; 1 more rank" in (
        found.summary
    )
    assert found.details == "Traceback of rank 4\nthe loss is a pear"
    assert found.is_cause


def test_a_killed_rank_is_the_cause_of_lost_connections(node):
    node.record(2, RuntimeError(CONNECTION_LOST), time=10.0)
    found = find_first(node, [ended(2, 1, 10.1), ended(5, -signal.SIGKILL, 10.1)])
    assert "rank 5 (local rank 3, process 103 on " in found.summary
    assert "was killed by SIGKILL" in found.summary


def test_of_two_causes_the_earlier_one_counts(node):
    node.record(2, KeyError("a"), time=10.2)
    node.record(3, KeyError("b"), time=10.1)
    assert "rank 3 " in find_first(node, []).summary


def test_where_only_connections_are_lost_the_cause_is_elsewhere(node):
    node.record(2, RuntimeError(CONNECTION_LOST), time=10.0)
    found = find_first(node, [])
    assert not found.is_cause
    assert found.signature == "", "another try may go better"


def signature_of(node, error: BaseException) -> str:
    node.record(2, error, time=1.0)
    return find_first(node, []).signature


def test_an_error_is_the_same_at_the_same_step_whatever_its_numbers(node):
    first = signature_of(node, after_step(RuntimeError("no room for 0x7f01 of 12.5 GiB"), 7))
    assert first != ""
    assert first == signature_of(
        node, after_step(RuntimeError("no room for 0x7fee of 12.25 GiB"), 7)
    )
    assert first != signature_of(
        node, after_step(RuntimeError("no room for 0x7f01 of 12.5 GiB"), 8)
    )
    assert first != signature_of(
        node, after_step(RuntimeError("no place for 0x7f01 of 12.5 GiB"), 7)
    )


def test_an_error_of_the_machine_may_go_away(node):
    assert signature_of(node, after_step(OSError(5, "Input/output error"), 7)) == ""


def test_what_a_process_does_not_catch_is_written_whole_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(worker.faulthandler, "enable", lambda file: None)
    worker.keep_errors(tmp_path, 3)
    try:
        after_step(1, 2)  # an int has no notes
    except AttributeError as error:
        caught = error
    sys.excepthook(type(caught), caught, caught.__traceback__)
    sys.excepthook(type(caught), caught, caught.__traceback__)
    written = (tmp_path / "rank3.txt").read_text()
    assert written.startswith("rank 3 on ")
    assert written.count("AttributeError: 'int' object has no attribute 'add_note'") == 1
    record = failures.Record(**json.loads((tmp_path / "rank3.json").read_text()))
    assert record.error == "AttributeError"
    assert record.place == "test_failures.py: after_step"
    assert record.step is None
