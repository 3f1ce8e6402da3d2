"""Say in words what a chart shows, for those who do not see it."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tools.shared.number_text import short

MOST_CURVES = 12
"""Curves that are described; of more, how many there are."""


def describe_figure(figure: Figure, title: str) -> str:
    """Describe each curve by its first, last, least and greatest value, marks by their number."""
    parts = []
    for axes in figure.axes:
        over = axes.get_xlabel() or "x"
        what = axes.get_ylabel() or "y"
        lines = [text for line in axes.lines if (text := _describe(axes, line))]
        # A curve drawn twice, as points and as their median, is said once.
        lines = list(dict.fromkeys(lines))
        more = len(lines) - MOST_CURVES
        parts.append(f"{what} over {over}.")
        parts += lines[:MOST_CURVES]
        if more > 0:
            parts.append(f"And {more} more curves.")
        if cells := [text.get_text() for text in axes.texts if text.get_text().endswith("%")]:
            parts.append(_describe_map(axes, cells))
    return " ".join([f"{title}:", *parts])


def _describe(axes: Axes, line: Line2D) -> str:
    """Describe a curve; empty for a line that only helps the eye."""
    values = np.asarray(line.get_ydata(), dtype=float)
    label = str(line.get_label()).strip()
    is_named = not label.startswith("_")
    # Marks on an edge of the chart have no value, only a number.
    if line.get_transform() != axes.transData:
        return f"{len(values)} marks: {label}." if is_named else ""
    finite = values[np.isfinite(values)]
    is_help = len(values) < 2 or line.get_linestyle() == "None" and not is_named
    if not len(finite) or is_help and not is_named:
        return ""
    name = f"{label}: " if is_named else ""
    if len(finite) == 1:
        return f"{name}{short(finite[0])}."
    return (
        f"{name}from {short(finite[0])} to {short(finite[-1])}, "
        f"between {short(finite.min())} and {short(finite.max())}."
    )


def _describe_map(axes: Axes, cells: list[str]) -> str:
    """Describe a map by its size and the extremes of its cells."""
    shares = sorted(float(cell.rstrip(" %")) for cell in cells)
    columns = len(axes.get_xticks())
    rows = len(axes.get_yticks())
    return (
        f"{rows} rows and {columns} columns, between {shares[0]:.0f} % and {shares[-1]:.0f} %, "
        f"on average {sum(shares) / len(shares):.0f} %."
    )
