"""The watchdogs of several nodes over one store, with records that the test writes itself."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from launch import exchange, watchdog
from launch.exchange import Exchange
from launch.stacks import NO_ANSWER, dump_stacks, group_stacks
from launch.store import Node0
from launch.watchdog import Watchdog
from tests.unit.test_verdict import busy, waits

RANK = """
import faulthandler, signal, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from parallel.rank_record import RankRecord
rank = {rank}
path = Path({folder!r}) / f"rank{{rank}}"
stacks = open(path.with_suffix(".stacks"), "w")
faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
record = RankRecord(path, rank=rank, local_rank=0, world_size=2)
record.tell(watchdog_seconds=1.0)
slot = record.add_slot("world", [0, 1], counts_alike=True)
record.begin(slot, b"all_reduce", 1 + {waiting}, 8)
if {waiting}:
    record.wait(slot, b"all_reduce", 2)
else:
    record.enter("reading data", patience=0.0, counts_gaps=False)
print("ready", flush=True)
def stand_still():
    time.sleep(600)
stand_still()
"""
ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(store: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)


@pytest.fixture
def start_rank(tmp_path):
    started = []

    def start(rank: int, *, waiting: bool) -> Path:
        """Start a process that stands still -> the folder of its record."""
        folder = tmp_path / f"node{rank}"
        folder.mkdir()
        code = RANK.format(root=ROOT, rank=rank, folder=str(folder), waiting=int(waiting))
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return folder

    start.processes = started
    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_nodes_find_the_rank_that_never_comes(tmp_path, store, start_rank, capfd):
    """Rank 0 waits for rank 1 of another node: the page has both, and both are ended."""
    dogs = []
    for node, waiting in ((0, True), (1, False)):
        folder = start_rank(node, waiting=waiting)
        to_others = Exchange(client(store), node, 2)
        dogs.append(Watchdog(folder, tmp_path / "errors", "shown", to_others, 1))
    for dog in dogs:
        dog.start()
    for dog in dogs:
        dog.join(60)
    assert [process.wait(10) for process in start_rank.processes] == [-9, -9]
    said = capfd.readouterr().err
    expected = f"rank 1 ({dogs[0].verdict.split('(')[1].split(',')[0]}, process "
    assert all(dog.verdict and dog.verdict.startswith(expected) for dog in dogs), said
    assert "has been reading data" in dogs[1].verdict
    assert "1 rank waits for it" in dogs[1].verdict
    (page,) = (tmp_path / "errors").glob("stuck-*.txt")
    text = page.read_text()
    assert "waits in all_reduce 2 on world" in text
    assert "world: all_reduce 1, 8 bytes" in text
    assert text.count("in stand_still") == 2 or "--- ranks 0, 1" in text, text


def test_node_0_says_which_node_does_not_answer(store, monkeypatch):
    monkeypatch.setattr(exchange, "SILENT_NODE_SECONDS", 0.5)
    asking = Exchange(client(store), 0, 3)
    answering = Exchange(client(store), 2, 3)
    assert asking.ask().silent == []
    answering.answer([busy(2, world=1)])
    limit = time.monotonic() + 20
    while not (found := asking.ask()).silent and time.monotonic() < limit:
        answering.answer([busy(2, world=1)])
        time.sleep(0.05)
    assert found.silent == [1]
    assert [view.rank for view in found.views] == [2]


class _CutOff:
    """A store behind a network that is cut."""

    def check(self, keys):
        raise dist.DistNetworkError("No route to host")


def test_a_watchdog_speaks_again_once_a_cut_network_is_back(tmp_path, store):
    exchange = Exchange(_CutOff(), 1, 2)
    dog = Watchdog(
        tmp_path, tmp_path, "shown", exchange, 1, Node0("127.0.0.1", "127.0.0.1", store.port)
    )
    dog.start()
    asking = Exchange(client(store), 0, 2)
    limit = time.monotonic() + 20
    while asking.ask().missing and time.monotonic() < limit:
        time.sleep(0.1)
    dog.close()
    assert asking.ask().missing == []


def has_arrived(exchange: Exchange) -> None:
    """Wait until the store has what was set: it answers nothing to that, but what is asked next."""
    assert exchange.store is not None
    exchange.store.check(["anything"])


def test_an_answer_of_a_question_long_ago_counts_for_nothing(store):
    asking = Exchange(client(store), 0, 2)
    answering = Exchange(client(store), 1, 2)
    asking.ask()
    has_arrived(asking)
    answering.answer([waits(1, "world", 3)])
    has_arrived(answering)
    assert [view.wait.number for view in asking.ask().views] == [3]
    asking.rest()
    assert asking.ask().views == []


def test_verdict_and_stacks_travel_between_the_nodes(store):
    leading = Exchange(client(store), 0, 2)
    following = Exchange(client(store), 1, 2)
    assert following.heard_verdict() is None
    leading.tell_verdict(["one", "two"])
    has_arrived(leading)
    assert following.heard_verdict() == ["one", "two"]
    sender = threading.Thread(target=following.send_stacks, args=({5: "here"},))
    sender.start()
    assert leading.collect_stacks([], 20) == {5: "here"}
    sender.join()


def test_a_watchdog_that_slept_calls_nobody_silent(tmp_path, start_rank):
    """A machine that stood still wakes up with old records; the ranks get their time again."""
    folder = start_rank(0, waiting=True)
    dog = Watchdog(folder, tmp_path / "errors", "shown", Exchange(None, 0, 1), 1)
    dog._last_look = time.monotonic() - 2 * watchdog.PAUSE_SECONDS
    dog._resumed_at = 0.0
    (view,) = dog._read()
    assert view.silence < 1.0
    dog._resumed_at = 0.0
    (view,) = dog._read()
    assert view.silence > 0.0


def test_ranks_that_have_ended_are_no_reason_to_ask_the_others(tmp_path, store):
    dog = Watchdog(tmp_path, tmp_path / "errors", "shown", Exchange(client(store), 0, 2), 1)
    dog._lead([replace(busy(0), process_state="Z", silence=500.0)])
    assert not store.check([exchange.ASKED])
    dog._lead([replace(busy(0), silence=500.0)])
    assert store.check([exchange.ASKED])


def test_stacks_of_ranks_that_do_the_same_are_written_once(tmp_path):
    stacks = {0: "Thread 0x01 (most", 1: "Thread 0xff (most", 2: "another"}
    assert group_stacks(stacks) == [([0, 1], "Thread 0x01 (most"), ([2], "another")]


def test_a_rank_that_is_not_prepared_is_not_ended_by_the_question(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        view = busy(0)
        view = view.from_json(view.to_json() | {"pid": process.pid})
        assert dump_stacks(tmp_path, [view]) == {0: NO_ANSWER}
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
