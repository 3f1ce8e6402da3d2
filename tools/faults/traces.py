"""What a kill left behind, and so what the run was doing when it came.

A kill that was meant for a save may come a millisecond late. What is on disk right after it is the
truth: a folder half-written, a manifest without its pointer, an index file half-made.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pretrain.checkpointing.folders import LATEST, MANIFEST, complete_steps, read_pointer

Kind = Literal["start", "index", "step", "copy", "write", "publish", "retention", "crossing"]

KINDS: tuple[Kind, ...] = (
    "start",
    "index",
    "step",
    "copy",
    "write",
    "publish",
    "retention",
    "crossing",
)
"""What a run may be doing when it is killed: coming up, making an index of the data, training,
copying the state for a save, writing that, giving it its name, deleting an old one, starting again
on another layout."""


@dataclass(frozen=True)
class Traces:
    """The unfinished work in a run's folders at one moment."""

    pointer: int | None
    """The step that the text file names; None where nothing is published."""
    newest: int | None
    """The last step with a whole folder."""
    written: frozenset[tuple[str, int]]
    """Folders of saves that are not published, and when each last changed (ns)."""
    finished: frozenset[tuple[str, int]]
    """Those of them that have their manifest."""
    replacing: frozenset[tuple[str, int]]
    """Texts that were to become the pointer."""
    deleted: frozenset[tuple[str, int]]
    """Checkpoints that are hidden to be deleted."""
    indices: frozenset[tuple[str, int]] = field(default_factory=frozenset)
    """Files of indices that are not whole."""


def published_step(save: Path) -> int | None:
    """Read which step is published; None where none is."""
    try:
        return read_pointer(save)
    except ValueError:
        return None  # damaged, or gone between two looks


def read_traces(save: Path, cache: Path | None) -> Traces:
    """Look at a run's folders now."""
    hidden = _marked(save, ".iter_*")
    partial = {mark for mark in hidden if mark[0].endswith(".partial")}
    whole = complete_steps(save)
    return Traces(
        pointer=published_step(save),
        newest=whole[0] if whole else None,
        written=frozenset(partial),
        finished=frozenset(mark for mark in partial if (save / mark[0] / MANIFEST).is_file()),
        replacing=frozenset(_marked(save, f".{LATEST}.partial*")),
        deleted=frozenset(hidden - partial),
        indices=frozenset(_marked(cache, ".*.partial.*") if cache else ()),
    )


def _marked(folder: Path, pattern: str) -> set[tuple[str, int]]:
    """Find names, each with the time of its last change: an old one does not count twice."""
    found = set()
    for path in folder.glob(pattern):
        try:
            found.add((path.name, os.stat(path).st_ctime_ns))
        except FileNotFoundError:
            continue
    return found


def name_kind(before: Traces, after: Traces, *, begun: Kind | None, is_due: bool) -> Kind:
    """Say what a run was doing when it was killed.

    Args:
        before: what earlier kills left.
        after: what this one left.
        begun: "start" or "crossing" where no step of this launch was trained; None in the steps.
        is_due: the last step is followed by a save that is not published.
    """
    if after.indices - before.indices:
        return "index"
    if begun is not None:
        return begun
    if after.deleted - before.deleted:
        return "retention"
    is_named = after.newest is not None and after.newest > (after.pointer or -1)
    if after.finished - before.finished or after.replacing - before.replacing or is_named:
        return "publish"
    if after.written - before.written:
        return "write"
    return "copy" if is_due else "step"
