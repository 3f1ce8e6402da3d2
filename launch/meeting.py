"""Bring the nodes of a run together before anything is started on them.

Node 0 opens torch's key-value store, the others look for it. Who waits says for whom, from time to
time; what waiting cannot mend is refused in one line. The store stays open: torchrun and its
workers use the same one.
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

from launch.report import NotMet, say

REPORT_SECONDS = 30.0
"""How often a node that waits says so."""
PORT_SECONDS = 5.0
"""How long node 0 waits for its port: a launch that has just been killed may still hold it."""
CONNECT_SECONDS = 5.0
POLL_SECONDS = 0.2
PREFIX = "ithaca/meeting/"


class Patience:
    """Wait for something, up to a limit, and say from time to time what for."""

    def __init__(self, limit: float):
        self.started = time.monotonic()
        self.limit = limit
        self.next_report = self.started + min(2.0, REPORT_SECONDS)

    def wait(self, for_what: Callable[[], str], seconds: float = POLL_SECONDS) -> None:
        """Sleep a little.

        Raises:
            NotMet: the limit has passed.
        """
        now = time.monotonic()
        if now - self.started >= self.limit:
            raise NotMet(
                f"waited {now - self.started:.0f} s {for_what()}. Fix: start the same command "
                "there with its NODE_RANK, look at MASTER_ADDR, MASTER_PORT and the firewall, or "
                f"raise JOIN_WAIT = {self.limit:.0f}."
            )
        if now >= self.next_report:
            say(f"waiting {for_what()} ({now - self.started:.0f} s of {self.limit:.0f})")
            self.next_report = now + REPORT_SECONDS
        time.sleep(seconds)


def open_store(port: int) -> dist.TCPStore:
    """Open the store on this node.

    Port 0 lets the kernel choose one, with no gap in which another process takes it.

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
                reason = os.strerror(error.errno) if isinstance(error, OSError) else "in use"
                raise ValueError(
                    f"MASTER_PORT = {port}: must be a port that is free on node 0 ({reason}). Fix: "
                    "another one, the same on all nodes, or end the process that has it."
                ) from None
            time.sleep(0.5)


def _try_port(port: int) -> None:
    """Open a port as the store will, and close it: torch would print lines of its own."""
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
    members = [store.get(_place(rank)).decode() for rank in range(nnodes)]
    store.set(f"{PREFIX}members", json.dumps(members))


@dataclass(frozen=True)
class Node0:
    """Where the other nodes look for node 0."""

    master: str
    """MASTER_ADDR, as it was given."""
    address: str
    """What it resolves to here."""
    port: int

    def describe(self) -> str:
        shown = self.master if self.master == self.address else f"{self.master} ({self.address})"
        return f"node 0 at {shown} port {self.port}"


def meet_as_other(node0: Node0, rank: int, nnodes: int, wait: float) -> None:
    """Look for node 0's store and wait there until every node has come.

    Raises:
        ValueError: node 0 has other settings, or another node has the same number.
        NotMet: that did not happen within `wait` seconds.
    """
    patience = Patience(wait)
    while True:
        reason = _why_unreachable(node0)
        if reason is None:
            reason = "it does not answer as a run that starts"
            store = call(node0)
            if store is not None:
                with suppress(dist.DistError):  # node 0 ended in between
                    reason = _join(store, node0, rank, nnodes, patience)
        if reason is None:
            return
        patience.wait(lambda reason=reason: f"for {node0.describe()}: {reason}", seconds=1.0)


def _why_unreachable(node0: Node0) -> str | None:
    try:
        socket.create_connection((node0.master, node0.port), timeout=CONNECT_SECONDS).close()
        return None
    except OSError as error:
        return error.strerror or str(error)


def call(node0: Node0) -> dist.TCPStore | None:
    """Connect to node 0's store; None if it is gone, or what has the port is no store.

    That is found out in a thread, because torch waits without a limit for a port that takes the
    call and says nothing.
    """
    if _why_unreachable(node0) is not None:
        return None
    answers = queue.SimpleQueue()
    threading.Thread(target=_open_client, args=(node0, answers), daemon=True).start()
    with _silence():
        try:
            return answers.get(timeout=2 * CONNECT_SECONDS)
        except queue.Empty:
            return None


def _open_client(node0: Node0, answers: queue.SimpleQueue) -> None:
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
    theirs = int(store.get(f"{PREFIX}nnodes"))
    if theirs != nnodes:
        text = (
            f"NNODES = {nnodes} on node {rank} ({socket.gethostname()}): must be that of node 0, "
            f"{theirs}. Fix: the same NNODES on all nodes."
        )
        store.set(f"{PREFIX}refused", text)
        raise ValueError(text)
    if store.check([f"{PREFIX}members"]):
        holder = _member(store, rank)
        return f"it has started with {holder} as node {rank}; it must start again"
    own = _signature()
    store.set(_place(rank), own)
    while not store.check([f"{PREFIX}members"]):
        _require_place(store.get(_place(rank)).decode(), own, rank)
        patience.wait(lambda: f"for other nodes than {rank}; {node0.describe()} is there")
    # Two may have entered for one place since node 0 looked: only one of them is a member.
    _require_place(_member(store, rank), own, rank)
    return None


def _member(store: dist.TCPStore, rank: int) -> str:
    """Look up who has started as node `rank`."""
    return json.loads(store.get(f"{PREFIX}members"))[rank]


def _require_place(holder: str, own: str, rank: int) -> None:
    """Raises ValueError where another node has this node's number."""
    if holder != own:
        raise ValueError(
            f"NODE_RANK = {rank}: must be this node's alone; {holder} has it, too. Fix: "
            "another NODE_RANK for each node."
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Hold back the C++ frames that torch prints before it raises; the error itself is caught."""
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
    return f"{PREFIX}node/{rank}"


def _signature() -> str:
    return f"{socket.gethostname()} (process {os.getpid()})"


def _nodes(ranks: list[int]) -> str:
    return f"{len(ranks)} node" + ("" if len(ranks) == 1 else "s")
