"""Bring the nodes of a run together before their processes train.

Node 0 opens torch's key-value store, and the others connect to it. Each node enters itself under
`node/RANK`; when all are there, node 0 writes the list of `members`, and everybody goes on. A node
that waits says from time to time for whom; what waiting cannot fix is refused in one line. A node
that is asked to stop meanwhile tells the others, which stop, too.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from launch.failures import Ending, Failure
from launch.outcome import NotMet, say
from launch.settings import Settings
from launch.stop import Interrupted, require_no_stop
from launch.store import (
    BEAT,
    ENDED,
    MEMBERS,
    NAME,
    NNODES,
    NPROC,
    PREFIX,
    REFUSED,
    Node0,
    connect,
    why_unreachable,
)
from launch.tether import StopAsked

REPORT_SECONDS = 10.0
"""The seconds between two lines of a node that waits."""
SOON_SECONDS = 2.0
"""The seconds before the first line of a node that waits for others to come."""
SHOWN_NODES = 16
"""Most nodes that a line names."""
POLL_SECONDS = 0.2
"""The seconds between two looks at the store."""
SUSPECT_SECONDS = 4.0
"""The seconds of silence after which a node that comes back takes its place to be free."""


COME = (
    "start the same command there with its NODE_RANK, look at MASTER_ADDR, MASTER_PORT and the "
    "firewall"
)
"""What to do where a node does not come."""


class Patience:
    """Waits for something, up to a limit in seconds, and says from time to time for what."""

    def __init__(
        self,
        limit: float,
        asked: StopAsked | None = None,
        *,
        remedy: str = COME,
        first_report: float = SOON_SECONDS,
    ):
        """Begin to wait.

        Args:
            limit: in seconds.
            asked: whether this node is asked to stop.
            remedy: what to do where the limit has passed.
            first_report: the seconds after which it is first said for what.
        """
        self.asked = asked
        self.remedy = remedy
        self.started = time.monotonic()
        self.limit = limit
        self.next_report = self.started + min(first_report, REPORT_SECONDS)

    def wait(self, for_what: Callable[[], str], seconds: float = POLL_SECONDS) -> None:
        """Sleep for some seconds, and report if a report is due.

        Raises:
            NotMet: the limit has passed.
            Interrupted: this node is asked to stop.
        """
        if self.asked is not None and self.asked.number is not None:
            raise Interrupted
        now = time.monotonic()
        waited = now - self.started
        if waited >= self.limit:
            raise NotMet(
                f"waited {waited:.0f} s {for_what()}. Fix: {self.remedy}, or raise JOIN_WAIT = "
                f"{self.limit:.0f}."
            )
        if now >= self.next_report:
            say(f"waiting {for_what()} ({waited:.0f} s of {self.limit:.0f})")
            self.next_report = now + REPORT_SECONDS
        time.sleep(seconds)


def meet_as_node_0(store: dist.TCPStore, settings: Settings, patience: Patience) -> str:
    """Wait until every other node has come -> the name of this launch.

    Raises:
        ValueError: a node was started with other settings.
        NotMet: one did not come in time.
        Interrupted, HeardStop: this node, or another one, is asked to stop.
    """
    # Enter this node, with what the others compare.
    nnodes = settings.nnodes
    name = launch_name()
    store.set(NAME, name)
    store.set(NPROC, str(settings.nproc_per_node))
    store.set(NNODES, str(nnodes))
    store.set(_place(0), _signature())
    places = [_place(rank) for rank in range(nnodes)]

    while not store.check(places):
        if store.check([REFUSED]):
            raise ValueError(store.get(REFUSED).decode())
        require_no_stop(store, 0)
        patience.wait(lambda: _describe_missing(store, nnodes))
    # From now on the meeting is over: whoever comes later waits for the next one.
    for rank in range(nnodes):
        store.set(f"{BEAT}{rank}", "0")
    members = [store.get(place).decode() for place in places]
    store.set(MEMBERS, json.dumps(members))
    return name


def launch_name() -> str:
    """Name a launch by its beginning."""
    return time.strftime("%Y%m%d-%H%M%S")


def _describe_missing(store: dist.TCPStore, nnodes: int) -> str:
    """Say for whom the nodes wait."""
    ranks = [rank for rank in range(nnodes) if not store.check([_place(rank)])]
    if not ranks:
        return "for node 0's word that all nodes are there"
    named = ", ".join(map(str, ranks[:SHOWN_NODES]))
    more = ", ..." if len(ranks) > SHOWN_NODES else ""
    return f"for {_nodes(ranks)} of {nnodes} (NODE_RANK {named}{more})"


def meet_as_other(node0: Node0, settings: Settings, patience: Patience) -> str:
    """Find node 0's store and wait there until every node has come -> the name of this launch.

    Raises:
        ValueError: node 0 has other settings, or another node has the same number.
        NotMet: that did not happen in time.
        Interrupted, HeardStop: this node, or another one, is asked to stop.
    """
    visit = _Visit(node0, settings, patience)
    while True:
        reason = why_unreachable(node0)
        if reason is None:
            reason = "it does not answer as a run that starts"
            store = connect(node0)
            if store is not None:
                with suppress(dist.DistError):  # node 0 ended meanwhile: try again
                    reason = visit.join(store)
                    if reason is None:
                        return store.get(NAME).decode()
        patience.wait(lambda reason=reason: f"for {node0.describe()}: {reason}", seconds=1.0)


class _Visit:
    """One node's way into the meeting."""

    def __init__(self, node0: Node0, settings: Settings, patience: Patience):
        self.node0 = node0
        self.settings = settings
        self.patience = patience
        self.rank = settings.node_rank
        # The last sign of life of whoever has this node's place, and since when it is the last.
        self._beat = b""
        self._beat_since = 0.0

    def join(self, store: dist.TCPStore) -> str | None:
        """Enter this node -> None once all have come, or why there is no place for it."""
        rank = self.rank
        nnodes = self.settings.nnodes
        self._require_same(store, "NNODES", NNODES, nnodes)
        is_over = store.check([MEMBERS])
        # A run that is told to stop while it is started for the first time here is another one.
        if not is_over or self.settings.number > 1:
            require_no_stop(store, rank)
        # A meeting that is over has no place left: this node was started again, or comes too late.
        if is_over:
            holder = _member(store, rank)
            if self._is_silent(store):
                self._end_launch_of(holder, store)
            return f"it has started with {holder} as node {rank}; it must start again"
        self._require_same(store, "NPROC_PER_NODE", NPROC, self.settings.nproc_per_node)
        # Enter, then wait for the others; a twin with the same number would overwrite the entry.
        own = _signature()
        store.set(_place(rank), own)
        while not store.check([MEMBERS]):
            require_no_stop(store, rank)
            _require_place(store.get(_place(rank)).decode(), own, rank)
            self.patience.wait(lambda: _describe_missing(store, nnodes))
        # Two may have entered one place since node 0 looked; only one of them is a member.
        _require_place(_member(store, rank), own, rank)
        return None

    def _require_same(self, store: dist.TCPStore, name: str, key: str, own: int) -> None:
        """Refuse settings that differ, here and, through the store, on node 0."""
        theirs = int(store.get(key))
        if theirs != own:
            text = (
                f"{name} = {own} on node {self.rank} ({socket.gethostname()}): must be that of "
                f"node 0, {theirs}. Fix: the same {name} on all nodes."
            )
            store.set(REFUSED, text)
            raise ValueError(text)

    def _is_silent(self, store: dist.TCPStore) -> bool:
        """Tell whether the node that has this one's place is gone."""
        beat = store.get(f"{BEAT}{self.rank}")
        if beat != self._beat:
            self._beat = beat
            self._beat_since = time.monotonic()
        return time.monotonic() - self._beat_since > SUSPECT_SECONDS

    def _end_launch_of(self, holder: str, store: dist.TCPStore) -> None:
        """Tell the others that the launch in which `holder` was this node goes on without it."""
        failure = Failure(f"its launcher, {holder}, is gone and has started again")
        ending = Ending(self.rank, socket.gethostname(), failure)
        store.compare_set(ENDED, "", ending.to_text())


def _member(store: dist.TCPStore, rank: int) -> str:
    """Look up who has started as node `rank`."""
    return json.loads(store.get(MEMBERS))[rank]


def _require_place(holder: str, own: str, rank: int) -> None:
    """Raise ValueError where another node has this node's number."""
    if holder != own:
        raise ValueError(
            f"NODE_RANK = {rank}: must be this node's alone; {holder} has it, too. Fix: "
            "another NODE_RANK for each node."
        )


def _place(rank: int) -> str:
    """Name the key under which node `rank` enters itself."""
    return f"{PREFIX}node/{rank}"


def _signature() -> str:
    """Describe this node so that no other one has the same description."""
    return f"{socket.gethostname()} (process {os.getpid()})"


def _nodes(ranks: list[int]) -> str:
    """Count nodes in words."""
    return f"{len(ranks)} node" + ("" if len(ranks) == 1 else "s")
