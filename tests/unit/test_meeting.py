"""launch/meeting.py: nodes that wait for each other, in threads of one process."""

import json
import socket
import threading
import time

import pytest

from launch import meeting
from launch.meeting import Node0, meet_as_node_0, meet_as_other, open_store
from launch.outcome import NotMet


@pytest.fixture
def store():
    return open_store(0)


def node0_of(store) -> Node0:
    return Node0("127.0.0.1", "127.0.0.1", store.port)


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


def test_two_stores_of_one_node_get_ports_of_their_own(store):
    other = open_store(0)
    assert store.port != other.port


def test_nodes_meet_whoever_comes_first(store):
    others = [InThread(meet_as_other, node0_of(store), rank, 3, 30.0) for rank in (1, 2)]
    meet_as_node_0(store, 3, 30.0)
    assert [other.finish() for other in others] == [None, None]


def test_nodes_that_do_not_come_are_named(store):
    with pytest.raises(NotMet) as caught:
        meet_as_node_0(store, 3, 0.1)
    assert "waited 0 s for 2 nodes of 3 (NODE_RANK 1, 2). Fix: " in str(caught.value)


def test_who_waits_says_for_whom(store, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "REPORT_SECONDS", 0.1)
    with pytest.raises(NotMet):
        meet_as_node_0(store, 2, 1.0)
    assert "train.sh: waiting for 1 node of 2 (NODE_RANK 1) (" in capsys.readouterr().err


def test_another_number_of_nodes_is_refused_on_both(store):
    waiting = InThread(meet_as_node_0, store, 2, 30.0)
    with pytest.raises(ValueError) as caught:
        meet_as_other(node0_of(store), 1, 3, 30.0)
    expected = f"NNODES = 3 on node 1 ({socket.gethostname()}): must be that of node 0, 2. Fix: "
    assert expected in str(caught.value)
    assert expected in str(waiting.finish())


def test_a_node_whose_number_another_takes_is_refused(store):
    waiting = InThread(meet_as_node_0, store, 3, 1.5)
    first = InThread(meet_as_other, node0_of(store), 1, 3, 30.0)
    place = f"{meeting.PREFIX}node/1"
    while not store.check([place]):
        time.sleep(0.01)
    store.set(place, "twin (process 7)")
    assert "NODE_RANK = 1: must be this node's alone; twin (process 7) has it" in str(
        first.finish()
    )
    assert isinstance(waiting.finish(), NotMet)


def test_a_node_whose_twin_has_started_in_its_place_is_refused(store):
    store.set(f"{meeting.PREFIX}nnodes", "2")
    node = InThread(meet_as_other, node0_of(store), 1, 2, 30.0)
    while not store.check([f"{meeting.PREFIX}node/1"]):
        time.sleep(0.01)
    members = ["node0 (process 6)", "twin (process 7)"]
    store.set(f"{meeting.PREFIX}members", json.dumps(members))
    assert "must be this node's alone; twin (process 7) has it" in str(node.finish())


def test_a_node_that_comes_back_waits_for_a_new_start(store):
    first = InThread(meet_as_other, node0_of(store), 1, 2, 30.0)
    meet_as_node_0(store, 2, 30.0)
    assert first.finish() is None
    with pytest.raises(NotMet) as caught:
        meet_as_other(node0_of(store), 1, 2, 0.5)
    assert "it has started with " in str(caught.value)
    assert "as node 1; it must start again" in str(caught.value)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_another_program_on_the_port_is_not_taken_for_node_0(monkeypatch, capfd, answer):
    monkeypatch.setattr(meeting, "CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        InThread(_serve, server, answer)
        node0 = Node0("127.0.0.1", "127.0.0.1", server.getsockname()[1])
        with pytest.raises(NotMet) as caught:
            meet_as_other(node0, 1, 2, 0.5)
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


def test_a_port_in_use_is_refused(monkeypatch):
    monkeypatch.setattr(meeting, "PORT_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"MASTER_PORT = {port}: .*Address already in use"):
            open_store(port)


def test_a_port_that_becomes_free_is_waited_for(monkeypatch):
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    threading.Timer(0.2, server.close).start()
    assert open_store(port).port == port
