"""Read what the ranks of this node do: from their records, and from the kernel.

A record is the file that parallel/rank_record.py writes. It describes its own layout, so that this
side needs only the names.
"""

import dataclasses
import json
import socket
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STOPPED = "T"
"""The kernel's letter for a process that a signal has stopped."""
IN_DEVICE = "D"
"""The kernel's letter for a process that waits for a disk or a driver and hears no signal."""
GONE = ("Z", "X", "")
"""Letters of processes that have ended, and what we say of one that is not there."""


@dataclass(frozen=True)
class Collective:
    """The last collective that a rank began on one axis."""

    axis: str
    op: str
    number: int
    num_bytes: int
    has_ended: bool
    begun_seconds: float
    """Seconds since it began."""
    peer: int
    """The other rank of a send or receive, else -1."""
    counts_alike: bool
    ranks: list[int]
    """Global ranks of the axis; empty where they are not known."""


@dataclass(frozen=True)
class Wait:
    """The collective that a rank waits in."""

    axis: str
    op: str
    number: int
    peer: int
    seconds: float


@dataclass(frozen=True)
class RankView:
    """What a rank does, as seen at one moment."""

    rank: int
    host: str
    pid: int
    node: int
    process_state: str
    """The kernel's letter."""
    stopped_seconds: float
    """Seconds for which it has been seen stopped; 0 = it is not."""
    step: int
    activity: str
    activity_seconds: float
    patience: float
    """Seconds that the activity may take without a sign of life; 0 = the usual ones."""
    silence: float
    """Seconds since the last sign of life."""
    longest_gap: float
    """Seconds of the longest usual silence so far."""
    watchdog_seconds: float | None
    """The limit that the user set; None = not known yet."""
    slow_seconds: float
    """Seconds that what may be slow may take."""
    device: str
    wait: Wait | None
    collectives: list[Collective] = field(default_factory=list)

    @property
    def is_stopped(self) -> bool:
        return self.process_state == STOPPED

    @property
    def name(self) -> str:
        """Name the rank with its host and process."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RankView":
        """Make it of plain values."""
        wait = values["wait"]
        return cls(
            **values
            | {
                "wait": None if wait is None else Wait(**wait),
                "collectives": [Collective(**each) for each in values["collectives"]],
            }
        )


def read_ranks(folder: Path, node: int) -> list[RankView]:
    """Read the records of all ranks that have written one, in the order of the ranks."""
    views = []
    for path in folder.glob("rank*"):
        if path.suffix:
            continue
        try:
            views.append(read_record(path.read_bytes(), node))
        except (OSError, ValueError, struct.error):
            continue  # it is being made: the next look finds it
    return sorted(views, key=lambda view: view.rank)


def find_starting(folder: Path, node: int) -> list[RankView]:
    """Find the processes that this one has started and that have no record yet.

    They still import their packages; the kernel alone knows what they do.
    """
    views = []
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:  # a thread that has just ended
            continue
        for word in children:
            pid = int(word)
            environment = _environment(pid)
            rank = environment.get("RANK")
            if environment.get("ITHACA_RECORDS") != str(folder) or rank is None:
                continue
            if not (folder / f"rank{rank}").exists():
                views.append(_starting(int(rank), pid, node))
    return views


def _starting(rank: int, pid: int, node: int) -> RankView:
    return RankView(
        rank=rank,
        host=socket.gethostname(),
        pid=pid,
        node=node,
        process_state=process_state(pid),
        stopped_seconds=0.0,
        step=0,
        activity="importing its packages",
        activity_seconds=0.0,
        patience=0.0,
        silence=0.0,
        longest_gap=0.0,
        watchdog_seconds=None,
        slow_seconds=0.0,
        device="",
        wait=None,
    )


def _environment(pid: int) -> dict[str, str]:
    """Read the environment that a process was started with; empty where it is gone."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in content.split("\0") if "=" in line)


def read_record(content: bytes, node: int, now: int | None = None) -> RankView:
    """Read one record.

    Args:
        now: nanoseconds of CLOCK_MONOTONIC at which its ages count.
    """
    about = json.loads(content[: content.index(b"\n")])
    now = time.monotonic_ns() if now is None else now
    state, end = _read_rows(content, about["state"], about["header_bytes"])
    collectives = []
    for slot in about["slots"]:
        found, end = _read_rows(content, about["slot"], end)
        collectives.append(_collective(slot, found, now))
    pid = about["pid"]
    waits_in = state["waits_in"]
    wait = None
    if 0 <= waits_in < len(collectives):
        wait = Wait(
            collectives[waits_in].axis,
            state["waits_op"],
            state["waits_number"],
            state["waits_peer"],
            _age(state["waits_since"], now),
        )
    return RankView(
        rank=about["rank"],
        host=about["host"],
        pid=pid,
        node=node,
        process_state=process_state(pid),
        stopped_seconds=0.0,
        step=state["step"],
        activity=state["activity"],
        activity_seconds=_age(state["activity_began"], now),
        patience=state["patience"],
        silence=_age(state["life"], now),
        longest_gap=state["longest_gap"] / 1e9,
        watchdog_seconds=about.get("watchdog_seconds"),
        slow_seconds=about.get("slow_seconds", 0.0),
        device=about.get("device", ""),
        wait=wait,
        # One that never began says nothing.
        collectives=[each for each in collectives if each.number],
    )


def _collective(slot: dict[str, Any], found: dict[str, Any], now: int) -> Collective:
    ranks = slot.get("ranks", [])
    if "count" in slot:
        first = slot["first"]
        step = slot["step"]
        ranks = list(range(first, first + step * slot["count"], step))
    return Collective(
        axis=slot["name"],
        op=found["op"],
        number=found["number"],
        num_bytes=found["bytes"],
        has_ended=found["ended"] != 0,
        begun_seconds=_age(found["begun"], now),
        peer=found["peer"],
        counts_alike=slot["counts_alike"],
        ranks=ranks,
    )


def _read_rows(content: bytes, rows: dict[str, str], at: int) -> tuple[dict[str, Any], int]:
    """Read values by name -> them, and where they end."""
    form = struct.Struct("<" + "".join(rows.values()))
    values = form.unpack_from(content, at)
    texts = [
        value.rstrip(b"\0").decode(errors="replace") if isinstance(value, bytes) else value
        for value in values
    ]
    return dict(zip(rows, texts, strict=True)), at + form.size


def _age(then: int, now: int) -> float:
    """Return the seconds from one reading of the clock to another."""
    return max(0.0, (now - then) / 1e9)


def process_state(pid: int) -> str:
    """Ask the kernel for a process's state letter; empty where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.rsplit(")", 1)[1].split()[0]  # a name may hold spaces and ")"
