"""launch/watch.py: a node 0 that answers no more, though its connections still stand."""

import signal
import socket
import threading
import time

import pytest

from launch import network, watch
from launch.failures import Failure
from launch.store import MEMBERS, Node0, open_store
from launch.watch import Watch

LIMIT_SECONDS = 30


class Wire:
    """Carries bytes between a port and node 0's store, until it is cut; no connection closes."""

    def __init__(self, port: int):
        self.is_cut = threading.Event()
        self.to = port
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.to))
            self.ends += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if not self.is_cut.is_set():
                    target.sendall(data)
        except OSError:
            return

    def close(self) -> None:
        for end in [self.server, *self.ends]:
            end.close()


@pytest.fixture
def wire():
    listening = network.listen(0)
    port = listening.getsockname()[1]
    store = open_store(listening)
    store.set(MEMBERS, "[]")
    made = Wire(port)
    yield made
    made.close()


@pytest.fixture
def node1(wire, monkeypatch):
    monkeypatch.setattr(watch, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(watch, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(watch, "LINGER_SECONDS", 0.5)
    found = Watch(Node0("127.0.0.1", "127.0.0.1", wire.port), 1, 2)
    assert found.store is not None
    found.start()
    yield found
    found.is_over.set()


def test_a_node_0_that_answers_no_more_is_noticed(wire, node1):
    limit = time.monotonic() + 1.0
    while time.monotonic() < limit:
        node1.notice_silence()
        time.sleep(0.05)
    assert node1.heard is None, "it answers"
    wire.is_cut.set()
    limit = time.monotonic() + LIMIT_SECONDS
    while node1.heard is None and time.monotonic() < limit:
        node1.notice_silence()
        time.sleep(0.05)
    assert node1.heard is not None
    said = node1.heard.describe()
    assert said.startswith("node 0 (127.0.0.1) ended this launch: its launcher is gone"), said
    assert "no answer for" in said


def test_a_launcher_that_slept_takes_nobody_to_be_gone(wire, node1):
    node1.notice_silence()
    node1._alive_at[0] -= 100.0  # as its own thread has not looked since
    node1._noticed_at -= 100.0
    node1.notice_silence()
    assert node1.heard is None


def test_nobody_waits_for_ever_to_tell_a_node_0_that_answers_no_more(wire, node1, capsys):
    wire.is_cut.set()
    time.sleep(1.0)  # the thread waits for an answer now, and has the connection
    began = time.monotonic()
    node1.announce(Failure("rank 1 failed"))
    node1.announce_stop(signal.SIGTERM)
    node1.leave(0.5)
    node1.part()
    assert time.monotonic() - began < LIMIT_SECONDS
    assert "node 0 does not answer: leaving alone" in capsys.readouterr().err
