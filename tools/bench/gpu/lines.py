"""What a lease measures, one JSON line per figure, appended at once: what is written survives
whatever follows."""

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Literal

FIX = "Fix: give the lines.jsonl that the lease wrote."
Kind = Literal["measured", "scaled", "calculated", "failed", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure, or why there is none."""

    item: str
    case: str = ""
    """What of the item is measured, such as the kernel; "" stands for the whole item."""
    figure: str = ""
    """What is measured; "" where the whole case failed or was skipped."""
    value: float | str | None = None
    unit: str = ""
    kind: Kind = "measured"
    """scaled: from runs with fewer layers. calculated: from other figures."""
    note: str = ""
    """Why there is no value, or what the reader has to know about it."""
    seconds: float
    """Time from the start of the item's process."""
    card: str
    torch: str
    scale: str
    date: str
    """When the item's process was started, UTC: the same in all lines of one run of it."""


def append(path: Path, line: Line) -> None:
    """Write one line to the end of the file, and close it.

    A line that an earlier process could not end stays a line of its own.
    """
    text = json.dumps(asdict(line), ensure_ascii=False) + "\n"
    with open(path, "a+b") as file:
        # A last line without an end gets it first.
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())


def read_lines(path: Path) -> list[Line]:
    """Read a file's lines; those that were cut off are left out.

    Raises:
        ValueError: the file holds something else, with the number of the line.
    """
    # Lines of another version may have further fields.
    known = {field.name for field in fields(Line)}
    texts = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, text in enumerate(texts, 1):
        try:
            values = json.loads(text)
            found.append(Line(**{name: values[name] for name in values.keys() & known}))
        except json.JSONDecodeError:
            # Its process was killed while it wrote.
            continue
        except (TypeError, AttributeError) as error:
            raise ValueError(f"line {number} is not one of a lease ({error}). {FIX}") from error
    if texts and not found:
        raise ValueError(f"none of its {len(texts)} lines is one of a lease. {FIX}")
    return found


def now() -> str:
    """Spell the time as lines hold it."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"


def first_line(error: Exception) -> str:
    """Spell an exception as one short line."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]


class Report:
    """Append an item's figures to the file of lines."""

    def __init__(
        self, path: Path, item: str, scale: str, *, date: str, card: str = "", torch: str = ""
    ):
        self.path = path
        self.item = item
        self.scale = scale
        self.date = date
        self.card = card
        self.torch = torch
        self.start = perf_counter()

    def add(
        self,
        figure: str,
        value: float | str | None,
        unit: str = "",
        *,
        case: str = "",
        kind: Kind = "measured",
        note: str = "",
    ) -> None:
        """Append one figure."""
        line = Line(
            item=self.item,
            case=case,
            figure=figure,
            value=value,
            unit=unit,
            kind=kind,
            note=note,
            seconds=round(perf_counter() - self.start, 3),
            card=self.card,
            torch=self.torch,
            scale=self.scale,
            date=self.date,
        )
        append(self.path, line)

    def fail(self, reason: str, *, case: str = "") -> None:
        """Append why a case, or the whole item, has no figures."""
        self.add("", None, case=case, kind="failed", note=reason)

    def skip(self, reason: str, *, case: str = "") -> None:
        """Append why a case, or the whole item, was not tried."""
        self.add("", None, case=case, kind="skipped", note=reason)

    @contextmanager
    def trying(self, case: str) -> Iterator[None]:
        """Turn an error of one case into one line, so that the next case runs."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            # The log has the whole of it.
            self.fail(first_line(error), case=case)
