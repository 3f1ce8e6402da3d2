"""Hear of a request to stop: by a signal from train.sh, or from another node.

What one node is asked, all do: its launcher says so in the store, and the others hand the same
signal to their own train.sh, which then acts as if it had been asked itself.
"""

import json
import signal
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch.distributed as dist

from launch.store import LEFT, NNODES, OVER, STOP, Node0, connect, leave_store


class Interrupted(Exception):
    """Reports that this node is asked to stop, before its processes train."""

    def __init__(self, *, is_told: bool = False):
        """Report it.

        Args:
            is_told: whether the other nodes have been told.
        """
        super().__init__()
        self.is_told = is_told


@dataclass(frozen=True)
class Stop:
    """Describes who was asked to stop."""

    node_rank: int
    host: str
    number: int
    """The signal."""

    def describe(self) -> str:
        """Say it in a line for the users of the other nodes."""
        name = signal.Signals(self.number).name
        return f"node {self.node_rank} ({self.host}) is asked to stop ({name}): this node, too"


class HeardStop(Exception):
    """Reports that another node is asked to stop, before this one's processes train."""

    def __init__(self, stop: Stop):
        super().__init__(stop.describe())
        self.stop = stop


def announce_stop(store: dist.TCPStore, node_rank: int, number: int) -> Stop:
    """Tell whoever looks at the store that this node is asked to stop -> the first request."""
    stop = Stop(node_rank, socket.gethostname(), number)
    return Stop(**json.loads(store.compare_set(STOP, "", json.dumps(asdict(stop)))))


def read_stop(store: dist.TCPStore) -> Stop | None:
    """Read whether a node is asked to stop."""
    return Stop(**json.loads(store.get(STOP))) if store.check([STOP]) else None


def require_no_stop(store: dist.TCPStore, node_rank: int) -> None:
    """Leave the store where another node is asked to stop.

    Raises:
        HeardStop: one is.
    """
    stop = read_stop(store)
    if stop is not None and stop.node_rank != node_rank:
        if node_rank > 0:
            leave_unstarted(store, node_rank)
        raise HeardStop(stop)


def leave_unstarted(store: dist.TCPStore, node_rank: int) -> None:
    """Leave the store of a launch in which this node starts nothing.

    Node 0 may have counted it among those that have met, and would wait for its processes to end.
    """
    store.set(f"{OVER}/{node_rank}", "")
    store.add(LEFT, 1)


def part_as_node_0(store: dist.TCPStore, nnodes: int, number: int, seconds: float) -> None:
    """Tell the nodes that come within some seconds that node 0 is asked to stop."""
    store.set(NNODES, str(nnodes))
    announce_stop(store, 0, number)
    leave_store(store, 0, nnodes, seconds)


def part_as_other(node0: Node0, node_rank: int, number: int, seconds: float) -> None:
    """Look for node 0 for some seconds, and tell it that this node is asked to stop."""
    limit = time.monotonic() + seconds
    while True:
        store = connect(node0)
        if store is not None:
            with suppress(dist.DistError):  # it has just ended: another one may come
                announce_stop(store, node_rank, number)
                leave_unstarted(store, node_rank)
                return
        if time.monotonic() >= limit:
            return
        time.sleep(0.2)
