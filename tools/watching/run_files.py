"""Read the ends of the files that a run writes, while it writes them.

A run of a year has a metrics.jsonl of gigabytes: only the last bytes of each file are read, and
whatever cannot be read now is read at the next look. Imports no torch.
"""

import json
import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.rank_view import GONE, RankView, process_state, read_ranks
from pretrain.logs.run_facts import RunFacts

TAIL_BYTES = 1 << 18
"""Bytes from the end of a file that are read: some 500 steps."""
HOLDER = re.compile(r"process (\d+) on (.*)")
"""What a run writes into the .lock file of its folder."""

Record = dict[str, Any]
"""A line of one of the files."""


@dataclass(frozen=True)
class RunFiles:
    """Holds what a run's folder says at one moment; what is missing is empty."""

    folder: Path
    exists: bool = True
    facts: RunFacts | None = None
    steps: list[Record] = field(default_factory=list)
    """The last ones."""
    step_time: float | None = None
    """Seconds since 1970 at which metrics.jsonl was last written."""
    evaluations: list[Record] = field(default_factory=list)
    evaluation_time: float | None = None
    events: list[Record] = field(default_factory=list)
    errors: str | None = None
    """The newest entry of errors/."""
    errors_time: float | None = None
    holder: str | None = None
    """Who holds, or last held, the folder's lock."""
    holder_is_gone: bool = False
    """Is that a process of this machine that has ended?"""
    ranks: list[RankView] = field(default_factory=list)
    """What the ranks do that run on this machine, where they tell."""


def read_files(folder: Path) -> RunFiles:
    """Look at a run's folder.

    Raises:
        ValueError: it is a file.
        OSError: it may not be read.
    """
    if not folder.exists():
        return RunFiles(folder, exists=False)
    if not folder.is_dir():
        raise ValueError(
            f"folder = {folder}: is not a folder. Fix: give the --save folder of a run."
        )
    os.listdir(folder)  # a folder that may not be read is no empty one
    facts = _read_facts(folder)
    errors = _newest(folder / "errors")
    holder = _read_holder(folder)
    return RunFiles(
        folder,
        facts=facts,
        steps=_with_keys(read_tail(folder / "metrics.jsonl"), "step", "tokens", "phase"),
        step_time=time_of(folder / "metrics.jsonl"),
        evaluations=_with_keys(read_tail(folder / "validation.jsonl"), "step"),
        evaluation_time=time_of(folder / "validation.jsonl"),
        events=_with_keys(read_tail(folder / "events.jsonl"), "time", "event", "step"),
        errors=errors.name if errors else None,
        errors_time=time_of(errors) if errors else None,
        holder=holder,
        holder_is_gone=_is_gone(holder),
        ranks=_read_ranks(facts),
    )


def read_tail(path: Path, most_bytes: int = TAIL_BYTES) -> list[Record]:
    """Read the whole lines among the last bytes of a .jsonl file; none where there is no file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = max(0, size - most_bytes)
            file.seek(begin)
            lines = file.read().split(b"\n")
    except OSError:
        return []
    # The first line may have lost its beginning, and the last one may not be written yet.
    if begin:
        lines = lines[1:]
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def time_of(path: Path) -> float | None:
    """Return when a file was last written; None where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _with_keys(records: list[Record], *keys: str) -> list[Record]:
    """Leave out lines that are not the trainer's."""
    return [record for record in records if all(key in record for key in keys)]


def _read_facts(folder: Path) -> RunFacts | None:
    try:
        return RunFacts.read(folder)
    except (ValueError, OSError):
        return None  # another version's: what it would tell is left out


def _newest(folder: Path) -> Path | None:
    """Find the newest entry of a folder; None where there is none."""
    try:
        entries = [(path.stat().st_mtime, path) for path in folder.iterdir()]
    except OSError:
        return None
    return max(entries)[1] if entries else None


def _read_holder(folder: Path) -> str | None:
    try:
        text = (folder / ".lock").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text if HOLDER.fullmatch(text) else None


def _is_gone(holder: str | None) -> bool:
    """Tell whether a process of this machine has ended; of other machines nothing is known."""
    found = HOLDER.fullmatch(holder or "")
    if found is None or found[2] != socket.gethostname():
        return False
    return process_state(int(found[1])) in GONE


def _read_ranks(facts: RunFacts | None) -> list[RankView]:
    """Read what the ranks do, where they run on this machine and a launcher watches them."""
    if facts is None or facts.records is None or facts.host != socket.gethostname():
        return []
    return read_ranks(Path(facts.records), 0)
