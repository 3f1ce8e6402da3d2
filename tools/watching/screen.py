"""Write what a run does as text: a screen of a terminal, or one line of a log."""

import math
import shutil
import statistics
from dataclasses import dataclass

from tools.shared.number_text import gibibytes, moment, short
from tools.watching.run_files import Record, RunFiles
from tools.watching.run_state import (
    Remaining,
    describe_phase,
    describe_ranks,
    describe_state,
    last_event,
    median_of_steps,
    recent_steps,
    remaining_of_phase,
    remaining_of_run,
)

LABEL_COLUMNS = 12
BAR_COLUMNS = 24
SPARK_COLUMNS = 48
SHOWN_EVENTS = 6
SHOWN_SOURCES = 6
NARROWEST = 40
"""Columns that a screen has at least."""


@dataclass(frozen=True)
class Signs:
    """Holds the characters of bars and curves."""

    heights: str
    full: str
    empty: str
    cut: str


UNICODE = Signs("▁▂▃▄▅▆▇█", "█", "░", "…")
ASCII = Signs("_.-=+*#@", "#", "-", "~")
"""For a terminal that shows no others."""


def signs_for(encoding: str | None) -> Signs:
    """Choose the characters that a stream of an encoding can carry."""
    try:
        "".join((UNICODE.heights, UNICODE.empty, UNICODE.cut)).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


def clock(seconds: float) -> str:
    """Spell a time in its two largest units: 93784 -> "1 d 2 h"."""
    whole = max(0, int(seconds))
    if whole < 10:
        return f"{max(0.0, seconds):.1f} s"
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min")]
    parts.append((whole % 60, "s"))
    first = next(number for number, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count)


def sparkline(values: list[float], columns: int, signs: Signs) -> str:
    """Draw the last values as a row of heights, at most one a column; NaN is a gap."""
    shown = values[-columns:]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return ""
    low = min(finite)
    span = max(finite) - low or 1.0
    top = len(signs.heights) - 1
    return "".join(
        signs.heights[round((value - low) / span * top)] if math.isfinite(value) else " "
        for value in shown
    )


def bar(share: float, columns: int, signs: Signs) -> str:
    """Draw a share as a bar."""
    full = round(share * columns)
    return signs.full * full + signs.empty * (columns - full)


def terminal_columns() -> int:
    return max(NARROWEST, shutil.get_terminal_size().columns)


# ---------------------------------------------------------------- the screen


def screen(files: RunFiles, now: float, columns: int, signs: Signs) -> str:
    """Write everything that a person wants to know of a run, a line each, cut to the columns."""
    title = f"{files.folder}   {moment(now)} UTC"
    rows = [("state", describe_state(files, now, clock))]
    rows += [("", text) for text in describe_ranks(files.ranks, clock)]
    if files.steps:
        rows += _progress_rows(files, signs)
        rows += _step_rows(files, signs)
    rows += _other_rows(files, now)
    for number, text in enumerate(_event_lines(files)):
        rows.append(("" if number else "events", text))
    lines = [title, *(f"{label:<{LABEL_COLUMNS}}{text}" for label, text in rows)]
    return "\n".join(cut(line, columns, signs) for line in lines)


def cut(line: str, columns: int, signs: Signs) -> str:
    """Shorten a line to the columns, and keep characters out that would move the cursor."""
    line = "".join(letter if letter.isprintable() else " " for letter in line)
    return line if len(line) <= columns else line[: columns - 1] + signs.cut


def _progress_rows(files: RunFiles, signs: Signs) -> list[tuple[str, str]]:
    """Write where the run is: step, tokens, phase, what is left."""
    step = files.steps[-1]
    phase = remaining_of_phase(files)
    run = remaining_of_run(files)
    of_run = f" of {short(run.end)}" if run else ""
    rows = [
        ("step", f"{step['step']:,}, {short(step['tokens'])}{of_run} tokens"),
        ("phase", describe_phase(files) + _bar_text(phase, signs)),
    ]
    if run is not None:
        rows.append(("run", _bar_text(run, signs).strip()))
    return rows


def _bar_text(remaining: Remaining | None, signs: Signs) -> str:
    if remaining is None:
        return ""
    left = ""
    if remaining.seconds:
        left = f", {clock(remaining.seconds)} left at this pace"
    share = remaining.share
    return f"  {bar(share, BAR_COLUMNS, signs)} {100 * share:.1f} %{left}"


def _step_rows(files: RunFiles, signs: Signs) -> list[tuple[str, str]]:
    """Write how well and how fast the last steps went."""
    step = files.steps[-1]
    losses = [_number(each.get("loss")) for each in files.steps]
    curve = sparkline(losses, SPARK_COLUMNS, signs)
    loss = f"{_text(step.get('loss'), '.4f')}  {curve} last {min(len(losses), SPARK_COLUMNS)} steps"
    rows = [("loss", loss)]
    rows.append(
        (
            "",
            f"gradient norm {_text(step.get('grad_norm'), '.3f')}, "
            f"learning rate {_text(step.get('lr'), '.2e')}"
            f"{', SKIPPED' if step.get('skipped') else ''}",
        )
    )
    if sources := _source_text(files):
        rows.append(("sources", sources))
    rate = median_of_steps(files, "tokens_per_second")
    speed = [f"{short(rate)} tokens/s"] if rate else []
    mfu = median_of_steps(files, "mfu")
    if mfu is not None:
        speed.append(f"MFU {100 * mfu:.1f} %")
    waited = _waited_share(files.steps)
    if waited is not None:
        speed.append(f"{100 * waited:.1f} % of the time waiting for data")
    # Not known on GPUs.
    others = median_of_steps(files, "communication_share")
    if others is not None:
        speed.append(f"{100 * others:.1f} % for other ranks")
    rows.append(("speed", ", ".join(speed) or "not known"))
    if step.get("peak_memory_bytes") is not None:
        rows.append(("memory", f"{gibibytes(step['peak_memory_bytes'])} on the fullest rank"))
    return rows


def _source_text(files: RunFiles) -> str:
    """Write the median loss of each source over the last steps; empty where there is none."""
    steps = recent_steps(files)
    names = list(dict.fromkeys(name for step in steps for name in step.get("source_losses") or {}))
    parts = []
    for name in names[:SHOWN_SOURCES]:
        found = [(step.get("source_losses") or {}).get(name) for step in steps]
        losses = [loss for loss in found if loss is not None]
        if losses:
            parts.append(f"{name} {statistics.median(losses):.4f}")
    more = len(names) - SHOWN_SOURCES
    return ", ".join(parts) + (f", {more} more" if more > 0 else "")


def _waited_share(steps: list[Record]) -> float | None:
    """Return the share of the last steps' time that passed until their data were there."""
    known = [each for each in steps if each.get("step_seconds") and "data_seconds" in each]
    total = sum(each["step_seconds"] for each in known)
    return sum(each["data_seconds"] or 0 for each in known) / total if total else None


def _other_rows(files: RunFiles, now: float) -> list[tuple[str, str]]:
    """Write the last evaluation, the last checkpoint, what it runs on."""
    rows = []
    losses = [each for each in files.evaluations if each.get("valid_loss") is not None]
    if losses:
        last = losses[-1]
        rows.append(
            (
                "validation",
                f"{last['valid_loss']:.4f} of {last.get('set', 'valid')} at step {last['step']:,}",
            )
        )
    if save := last_event(files, "save"):
        rows.append(("checkpoint", f"step {save['step']:,}, {clock(now - save['time'])} ago"))
    elif files.exists and files.steps:
        rows.append(("checkpoint", "none yet"))
    if files.facts is not None:
        facts = files.facts
        rows.append(
            (
                "devices",
                f"{facts.device}; {facts.world_size:,} process(es) on {facts.machines:,} "
                f"machine(s), rank 0 on {facts.host}; {facts.layout}",
            )
        )
    return rows


def _event_lines(files: RunFiles) -> list[str]:
    """List the last events, the newest below."""
    return [
        f"{moment(event['time'])[5:]}  {event['event']:<9} step {event['step']:,}"
        + (f": {event['text']}" if event.get("text") else "")
        for event in files.events[-SHOWN_EVENTS:]
    ]


# ---------------------------------------------------------------- one line


def line(files: RunFiles, now: float) -> str:
    """Write the run in one line, for a log."""
    parts = [moment(now)]
    if files.steps:
        step = files.steps[-1]
        parts += [
            f"step {step['step']:,}",
            describe_phase(files),
            f"tokens {short(step['tokens'])}",
        ]
        parts.append(f"loss {_text(step.get('loss'), '.4f')}")
        rate = median_of_steps(files, "tokens_per_second")
        if rate:
            parts.append(f"{short(rate)} tok/s")
        for name, remaining in (
            ("phase", remaining_of_phase(files)),
            ("run", remaining_of_run(files)),
        ):
            if remaining is not None and remaining.seconds is not None:
                parts.append(f"{name} ETA {clock(remaining.seconds)}")
    return " | ".join([*parts, describe_state(files, now, clock)])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _text(value: float | None, form: str) -> str:
    return "not known" if value is None else format(value, form)
