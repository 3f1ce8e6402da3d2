"""What a run was asked to do and how far it is, so that a later one continues, or begins again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from data.writers.resumable_writer import ResumableWriter
from tools.preprocessing.encoders import Result, Task, TextCounts

Plan = dict[str, Any]
"""What decides the bytes of the output, as JSON."""


def make_plan(files: Sequence[Path], arguments: dict[str, Any]) -> Plan:
    """Describe what decides the bytes of the output: `arguments`, and the input files.

    A file counts by path, size and time, and all of them as one checksum: a list of a million would
    be written again with every save.
    """
    # Not the content: it may be terabytes.
    digest = xxhash.xxh3_128()
    total = 0
    for path in files:
        status = path.stat()
        total += status.st_size
        line = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return {
        "input_files": len(files),
        "input_bytes": total,
        "inputs": digest.hexdigest(),
    } | arguments


def describe_change(old: Plan, new: Plan) -> str:
    """Say in a few words why work done for the plan `old` is useless for `new`; else empty."""
    # The checksum last: counts say more.
    for name in sorted(old.keys() | new.keys(), key=lambda name: name == "inputs"):
        before = old.get(name)
        now = new.get(name)
        if before == now:
            continue
        if name == "inputs":
            return "an input file has another name, size or time"
        if isinstance(before, dict) and isinstance(now, dict):  # the tokenizer
            name, before, now = next(
                (f"{name}.{key}", before.get(key), now.get(key))
                for key in sorted(before.keys() | now.keys())
                if before.get(key) != now.get(key)
            )
        return f"{name} was {before}, now {now}"
    return ""


@dataclass
class CorpusProgress:
    """Counts what of the input is done; its fields are those of P.progress.json."""

    next: tuple[int, int] = (0, 0)
    """Number of the file, and in it of the piece, after the last that is done."""
    done: int = 0
    """Bytes of input files."""
    empty: int = 0
    """Documents without text, which are left out."""
    bad: int = 0
    """Lines and rows that could not be read, which are left out."""
    text: TextCounts = field(default_factory=TextCounts)

    def add(self, task: Task, result: Result) -> None:
        """Count one task as done."""
        self.next = task.next
        self.done += task.size
        self.empty += result.empty
        self.bad += result.bad
        self.text.add(result.text)


def continue_or_begin(
    writer: ResumableWriter, plan: Plan, *, skip_bad: bool, empty_files: int
) -> CorpusProgress:
    """Restore what an earlier run with the same plan left; else begin again, and say why.

    Args:
        skip_bad: --skip-bad-lines of this run.
        empty_files: input files of no bytes, which count as empty documents.
    """
    # Nothing to continue from, or nothing that can be continued: what lies there is removed.
    fresh = CorpusProgress(empty=empty_files)
    name = f"{writer.prefix}.progress.json"
    note = writer.saved()
    if note is None:
        writer.discard()
        return fresh
    change = describe_change(note["plan"], plan)
    if not change and note["bad"] and not skip_bad:
        change = "skip_bad_lines was True, now False"
    if change:
        print(f"{name}: begins again, since {change}", flush=True)
        writer.discard()
        return fresh
    writer.restore()
    print(
        f"{name}: goes on after {note['done']:,} of {plan['input_bytes']:,} bytes, "
        f"{writer.num_documents:,} documents",
        flush=True,
    )
    # Notes of older versions have no counts of texts.
    text = TextCounts(**note.get("text", {}))
    return CorpusProgress(tuple(note["next"]), note["done"], note["empty"], note["bad"], text)
