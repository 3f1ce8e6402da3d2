"""Bring the nodes of a run together before anything is started on them.

Node 0 opens torch's key-value store, and the others connect to it. Each node enters itself under
`node/RANK`; when all are there, node 0 writes the list of `members`, and everybody goes on. A node
that waits says from time to time for whom; what waiting cannot fix is refused in one line. The
store stays open: torchrun and its workers use it, too.
"""

import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from launch.outcome import NotMet, say

REPORT_SECONDS = 30.0
"""The seconds between two lines of a node that waits."""
PORT_SECONDS = 5.0
"""The seconds that node 0 waits for its port: a launch that was just killed may still hold it."""
CONNECT_SECONDS = 5.0
"""The seconds after which a connection attempt counts as failed."""
POLL_SECONDS = 0.2
"""The seconds between two looks at the store."""
PREFIX = "ithaca/meeting/"
"""The beginning of our keys in the store, which torchrun fills, too."""


class Patience:
    """Waits for something, up to a limit in seconds, and says from time to time for what."""

    def __init__(self, limit: float):
        self.started = time.monotonic()
        self.limit = limit
        self.next_report = self.started + min(2.0, REPORT_SECONDS)  # the first one soon

    def wait(self, for_what: Callable[[], str], seconds: float = POLL_SECONDS) -> None:
        """Sleep for some seconds, and report if a report is due.

        Raises:
            NotMet: the limit has passed.
        """
        now = time.monotonic()
        waited = now - self.started
        if waited >= self.limit:
            raise NotMet(
                f"waited {waited:.0f} s {for_what()}. Fix: start the same command "
                "there with its NODE_RANK, look at MASTER_ADDR, MASTER_PORT and the firewall, or "
                f"raise JOIN_WAIT = {self.limit:.0f}."
            )
        if now >= self.next_report:
            say(f"waiting {for_what()} ({waited:.0f} s of {self.limit:.0f})")
            self.next_report = now + REPORT_SECONDS
        time.sleep(seconds)


def open_store(port: int) -> dist.TCPStore:
    """Open the store on this node.

    Port 0 lets the kernel choose a free port and open it in one act.

    Raises:
        ValueError: the port is taken, or may not be opened.
    """
    limit = time.monotonic() + PORT_SECONDS
    while True:
        try:
            _try_port(port)
            return dist.TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True
            )
        except (OSError, dist.DistNetworkError) as error:
            if isinstance(error, PermissionError) or time.monotonic() >= limit:
                number = error.errno if isinstance(error, OSError) else None
                reason = "in use" if number is None else os.strerror(number)
                raise ValueError(
                    f"MASTER_PORT = {port}: must be a port that is free on node 0 ({reason}). Fix: "
                    "another one, the same on all nodes, or end the process that has it."
                ) from None
            time.sleep(0.5)


def _try_port(port: int) -> None:
    """Open a port as the store will, and close it; where that fails torch prints C++ frames."""
    if socket.has_dualstack_ipv6():
        socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
    else:
        socket.create_server(("", port)).close()


def meet_as_node_0(store: dist.TCPStore, nnodes: int, wait: float) -> None:
    """Wait until every other node has come.

    Raises:
        ValueError: a node was started with other settings.
        NotMet: one did not come within `wait` seconds.
    """
    # Enter this node, with what the others compare.
    store.set(f"{PREFIX}nnodes", str(nnodes))
    store.set(_place(0), _signature())
    patience = Patience(wait)

    def missing() -> list[int]:
        return [rank for rank in range(nnodes) if not store.check([_place(rank)])]

    def describe() -> str:
        ranks = missing()
        return f"for {_nodes(ranks)} of {nnodes} (NODE_RANK {', '.join(map(str, ranks))})"

    while missing():
        if store.check([f"{PREFIX}refused"]):
            raise ValueError(store.get(f"{PREFIX}refused").decode())
        patience.wait(describe)
    # From now on the meeting is over: whoever comes later waits for the next one.
    members = [store.get(_place(rank)).decode() for rank in range(nnodes)]
    store.set(f"{PREFIX}members", json.dumps(members))


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


def meet_as_other(node0: Node0, rank: int, nnodes: int, wait: float) -> None:
    """Find node 0's store and wait there until every node has come.

    Raises:
        ValueError: node 0 has other settings, or another node has the same number.
        NotMet: that did not happen within `wait` seconds.
    """
    patience = Patience(wait)
    while True:
        reason = _why_unreachable(node0)
        if reason is None:
            reason = "it does not answer as a run that starts"
            store = connect(node0)
            if store is not None:
                with suppress(dist.DistError):  # node 0 ended meanwhile: try again
                    reason = _join(store, node0, rank, nnodes, patience)
        if reason is None:
            return
        patience.wait(lambda reason=reason: f"for {node0.describe()}: {reason}", seconds=1.0)


def _why_unreachable(node0: Node0) -> str | None:
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
    if _why_unreachable(node0) is not None:
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
    except dist.DistError:
        store = None
    answers.put(store)


def _join(
    store: dist.TCPStore, node0: Node0, rank: int, nnodes: int, patience: Patience
) -> str | None:
    """Enter this node in the store -> None once all have come, or why there is no place for it."""
    # Settings that differ are refused here and, through the store, by node 0.
    theirs = int(store.get(f"{PREFIX}nnodes"))
    if theirs != nnodes:
        text = (
            f"NNODES = {nnodes} on node {rank} ({socket.gethostname()}): must be that of node 0, "
            f"{theirs}. Fix: the same NNODES on all nodes."
        )
        store.set(f"{PREFIX}refused", text)
        raise ValueError(text)
    # A meeting that is over has no place left: this node was started again, or comes too late.
    if store.check([f"{PREFIX}members"]):
        holder = _member(store, rank)
        return f"it has started with {holder} as node {rank}; it must start again"
    # Enter, then wait for the others; a twin with the same number would overwrite the entry.
    own = _signature()
    store.set(_place(rank), own)
    while not store.check([f"{PREFIX}members"]):
        _require_place(store.get(_place(rank)).decode(), own, rank)
        patience.wait(lambda: f"for other nodes than {rank}; {node0.describe()} is there")
    # Two may have entered one place since node 0 looked; only one of them is a member.
    _require_place(_member(store, rank), own, rank)
    return None


def _member(store: dist.TCPStore, rank: int) -> str:
    """Look up who has started as node `rank`."""
    return json.loads(store.get(f"{PREFIX}members"))[rank]


def _require_place(holder: str, own: str, rank: int) -> None:
    """Raise ValueError where another node has this node's number."""
    if holder != own:
        raise ValueError(
            f"NODE_RANK = {rank}: must be this node's alone; {holder} has it, too. Fix: "
            "another NODE_RANK for each node."
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what torch prints to stderr before it raises: C++ frames, of an error that is caught."""
    # torch writes past sys.stderr, so the file descriptor itself is redirected for the while.
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _place(rank: int) -> str:
    """Name the key under which node `rank` enters itself."""
    return f"{PREFIX}node/{rank}"


def _signature() -> str:
    """Describe this node so that no other one has the same description."""
    return f"{socket.gethostname()} (process {os.getpid()})"


def _nodes(ranks: list[int]) -> str:
    """Count nodes in words."""
    return f"{len(ranks)} node" + ("" if len(ranks) == 1 else "s")
