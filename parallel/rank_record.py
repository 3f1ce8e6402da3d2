"""What a rank does right now, in a small file that another process can read at any time.

The file is mapped into memory, so that a note costs about a microsecond and is there for a reader
also when this process is stopped, stuck or gone. It describes itself: a line of JSON says what the
rank is and how the numbers after it are laid out, which `launch/rank_view.py` reads without
importing this file.

    [0, HEADER_BYTES)   JSON, ended by a newline
    then                the state: one number or word per row of STATE
    then                one slot of SLOT's rows for each name of "slots" in the JSON

Times are nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share.
"""

import json
import mmap
import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER_BYTES = 8192
MOST_SLOTS = 32
STATE = {
    "step": "q",
    "activity": "48s",
    "activity_began": "q",
    "patience": "d",
    "life": "q",
    "longest_gap": "q",
    "waits_in": "q",
    "waits_since": "q",
    "waits_op": "24s",
    "waits_number": "q",
    "waits_peer": "q",
}
"""Name -> format of each row of the state.

`patience` are the seconds that the activity may take without a sign of life, 0 = the usual ones;
`waits_in` is the slot of the collective that the rank waits in, -1 = none.
"""
WAITS = struct.Struct("<" + "".join(form for name, form in STATE.items() if "waits" in name))
"""The rows of a wait, which stand together: in one piece, since they are written most often."""
SLOT = {"op": "24s", "number": "q", "bytes": "q", "begun": "q", "ended": "q", "peer": "q"}
"""Name -> format of each row of a slot: the last collective of one axis.

`ended` is 0 while it has not returned; `peer` is the global rank of a send or receive, else -1.
"""
NOT_WAITING = -1
NO_PEER = -1


@dataclass(frozen=True)
class SlotName:
    """Names a slot, and the ranks of its group where they are evenly spaced."""

    name: str
    ranks: tuple[int, ...]
    counts_alike: bool
    """Do all ranks of the group begin the same collectives? Not where pairs send and receive."""

    def describe(self) -> dict[str, Any]:
        """Return what the header says of it; uneven groups are written out."""
        first = self.ranks[0]
        step = self.ranks[1] - first if len(self.ranks) > 1 else 1
        even = list(range(first, first + step * len(self.ranks), step))
        described: dict[str, Any] = {"name": self.name, "counts_alike": self.counts_alike}
        if even == list(self.ranks):
            return described | {"first": first, "step": step, "count": len(self.ranks)}
        return described | {"ranks": list(self.ranks)}


class RankRecord:
    """Writes this rank's record; without a path into memory that nobody else reads.

    Attributes:
        waited: nanoseconds that this rank has waited in collectives.
        gaps: longest nanoseconds between two signs of life, by activity.
    """

    def __init__(self, path: Path | None = None, **about: Any):
        """Make the record.

        Args:
            about: further words of the header, such as the rank.
        """
        self._about = about | {"host": socket.gethostname(), "pid": os.getpid()}
        self._slots: list[SlotName] = []
        self._state_at = _offsets(STATE, HEADER_BYTES)
        self._slot = struct.Struct("<" + "".join(SLOT.values()))
        self._slots_at = HEADER_BYTES + struct.calcsize("<" + "".join(STATE.values()))
        self._ended_at = _offsets(SLOT, 0)["ended"]
        size = self._slots_at + MOST_SLOTS * self._slot.size
        self._map = _open_map(path, size)
        self._life = time.monotonic_ns()
        self._longest_gap = 0
        self._counts_gaps = False
        self._activity = ""
        self.waited = 0
        self.gaps: dict[str, int] = {}
        self._describe()
        self.set(waits_in=NOT_WAITING, waits_peer=NO_PEER)
        self.enter("starting", patience=0.0, counts_gaps=False)

    # ------------------------------------------------------------ what the rank is

    def tell(self, **about: Any) -> None:
        """Add words to the header: what is known only later."""
        self._about |= about
        self._describe()

    def add_slot(self, name: str, ranks: Sequence[int], *, counts_alike: bool) -> int:
        """Add a slot for the collectives of a group -> its number."""
        assert len(self._slots) < MOST_SLOTS, [slot.name for slot in self._slots]
        self._slots.append(SlotName(name, tuple(ranks), counts_alike))
        self._describe()
        return len(self._slots) - 1

    def drop_slots(self) -> None:
        """Forget all groups: the processes part."""
        self._slots = []
        self.set(waits_in=NOT_WAITING)
        self._describe()

    def _describe(self) -> None:
        about = self._about | {
            "state": STATE,
            "slot": SLOT,
            "header_bytes": HEADER_BYTES,
            "slots": [slot.describe() for slot in self._slots],
        }
        text = json.dumps(about).encode() + b"\n"
        if len(text) > HEADER_BYTES:
            # Only uneven groups are that long: without their ranks nobody knows who is missing.
            for slot in about["slots"]:
                slot.pop("ranks", None)
            text = json.dumps(about).encode() + b"\n"
        self._map[: len(text)] = text

    # ------------------------------------------------------------ what it does

    def set(self, **values: Any) -> None:
        """Write rows of the state."""
        for name, value in values.items():
            struct.pack_into("<" + STATE[name], self._map, self._state_at[name], value)

    def enter(self, activity: str, *, patience: float, counts_gaps: bool) -> None:
        """Note what the rank does from now on.

        Args:
            patience: seconds that it may take without a sign of life; 0 = the usual ones.
            counts_gaps: do its silences say what is usual?
        """
        self.sign()
        self._activity = activity
        self._counts_gaps = counts_gaps
        self.set(activity=activity.encode(), activity_began=self._life, patience=patience)

    def sign(self) -> None:
        """Give a sign of life."""
        now = time.monotonic_ns()
        gap = now - self._life
        if gap > self.gaps.get(self._activity, 0):
            self.gaps[self._activity] = gap
        if gap > self._longest_gap and self._counts_gaps:
            self._longest_gap = gap
            self.set(longest_gap=gap)
        self._live(now)

    def _live(self, now: int) -> None:
        self._life = now
        struct.pack_into("<q", self._map, self._state_at["life"], now)

    # ------------------------------------------------------------ its collectives

    def begin(self, slot: int, op: bytes, number: int, num_bytes: int, peer: int = NO_PEER) -> None:
        """Note that a collective begins."""
        self.sign()
        at = self._slots_at + slot * self._slot.size
        self._slot.pack_into(self._map, at, op, number, num_bytes, self._life, 0, peer)

    def wait(self, slot: int, op: bytes, number: int, peer: int = NO_PEER) -> int:
        """Note that the rank waits for a collective -> the time."""
        self.sign()
        WAITS.pack_into(self._map, self._state_at["waits_in"], slot, self._life, op, number, peer)
        return self._life

    def end_wait(self, slot: int, since: int) -> None:
        """Note that the wait is over."""
        now = time.monotonic_ns()
        self.waited += now - since
        struct.pack_into("<q", self._map, self._state_at["waits_in"], NOT_WAITING)
        at = self._slots_at + slot * self._slot.size + self._ended_at
        struct.pack_into("<q", self._map, at, now)
        # How long others took is no gap of this rank's.
        self._live(now)

    def close(self) -> None:
        """Close the mapping; the file stays for whoever made its folder."""
        self._map.close()


def _open_map(path: Path | None, size: int) -> mmap.mmap:
    if path is None:
        return mmap.mmap(-1, size)
    with open(path, "w+b") as file:
        file.truncate(size)
        return mmap.mmap(file.fileno(), size)


def _offsets(rows: dict[str, str], start: int) -> dict[str, int]:
    """Return where each row begins, without gaps between them."""
    offsets = {}
    for name, form in rows.items():
        offsets[name] = start
        start += struct.calcsize("<" + form)
    return offsets
