"""Rewinds for spikes: back to the last checkpoint, and past the data up to and with the spike.

As PaLM (arXiv 2204.02311, section 5.1) did by hand: its spikes came back with the same data on the
same weights, and not with other data. Each rewind is a line of a note in --save, which every later
start reads; that a run has passed over its window is in the ledger of its checkpoints. So a window
is passed over exactly once, whenever a process is killed.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from data.files import sync_path, write_atomically
from data.ledger import Window

FILE = "rewinds.json"


class RewindAsked(Exception):
    """Ends the run in order, so that it starts again from the last checkpoint."""


@dataclasses.dataclass(frozen=True)
class Rewind:
    """One rewind of a run."""

    number: int
    """Its number among the run's rewinds, from 1 on."""
    start: int
    """Consumed tokens from which on data are passed over."""
    end: int
    """Consumed tokens after the step that was the spike."""
    step: int
    """The step that was the spike."""
    reason: str

    @property
    def window(self) -> Window:
        """The data that every start passes over, unless its checkpoint has done so."""
        return Window(self.start, self.end, rewind=self.number)


def read_rewinds(save: str | None) -> tuple[Rewind, ...]:
    """Read the rewinds of the run in the --save folder; none where there is no note.

    Raises:
        ValueError: the note is not one of ours.
    """
    path = Path(save, FILE) if save else None
    if path is None or not path.exists():
        return ()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return tuple(Rewind(**entry) for entry in entries)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: is not a list of rewinds ({error}). Fix: remove it; the run then goes on "
            "through the data that it passed over."
        ) from None


def write_rewinds(save: str, rewinds: Sequence[Rewind]) -> None:
    """Write the note; it survives a power cut from here on."""
    path = Path(save, FILE)
    entries = [dataclasses.asdict(rewind) for rewind in rewinds]
    write_atomically(path, json.dumps(entries, indent=1))
    sync_path(path)
    sync_path(path.parent)


def plan_rewind(
    rewinds: Sequence[Rewind],
    passed: Sequence[int],
    *,
    step: int,
    end: int,
    skip_tokens: int,
    earliest: int,
    reason: str,
) -> Rewind:
    """Decide what the next rewind passes over.

    Windows begin in the order of their numbers: one that begins before an earlier one would move
    the data that the earlier one was about.

    Args:
        passed: numbers of the rewinds that the ledger has passed over; another run's may be among
            them, from which this one was started.
        end: consumed tokens after the spike.
        skip_tokens: the most that is passed over.
        earliest: consumed tokens before which no window begins: at the start of the phase, which is
            saved, and after it where --skip-data has passed over data.
    """
    known = [rewind.number for rewind in rewinds]
    number = 1 + max([*known, *passed], default=0)
    start = max([end - skip_tokens, earliest, *(rewind.start for rewind in rewinds)])
    start = min(start, end)
    return Rewind(number, start, end, step, reason)
