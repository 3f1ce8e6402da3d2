"""Make the section of RESULTS.md from a file of lines."""

from collections.abc import Mapping, Sequence

from tools.bench.gpu.items import PROBE, Bar, Item
from tools.bench.gpu.lines import Line

HEADER = ["item", "case", "measured", "bar", ""]
LOSS_TOLERANCE = 1e-3
"""Largest relative difference between two first losses whose times are compared."""
SHOWN_FAILURES = 8
"""Failed tests that a row names."""
PEERS = {"1b-8k": "1b-8k-peer", "3b-8k": "3b-8k-peer"}
"""Item of ours -> item of the peer whose tokens/s it is compared with."""


def describe(lines: Sequence[Line], items: Mapping[str, Item]) -> str:
    """Describe in Markdown the card, a row per case, and why something could not be measured."""
    # A second run into the same file replaces what it measured again.
    latest = latest_lines(lines)
    rows = [row for item in items.values() for row in rows_of(item, latest.get(item.name, []))]
    parts = [
        f"## On one {card_of(lines)}",
        "",
        describe_probe(latest.get(PROBE.name, []), lines),
        "",
    ]
    if any(line.scale == "toy" for line in lines):
        parts += ["**Made at toy scale: the figures mean nothing.**", ""]
    parts += [
        "scaled: by the difference between two runs with fewer layers. calculated: from other "
        "figures, not measured. GB = 1e9 bytes, GiB = 2^30. Rates count the causal half of the "
        "attention and no recompute; that of a backward kernel alone counts its 5 products.",
        "",
        *table(rows),
        "",
    ]
    comparisons = [
        comparison
        for ours, peer in PEERS.items()
        for comparison in compare(latest.get(ours, []), latest.get(peer, []))
    ]
    return "\n".join([*parts, *comparisons]).rstrip()


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Make the lines of a Markdown table; not padded, as single cells are long."""
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def latest_lines(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Map items to the lines of their last run that measured anything, else of their last run."""
    runs: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        runs.setdefault(line.item, {}).setdefault(line.date, []).append(line)
    return {item: choose_run(list(by_date.values())) for item, by_date in runs.items()}


def choose_run(runs: Sequence[list[Line]]) -> list[Line]:
    """Choose the last of an item's runs with a figure, else the last."""
    measured = [run for run in runs if any(is_figure(line) for line in run)]
    return (measured or runs)[-1]


def is_figure(line: Line) -> bool:
    """Tell whether the line holds something that was found."""
    return line.kind not in ("failed", "skipped")


def card_of(lines: Sequence[Line]) -> str:
    """Name the card, or several."""
    return ", ".join(dict.fromkeys(line.card for line in lines if line.card)) or "GPU"


def describe_probe(probe: Sequence[Line], lines: Sequence[Line]) -> str:
    """Describe date, memory and versions in one paragraph."""
    if not lines:
        return "No GPU was at hand."
    dates = [line.date for line in lines]
    # A run may have been continued on another day.
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    # Then the memory and versions that the probe found.
    parts = [f"{span} UTC"]
    for line in probe:
        if is_figure(line):
            parts.append(show(line) if line.unit else str(line.value))
        else:
            parts.append(f"{line.case or 'the probe'}: {line.note}")
    return "; ".join(parts)


def rows_of(item: Item, lines: Sequence[Line]) -> list[list[str]]:
    """Make a row for each case of an item; for one run by hand only if it ran."""
    if not lines:
        return [] if item.by_hand else [[item.title, "", "not run", "", ""]]
    # In the order in which they ran.
    cases: dict[str, list[Line]] = {}
    for line in lines:
        cases.setdefault(line.case, []).append(line)
    return [row_of(item, case, of_case) for case, of_case in cases.items()]


def row_of(item: Item, case: str, lines: Sequence[Line]) -> list[str]:
    """Make the row of a case: title, case, figures, bars, and whether they were reached."""
    failed = [line for line in lines if line.kind == "failed"]
    # A broken machine can fail every test: a row names a few.
    hidden = failed[SHOWN_FAILURES:]
    texts = [show(line) for line in lines if line not in hidden]
    if hidden:
        texts.append(f"and {len(hidden)} more failed")
    bars: list[str] = []
    verdicts: list[str] = []
    for line in lines:
        bar = bar_of(item, line)
        if bar is not None and isinstance(line.value, int | float):
            bars.append(f"{line.figure} {bar}")
            verdicts.append(verdict_of(bar, line.value))
    # Neither may end a cell or a row of the table.
    cells = [item.title, case, "; ".join(texts), "; ".join(bars), "; ".join(verdicts)]
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]


def verdict_of(bar: Bar, value: float) -> str:
    """Judge a bar; a difference of two runs may come out below zero, which says nothing."""
    if not value >= 0:
        return "no figure"
    return "reached" if bar.reached(value) else "NOT reached"


def bar_of(item: Item, line: Line) -> Bar | None:
    """Find the bar of a line's figure, of its own case or of every case."""
    return item.bars.get((line.case, line.figure)) or item.bars.get(("", line.figure))


def show(line: Line) -> str:
    """Spell a line's figure with its unit, its kind unless measured, and its note."""
    if not is_figure(line):
        verb = "not run" if line.kind == "skipped" else "failed"
        return f"{verb}: {line.value}" if line.value else f"{verb} ({line.note})"
    value = number(line.value) if isinstance(line.value, int | float) else line.value
    kind = "" if line.kind == "measured" else f", {line.kind}"
    note = f" ({line.note})" if line.note else ""
    return f"{line.figure} {value} {line.unit}".rstrip() + kind + note


def number(value: float) -> str:
    """Spell four significant digits, or all of a whole number."""
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def compare(ours: Sequence[Line], peer: Sequence[Line]) -> list[str]:
    """Compare our fastest case's tokens/s with the peer's, in one line or none.

    Losses that differ are named: the times then say nothing.
    """
    ours_best = fastest(ours)
    peer_best = fastest(peer)
    if ours_best is None or peer_best is None:
        return []
    ratio = figure_of(ours_best) / figure_of(peer_best)
    verdict = "reached" if ratio >= 1 else "NOT reached"
    text = (
        f"- {ours_best.item}: {ours_best.case} / {peer_best.case}: {ratio:.3f} times its tokens/s "
        "(calculated), "
        f"bar at least 1: {verdict}"
    )
    # Both computed the same only if their losses agree.
    one = loss_of(ours, ours_best.case)
    other = loss_of(peer, peer_best.case)
    if one is not None and other is not None and not abs(one - other) <= LOSS_TOLERANCE * abs(one):
        text += f"; but the losses are {one:.5f} and {other:.5f}: the times say nothing"
    return [text]


def fastest(lines: Sequence[Line]) -> Line | None:
    """Find the line with the most tokens/s."""
    found = [
        line for line in lines if line.figure == "tokens" and isinstance(line.value, int | float)
    ]
    return max(found, key=figure_of, default=None)


def figure_of(line: Line) -> float:
    """Return the figure of a line that has one."""
    assert isinstance(line.value, int | float), line
    return float(line.value)


def loss_of(lines: Sequence[Line], case: str) -> float | None:
    """Find a case's first loss."""
    found = [line for line in lines if line.case == case and line.figure == "loss"]
    return figure_of(found[0]) if found else None
