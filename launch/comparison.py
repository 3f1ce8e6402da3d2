"""Compare what surrounds the nodes, through the store of the meeting, before their processes train.

Each node leaves what it has gathered under its number. Node 0 judges, shows a short table, and
leaves its verdict, which all read: they go on together, or say the same lines and end.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch.distributed as dist

from launch.meeting import Patience
from launch.outcome import say
from launch.store import CLOCK, FACTS, MARK, VERDICT
from launch.surroundings import (
    CLOCK_SECONDS,
    SHOWN_LINES,
    Surroundings,
    judge,
    leave_mark,
    mark_problem,
    name_nodes,
)

POLL_SECONDS = 0.1
"""The seconds between two looks at the store."""
SHOWN_ADDRESSES = 4
"""Most addresses that the table names."""


@dataclass
class Comparison:
    """One node's part in the comparison."""

    node_rank: int
    nnodes: int
    save: Path | None
    """Where the run saves."""
    own: Callable[[], Surroundings | None]
    """Gives what this node has gathered; None while it is not complete."""
    mark: str = ""
    """The file that node 0 has left where it saves."""
    clock_ahead: float | None = None
    """Seconds that this node's clock is ahead of node 0's; None before it is known."""
    store: dist.TCPStore = field(init=False)
    """That of the meeting, on node 0."""
    _clock: bytes = b""
    _has_told: bool = False

    def wait(
        self,
        connection: Callable[[], dist.TCPStore],
        patience: Patience,
        require_company: Callable[[], None],
    ) -> list[Surroundings]:
        """Tell and hear, until node 0 has judged -> all nodes on node 0, nothing on the others.

        Args:
            connection: gives the connection to node 0; another one where the last was lost.
            require_company: raises where there is nothing left to compare.

        Raises:
            ValueError: the nodes do not fit together, a line for each reason.
            NotMet: a node did not tell in time.
        """
        while True:
            try:
                self.store = connection()
                return self._wait(patience, require_company)
            except dist.DistError:
                require_company()
                patience.wait(lambda: "for the connection to node 0", POLL_SECONDS)

    def _wait(self, patience: Patience, require_company: Callable[[], None]) -> list[Surroundings]:
        """Do it through one connection; raise DistError where that is lost."""
        if self.node_rank == 0:
            self.mark = "" if self.save is None else leave_mark(self.save)
            self.store.set(MARK, self.mark)
        nodes: list[Surroundings] = []
        try:
            while not self.store.check([VERDICT]):
                require_company()
                self._tell()
                if self.node_rank == 0:
                    nodes = self._judge()
                if not nodes:
                    patience.wait(self._describe_missing, POLL_SECONDS)
            problems = json.loads(self.store.get(VERDICT))
        finally:
            if self.node_rank == 0 and self.mark:
                Path(self.mark).unlink(missing_ok=True)
        if problems:
            raise ValueError("\n".join(problems))
        return nodes

    def _tell(self) -> None:
        """Leave what this node has gathered, once it is complete."""
        if self.node_rank == 0:
            self.store.set(CLOCK, str(time.time()))
            self.clock_ahead = 0.0
        elif self.clock_ahead is None:
            self._read_clock()
        if self._has_told or self.clock_ahead is None or not self.store.check([MARK]):
            return
        found = self.own()
        if found is None:
            return
        problems = list(found.problems)
        if self.save is not None and self.node_rank > 0:
            problem = mark_problem(self.save, self.store.get(MARK).decode())
            problems += [] if problem is None else [problem]
        found = replace(found, problems=problems, clock_ahead=self.clock_ahead)
        self.store.set(f"{FACTS}{self.node_rank}", found.to_text())
        self._has_told = True

    def _read_clock(self) -> None:
        """Compare the clocks at the moment at which node 0 has just written its own."""
        if not self.store.check([CLOCK]):
            return
        clock = self.store.get(CLOCK)
        if self._clock and clock != self._clock:
            self.clock_ahead = time.time() - float(clock)
        self._clock = clock

    def _judge(self) -> list[Surroundings]:
        """Judge on node 0 once all have told -> the nodes."""
        keys = [f"{FACTS}{rank}" for rank in range(self.nnodes)]
        if not self.store.check(keys):
            return []
        nodes = [Surroundings.from_text(text) for text in self.store.multi_get(keys)]
        self.store.set(VERDICT, json.dumps(judge(nodes)))
        return nodes

    def _describe_missing(self) -> str:
        """Say for whom the nodes wait."""
        missing = [rank for rank in range(self.nnodes) if not self.store.check([f"{FACTS}{rank}"])]
        if not missing:
            return "for node 0 to compare the nodes"
        named = ", ".join(map(str, missing[:SHOWN_LINES]))
        more = ", ..." if len(missing) > SHOWN_LINES else ""
        return f"for NODE_RANK {named}{more} to import torch and look at its surroundings"


# ---------------------------------------------------------------- the table


def show(nodes: Sequence[Surroundings], nproc_per_node: int, meeting: str, save: str) -> None:
    """Print the table of what surrounds the nodes, and a line for each that differs."""
    first = nodes[0]
    say(f"{len(nodes)} nodes with {nproc_per_node} processes each fit together:")
    rows = {
        "meeting": meeting,
        "addresses": _addresses(nodes),
        "GPUs": first.gpu_names,
        "software": first.software,
        **first.run.shown,
        "clocks": _clocks(nodes),
    }
    if save:
        free = [node.free_bytes for node in nodes if node.free_bytes is not None]
        rows["save"] = f"{save}: one folder for all, {_gib(min(free, default=0))} free"
    width = max(map(len, rows))
    for name, text in rows.items():
        say(f"  {name:{width}}  {text}")
    for line in _unlike(nodes):
        say(f"  {line}")


def _addresses(nodes: Sequence[Surroundings]) -> str:
    shown = ", ".join(node.address for node in nodes[:SHOWN_ADDRESSES])
    more = len(nodes) - SHOWN_ADDRESSES
    return f"{shown}, ... and {more} more" if more > 0 else shown


def _clocks(nodes: Sequence[Surroundings]) -> str:
    """Say how far the clocks are apart, with a warning where logs would mislead."""
    ahead = [node.clock_ahead for node in nodes]
    span = max(ahead) - min(ahead)
    if span <= CLOCK_SECONDS:
        return f"at most {span:.1f} s apart"
    far = max(range(len(nodes)), key=lambda rank: abs(ahead[rank]))
    hosts = [node.host for node in nodes]
    return (
        f"warning: {span:.1f} s apart: {name_nodes([far], hosts)} is {ahead[far]:+.1f} s from node "
        "0, so that times in logs mislead (see chronyc or timedatectl)"
    )


def _unlike(nodes: Sequence[Surroundings]) -> list[str]:
    """Name the nodes whose GPUs or software are not node 0's, alike ones in one line."""
    hosts = [node.host for node in nodes]
    found: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        for name in ("gpu_names", "software"):
            if getattr(node, name) != getattr(nodes[0], name):
                found.setdefault(getattr(node, name), []).append(rank)
    lines = [
        f"warning: {name_nodes(ranks, hosts)} differs: {text}" for text, ranks in found.items()
    ]
    return lines[:SHOWN_LINES]


def _gib(size: int) -> str:
    return f"{size / 2**30:,.0f} GiB"
