"""Open torch's key-value store on node 0, and connect to it from the others.

The meeting and the watch leave their words in it; the workers find each other by it, too.
"""

import os
import queue
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

CONNECT_SECONDS = 5.0
"""The seconds after which a connection attempt counts as failed."""
DEAD_SECONDS = 15
"""The seconds without an answer of the other machine after which the kernel ends a connection."""
PROBE_SECONDS = 5
"""The seconds between two questions of the kernel whether the other machine is there."""
PREFIX = "ithaca/meeting/"
"""The beginning of our keys in the store, which the workers fill, too."""
NNODES = f"{PREFIX}nnodes"
"""The key of the number of nodes, which node 0 writes first."""
NPROC = f"{PREFIX}nproc"
"""The key of the number of processes on each."""
NAME = f"{PREFIX}name"
"""The key of this launch's name: when node 0 began it."""
REFUSED = f"{PREFIX}refused"
"""The key under which a node with other settings says so."""
MEMBERS = f"{PREFIX}members"
"""The key of the list of the nodes that have met."""
BEAT = f"{PREFIX}beat/"
"""The beginning of the keys of each node's signs of life."""
STOP = f"{PREFIX}stop"
"""The key of the first request to stop."""
ENDED = f"{PREFIX}ended"
"""The key of the first failure."""
OVER = f"{PREFIX}over"
"""The beginning of the keys under which nodes say that their processes are over; by itself, node
0's word that all are."""
FACTS = f"{PREFIX}facts/"
"""The beginning of the keys under which nodes say what surrounds them."""
MARK = f"{PREFIX}mark"
"""The key of the file that node 0 has left where the run saves."""
CLOCK = f"{PREFIX}clock"
"""The key of the time on node 0, which it writes again and again while nodes are compared."""
VERDICT = f"{PREFIX}verdict"
"""The key of the reasons for which the nodes cannot train together; an empty list if there are
none."""
LEFT = f"{PREFIX}left"
"""The counter of the nodes that need the store no more."""
_stderr_lock = threading.Lock()
LINGER_SECONDS = 5.0
"""The seconds that node 0 keeps its store for nodes that have not read the last word yet."""


def open_store(listening: socket.socket) -> dist.TCPStore:
    """Open the store on this node, on a port that listens already."""
    port = listening.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listening.detach(),
    )


@dataclass(frozen=True)
class Node0:
    """Tells where the other nodes look for node 0."""

    master: str
    """MASTER_ADDR, as it was given."""
    address: str
    """What MASTER_ADDR resolves to here."""
    port: int

    def describe(self) -> str:
        """Say where that is, with the address where it is not what the user gave."""
        shown = self.master if self.master == self.address else f"{self.master} ({self.address})"
        return f"node 0 at {shown} port {self.port}"


def why_unreachable(node0: Node0) -> str | None:
    """Try node 0's port -> None if something answers there, otherwise the system's reason."""
    try:
        socket.create_connection((node0.master, node0.port), timeout=CONNECT_SECONDS).close()
        return None
    except OSError as error:
        return error.strerror or str(error)


def connect(node0: Node0) -> dist.TCPStore | None:
    """Connect to node 0's store -> None if it is gone, or another program has the port.

    A thread of its own connects, because torch waits without a limit for a program that accepts the
    connection and says nothing.
    """
    if why_unreachable(node0) is not None:
        return None
    answers: queue.SimpleQueue[dist.TCPStore | None] = queue.SimpleQueue()
    threading.Thread(target=_open_client, args=(node0, answers), daemon=True).start()
    with _silence():
        try:
            return answers.get(timeout=2 * CONNECT_SECONDS)
        except queue.Empty:
            return None


def _open_client(node0: Node0, answers: queue.SimpleQueue[dist.TCPStore | None]) -> None:
    """Put the connected store into the queue, or None."""
    try:
        store = dist.TCPStore(
            node0.master,
            node0.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=CONNECT_SECONDS),
        )
        end_dead_connections(node0.port)
    except dist.DistError:
        store = None
    answers.put(store)


def end_dead_connections(port: int) -> None:
    """Let the kernel end this process's connections to a port once the network behind them is cut.

    torch reads an answer of the store without a limit, and by itself the kernel waits for a
    quarter of an hour, or for ever if nothing is on its way. torch does not show its socket, so all
    that this process has open are looked through.
    """
    for name in os.listdir("/proc/self/fd"):
        # It is closed already, is no socket, or belongs to nobody.
        with suppress(OSError):
            # `fromfd` makes a second descriptor first, which stays open where it is no socket.
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            _end_when_dead(int(name), port)


def _end_when_dead(descriptor: int, port: int) -> None:
    """Set the limits of one socket, if it is a connection to this port."""
    with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as ours:
        if ours.getpeername()[1:2] != (port,):
            return
        # What was sent is not acknowledged for so long.
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * DEAD_SECONDS)
        # Nothing is sent: then the kernel asks, and counts the same time.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_SECONDS)
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what torch prints to stderr before it raises: C++ frames, of an error that is caught."""
    # torch writes past sys.stderr, so the file descriptor itself is redirected for the while.
    # Of two threads, the second would keep the first one's way to nowhere.
    with _stderr_lock:
        sys.stderr.flush()
        kept = os.dup(2)
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def leave_store(
    store: dist.TCPStore, node_rank: int, nnodes: int, seconds: float = LINGER_SECONDS
) -> None:
    """Leave the store: node 0, which has it, waits some seconds for the others to go first."""
    if node_rank > 0:
        store.add(LEFT, 1)
        return
    limit = time.monotonic() + seconds
    while store.add(LEFT, 0) < nnodes - 1 and time.monotonic() < limit:
        time.sleep(0.05)
