"""For the minutes in which a GPU is lent: every item in a process of its own, the most valuable
first.

Each figure is one JSON line, appended at once to lines.jsonl; beside it are log.txt (what the items
printed) and table.md. An item that fails, hangs or runs out of memory costs only itself: it is
ended at its deadline, and one that needs more than the time that is left is skipped. Both are said
in one line.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tools.bench.fresh import ROOT
from tools.bench.gpu.items import ITEMS, PROBE, Item
from tools.bench.gpu.lines import FIX, Line, Report, now, read_lines
from tools.bench.gpu.table import describe
from tools.bench.gpu.work import Task

LINES = "lines.jsonl"
LOG = "log.txt"
TABLE = "table.md"
END_SECONDS = 5.0
"""Left for the end of the last item and for the table."""
KILL_SECONDS = 5.0
"""Waited for the end of a process that was killed."""

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
DEFAULTS = {
    ALLOCATOR: "expandable_segments:True",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONUNBUFFERED": "1",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
}
"""What every item's process finds in its environment, where nothing else is there: the GPU's memory
does not fall to pieces, nothing is downloaded, nothing is sent, FlashAttention 4 compiles a kernel
once for all items."""


@dataclass(kw_only=True)
class Arguments:
    seconds: float = 540.0
    """Time in which everything ends."""
    output: str | None = None
    """Folder for the lines, the log and the table; by default $OUT, and without it runs/lease."""
    only: tuple[str, ...] = ()
    """Items to run, in this order, instead of the lease's; --names lists them."""
    names: bool = False
    """Print every item with its expected seconds, and end."""
    table: str | None = None
    """Print the section for RESULTS.md from this file of lines, and end."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: only with --scale toy, to try the code out."""
    scale: Literal["full", "toy"] = "full"
    """toy: small models and lengths; its figures mean nothing."""


def run(arguments: Arguments) -> int:
    """Run the items and print the table; 0, or 1 where there is no such device, or 2."""
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if arguments.names:
        print("\n".join(describe_item(item) for item in ITEMS.values()))
        return 0
    if arguments.table is not None:
        return print_table(Path(arguments.table))
    folder = Path(arguments.output or os.environ.get("OUT") or ROOT / "runs" / "lease").resolve()
    problem = find_folder_problem(folder)
    if problem:
        print(f"error: --output {folder}: {problem}", file=sys.stderr)
        return 2
    # The clock starts here.
    lease = Lease(folder, arguments)
    found = lease.run(chosen_items(arguments.only))
    print(lease.table.read_text(encoding="utf-8"), end="", flush=True)
    return 0 if found else 1


def find_problem(arguments: Arguments) -> str | None:
    """Say why the run cannot begin, with a fix; None = it can."""
    unknown = [name for name in arguments.only if name not in ITEMS]
    if unknown:
        return f"--only {' '.join(unknown)}: no such item. Fix: one of {', '.join(ITEMS)}."
    if arguments.device == "cpu" and arguments.scale == "full":
        return "--device cpu --scale full: would take days. Fix: --scale toy."
    least = PROBE.seconds + END_SECONDS
    if not arguments.seconds >= least:
        return (
            f"--seconds {arguments.seconds:g}: must be at least {least:g}, to look at the machine. "
            "Fix: the seconds that the lease leaves."
        )
    return None


def find_folder_problem(folder: Path) -> str | None:
    """Make the folder, and say why nothing can be written there, with a fix; None = it can."""
    lines = folder / LINES
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines.touch()
        read_lines(lines)
    except OSError as error:
        return f"{error.strerror}. Fix: a folder that can be written to."
    except ValueError as error:
        return f"its {LINES} cannot be continued: {error}"
    return None


def describe_item(item: Item) -> str:
    """Describe an item in a line of --names."""
    where = " (by hand)" if item.by_hand else ""
    return f"{item.name}: {item.title}, {item.seconds} s{where}"


def print_table(path: Path) -> int:
    """Print the Markdown section of a file of lines; 0, or 2 with one line of what is wrong."""
    lines: list[Line] = []
    try:
        lines = read_lines(path)
        problem = None if lines else f"it is empty. {FIX}"
    except OSError as error:
        problem = f"{error.strerror}. {FIX}"
    except ValueError as error:
        problem = str(error)
    if problem:
        print(f"error: --table {path}: {problem}", file=sys.stderr)
        return 2
    print(describe(lines, ITEMS))
    return 0


def chosen_items(only: Sequence[str]) -> list[Item]:
    """Choose the items to run after the probe."""
    names = only or [item.name for item in ITEMS.values() if not item.by_hand]
    return [ITEMS[name] for name in names]


class Lease:
    """Spend a budget of seconds on items, one after another."""

    def __init__(self, folder: Path, arguments: Arguments):
        self.lines = folder / LINES
        self.log = folder / LOG
        self.table = folder / TABLE
        self.device = arguments.device
        self.scale = arguments.scale
        self.seconds = arguments.seconds
        self.environment = DEFAULTS | dict(os.environ)
        self.start = time.monotonic()
        self.card = ""
        self.torch = ""

    def left(self) -> float:
        """Count the seconds that items may still take."""
        return self.seconds - END_SECONDS - (time.monotonic() - self.start)

    def run(self, items: Sequence[Item]) -> bool:
        """Run the probe and the items; False where the probe found no such device."""
        # An exit runs what ends the item's process, so that none is left behind.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        probed = self.probe()
        if probed is None and self.environment.get(ALLOCATOR) == DEFAULTS[ALLOCATOR]:
            # Not every machine that lends a part of a GPU has the driver's calls for it.
            say(f"once more without {ALLOCATOR}={DEFAULTS[ALLOCATOR]}: some drivers refuse it")
            self.environment[ALLOCATOR] = "expandable_segments:False"
            probed = self.probe()
        if probed is None:
            say(f"the device cannot be used; {self.log} says why")
            return False
        self.card = probed.card
        self.torch = probed.torch
        for item in items:
            self.run_item(item)
        return True

    def probe(self) -> Line | None:
        """Run the probe; returns one of its figures, or None where it failed."""
        found = self.run_item(PROBE)
        return next((line for line in found if line.value is not None), None)

    def lines_of(self, report: Report) -> list[Line]:
        """Read what a run of an item left so far."""
        if not self.lines.exists():
            return []
        return [
            line
            for line in read_lines(self.lines)
            if (line.item, line.date) == (report.item, report.date)
        ]

    def run_item(self, item: Item) -> list[Line]:
        """Run an item if there is time for it, and write the table again; returns its lines."""
        report = Report(
            self.lines, item.name, self.scale, date=now(), card=self.card, torch=self.torch
        )
        # An item that would be cut off is worth less than the next one.
        left = self.left()
        if left < item.seconds:
            reason = f"needs {item.seconds} s, and {max(0.0, left):.0f} s were left"
            say(f"{item.name} skipped: {reason}")
            report.skip(reason)
        else:
            self.run_to_its_end(item, report, min(item.deadline, left))
        found = self.lines_of(report)
        # At once: whoever ends this process leaves a table of what was found until then.
        text = describe(read_lines(self.lines), ITEMS)
        self.table.write_text(text + "\n", encoding="utf-8")
        return found

    def run_to_its_end(self, item: Item, report: Report, deadline: float) -> None:
        """Run an item to its end or its deadline, and say what it found."""
        say(f"{item.name}, {self.left():.0f} s left, at most {deadline:.0f} s")
        # The item leaves its figures in the file of lines itself.
        code = self.run_process(item, report, deadline)
        taken = time.perf_counter() - report.start
        if code is None:
            report.fail(f"ended at its deadline of {deadline:.0f} s")
        # A process that was killed could not say why.
        elif code and not any(
            line.kind == "failed" and not line.case for line in self.lines_of(report)
        ):
            report.fail(f"its process ended with code {code}")
        for line in self.lines_of(report):
            say(f"  {describe_line(line)}")
        say(f"{item.name} took {taken:.0f} s")

    def run_process(self, item: Item, report: Report, deadline: float) -> int | None:
        """Run the item's process; returns its exit code, or None where its deadline ended it."""
        task = Task(
            item=item.name,
            function=item.function,
            options=item.options,
            lines=str(self.lines),
            date=report.date,
            card=self.card,
            device=self.device,
            scale=self.scale,
        )
        # A session of its own: everything that it starts can be ended with it.
        command = [sys.executable, "-m", "tools.bench.gpu.work", task.to_json()]
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"\n== {item.name}: {shlex.join(command[1:])}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait(timeout=deadline)
            except subprocess.TimeoutExpired:
                return None
            finally:
                end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """End an item's process and all that it started, which would hold the GPU's memory."""
    # There may be none left.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that hangs inside the driver cannot be ended, and must not take the others' time.
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=KILL_SECONDS)


def say(text: str) -> None:
    """Write one line of progress, at once."""
    print(f"lease: {text}", file=sys.stderr, flush=True)


def describe_line(line: Line) -> str:
    """Spell a line for people."""
    where = ", ".join(part for part in (line.case, line.figure) if part)
    if line.kind in ("failed", "skipped"):
        name = f"{line.value}: " if line.value else ""
        return f"{where + ': ' if where else ''}{line.kind}: {name}{line.note}"
    value = f"{line.value:.4g}" if isinstance(line.value, float) else str(line.value)
    note = f" ({line.note})" if line.note else ""
    return f"{where}: {value} {line.unit}".rstrip() + note
