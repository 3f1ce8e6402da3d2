"""Write what every benchmark reports: where and when it ran, its table, its bars."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from data.stream import usable_cores


def describe_machine(packages: Sequence[str]) -> str:
    """Describe date, CPU, cores, load and versions in one line."""
    # Versions decide what a figure means.
    found = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {_cpu_model()}, {usable_cores()} cores, load "
        f"{os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, {found}"
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a table whose columns are aligned in plain text, too; numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    # The colon aligns a column to the right.
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


def bar(name: str, value: float, limit: float) -> str:
    """Say in one line whether `value` is within its limit, judged before rounding."""
    return (
        f"- {name}: {value:.3f}, bar {float(limit)}: "
        f"{'reached' if value <= limit else 'NOT reached'}"
    )


def bar_at_least(name: str, value: float, limit: float) -> str:
    """Say in one line whether `value`, which should be large, reaches its limit."""
    return (
        f"- {name}: {value:.3f}, bar at least {float(limit)}: "
        f"{'reached' if value >= limit else 'NOT reached'}"
    )


def publish(text: str, output: str | None) -> None:
    """Print `text`, and append it to the file `output` if one is named."""
    print(text, flush=True)
    if output is not None:
        with open(output, "a", encoding="utf-8") as file:
            file.write(text + "\n\n")
