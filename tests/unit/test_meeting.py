"""launch/meeting.py: nodes that wait for each other, in threads of one process."""

import json
import signal
import socket
import threading
import time

import pytest

from launch import meeting, network, stop
from launch import store as stores
from launch.failures import Ending
from launch.meeting import Patience, meet_as_node_0, meet_as_other
from launch.outcome import NotMet
from launch.settings import Settings
from launch.store import Node0


class Store:
    """Node 0's store, and where it is."""

    def __init__(self):
        listening = network.listen(0)
        self.node0 = Node0("127.0.0.1", "127.0.0.1", listening.getsockname()[1])
        self.own = stores.open_store(listening)


@pytest.fixture
def opened():
    return Store()


@pytest.fixture
def store(opened):
    return opened.own


@pytest.fixture
def node0(opened):
    return opened.node0


def settings(rank: int, nnodes: int, nproc: int = 1, number: int = 1) -> Settings:
    """Describe one node of a launch."""
    return Settings(
        parent=0,
        nnodes=nnodes,
        node_rank=rank,
        nproc_per_node=nproc,
        master="127.0.0.1",
        port=0,
        grace=5,
        join_wait=30,
        number=number,
        pause=0,
        errors="",
        module="",
        arguments=[],
    )


class InThread:
    """Call a function in the background, and keep what it raises."""

    def __init__(self, function, *args):
        self.error = None
        self.thread = threading.Thread(target=self._run, args=(function, *args), daemon=True)
        self.thread.start()

    def _run(self, function, *args) -> None:
        try:
            function(*args)
        except Exception as error:
            self.error = error

    def finish(self) -> Exception | None:
        self.thread.join(30)
        assert not self.thread.is_alive(), "it still waits"
        return self.error


def test_nodes_meet_whoever_comes_first(store, node0):
    others = [InThread(meet_as_other, node0, settings(rank, 3), Patience(30.0)) for rank in (1, 2)]
    meet_as_node_0(store, settings(0, 3), Patience(30.0))
    assert [other.finish() for other in others] == [None, None]


def test_nodes_that_do_not_come_are_named(store):
    with pytest.raises(NotMet) as caught:
        meet_as_node_0(store, settings(0, 3), Patience(0.1))
    assert "waited 0 s for 2 nodes of 3 (NODE_RANK 1, 2). Fix: " in str(caught.value)


def test_who_waits_says_for_whom(store, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "REPORT_SECONDS", 0.1)
    with pytest.raises(NotMet):
        meet_as_node_0(store, settings(0, 2), Patience(1.0))
    assert "train.sh: waiting for 1 node of 2 (NODE_RANK 1) (" in capsys.readouterr().err


def test_another_number_of_nodes_is_refused_on_both(store, node0):
    waiting = InThread(meet_as_node_0, store, settings(0, 2), Patience(30.0))
    with pytest.raises(ValueError) as caught:
        meet_as_other(node0, settings(1, 3), Patience(30.0))
    expected = f"NNODES = 3 on node 1 ({socket.gethostname()}): must be that of node 0, 2. Fix: "
    assert expected in str(caught.value)
    assert expected in str(waiting.finish())


def test_a_node_whose_number_another_takes_is_refused(store, node0):
    waiting = InThread(meet_as_node_0, store, settings(0, 3), Patience(1.5))
    first = InThread(meet_as_other, node0, settings(1, 3), Patience(30.0))
    place = f"{stores.PREFIX}node/1"
    while not store.check([place]):
        time.sleep(0.01)
    store.set(place, "twin (process 7)")
    assert "NODE_RANK = 1: must be this node's alone; twin (process 7) has it" in str(
        first.finish()
    )
    assert isinstance(waiting.finish(), NotMet)


def test_a_node_whose_twin_has_started_in_its_place_is_refused(store, node0):
    store.set(stores.NPROC, "1")
    store.set(stores.NNODES, "2")
    node = InThread(meet_as_other, node0, settings(1, 2), Patience(30.0))
    while not store.check([f"{stores.PREFIX}node/1"]):
        time.sleep(0.01)
    members = ["node0 (process 6)", "twin (process 7)"]
    store.set(stores.MEMBERS, json.dumps(members))
    assert "must be this node's alone; twin (process 7) has it" in str(node.finish())


def test_a_node_that_comes_back_waits_for_a_new_start(store, node0):
    first = InThread(meet_as_other, node0, settings(1, 2), Patience(30.0))
    meet_as_node_0(store, settings(0, 2), Patience(30.0))
    assert first.finish() is None
    with pytest.raises(NotMet) as caught:
        meet_as_other(node0, settings(1, 2), Patience(0.5))
    assert "it has started with " in str(caught.value)
    assert "as node 1; it must start again" in str(caught.value)


def test_a_node_that_comes_back_ends_a_launch_that_lost_it(store, node0, monkeypatch):
    """The others would train on with its processes, which are dead, or wait for them."""
    monkeypatch.setattr(meeting, "SUSPECT_SECONDS", 0.5)
    first = InThread(meet_as_other, node0, settings(1, 2), Patience(30.0))
    meet_as_node_0(store, settings(0, 2), Patience(30.0))
    assert first.finish() is None
    with pytest.raises(NotMet):
        meet_as_other(node0, settings(1, 2, number=2), Patience(2.5))
    ending = Ending.from_text(store.get(stores.ENDED))
    assert ending.node_rank == 1
    assert "is gone and has started again" in ending.failure.summary


def test_a_node_that_still_gives_signs_of_life_is_left_alone(store, node0, monkeypatch):
    monkeypatch.setattr(meeting, "SUSPECT_SECONDS", 0.5)
    first = InThread(meet_as_other, node0, settings(1, 2), Patience(30.0))
    meet_as_node_0(store, settings(0, 2), Patience(30.0))
    assert first.finish() is None
    twin = InThread(meet_as_other, node0, settings(1, 2), Patience(2.5))
    number = 0
    while twin.thread.is_alive():
        number += 1
        store.set(f"{stores.BEAT}1", str(number))
        time.sleep(0.1)
    assert isinstance(twin.finish(), NotMet)
    assert not store.check([stores.ENDED])


def test_every_node_that_waits_says_for_whom(store, node0, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "REPORT_SECONDS", 0.1)
    waiting = InThread(meet_as_node_0, store, settings(0, 3), Patience(1.5))
    with pytest.raises(NotMet):
        meet_as_other(node0, settings(1, 3), Patience(1.0))
    waiting.finish()
    said = capsys.readouterr().err
    assert said.count("train.sh: waiting for 1 node of 3 (NODE_RANK 2) (") >= 2, said


def test_another_number_of_processes_is_refused_on_both(store, node0):
    waiting = InThread(meet_as_node_0, store, settings(0, 2, nproc=8), Patience(30.0))
    with pytest.raises(ValueError) as caught:
        meet_as_other(node0, settings(1, 2, nproc=4), Patience(30.0))
    expected = f"NPROC_PER_NODE = 4 on node 1 ({socket.gethostname()}): must be that of node 0, 8."
    assert expected in str(caught.value)
    assert expected in str(waiting.finish())


class Asked:
    """Stands in for the signals of a process."""

    def __init__(self, number: int | None = None):
        self.number = number


def test_node_0_that_is_asked_to_stop_while_it_waits_tells_who_has_come(store, node0):
    other = InThread(meet_as_other, node0, settings(1, 3), Patience(30.0))
    asked = Asked()
    waiting = InThread(meet_as_node_0, store, settings(0, 3), Patience(30.0, asked))
    while not store.check([f"{stores.PREFIX}node/1"]):
        time.sleep(0.01)
    asked.number = signal.SIGUSR1
    assert isinstance(waiting.finish(), stop.Interrupted)
    stop.part_as_node_0(store, 2, signal.SIGUSR1, 10.0)
    heard = other.finish()
    assert isinstance(heard, stop.HeardStop)
    expected = f"node 0 ({socket.gethostname()}) is asked to stop (SIGUSR1): this node, too"
    assert str(heard) == expected


def test_a_node_that_is_asked_to_stop_while_it_waits_tells_node_0(store, node0):
    waiting = InThread(meet_as_node_0, store, settings(0, 3), Patience(30.0))
    with pytest.raises(stop.Interrupted):
        meet_as_other(node0, settings(1, 3), Patience(30.0, Asked(signal.SIGTERM)))
    stop.part_as_other(node0, 1, signal.SIGTERM, 10.0)
    heard = waiting.finish()
    assert isinstance(heard, stop.HeardStop)
    assert heard.stop.node_rank == 1
    # Had the nodes just met, node 0 would wait for the end of its processes.
    assert store.check([f"{stores.OVER}/1"])


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_another_program_on_the_port_is_not_taken_for_node_0(monkeypatch, capfd, answer):
    monkeypatch.setattr(stores, "CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        InThread(_serve, server, answer)
        node0 = Node0("127.0.0.1", "127.0.0.1", server.getsockname()[1])
        with pytest.raises(NotMet) as caught:
            meet_as_other(node0, settings(1, 2), Patience(0.5))
    assert "it does not answer as a run that starts" in str(caught.value)
    assert "frame #" not in capfd.readouterr().err


def _serve(server: socket.socket, answer: bytes) -> None:
    """Take calls; say `answer` and hang up, or with none say nothing at all."""
    kept = []
    while True:
        try:
            caller, _ = server.accept()
        except OSError:
            return
        kept.append(caller)
        if answer:
            caller.sendall(answer)
            caller.close()
