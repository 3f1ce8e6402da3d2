"""Plot activations or losses over the width, with and without muP."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from tools.outputs.files import PNG_METADATA
from tools.width_check.activations import KINDS
from tools.width_check.tables import Found, Losses

COLORS = ("#1f4e8c", "#c8401d", "#2f7d4f", "#7a4ea3", "#b8860b", "#4a4a4a")


def plot_check(found: Mapping[str, Found], path: Path) -> None:
    """Plot each kind of activation, a column for each parametrization."""
    figure, panels = _panels(2, len(found))
    for column, (name, each) in enumerate(found.items()):
        for row, rows in enumerate((each.sizes, each.changes)):
            axes = panels[row][column]
            for kind, color in zip(KINDS, COLORS, strict=False):
                points = rows[kind]
                axes.plot([*points], [*points.values()], marker="o", color=color, label=kind)
            axes.set_xscale("log", base=2)
            widths = [*rows[KINDS[0]]]
            axes.set_xticks(widths, [f"{width:,}" for width in widths])
            axes.set_yscale("log", base=2)
            axes.set_ylabel(("size", "change")[row] + " (root mean square)")
        panels[0][column].set_title(name)
        panels[1][column].set_xlabel("width")
    _match_heights(panels)
    panels[0][0].legend(fontsize=9, frameon=False)
    figure.savefig(path, dpi=120, format="png", metadata=PNG_METADATA)


def plot_sweep(
    rates: Sequence[float], losses: Mapping[str, Mapping[int, Losses]], path: Path
) -> None:
    """Plot the last loss over the learning rate, a panel for each parametrization."""
    figure, panels = _panels(1, len(losses))
    for axes, (name, of_width) in zip(panels[0], losses.items(), strict=True):
        for (width, row), color in zip(of_width.items(), cycle(COLORS), strict=False):
            values = [row[rate] for rate in rates]
            axes.plot(rates, values, marker="o", color=color, label=f"width {width:,}")
        axes.set_xscale("log")
        # The rates that were trained, not powers of ten between them.
        axes.set_xticks(rates, [f"{rate:.2g}" for rate in rates], fontsize=8)
        axes.minorticks_off()
        axes.set(title=name, xlabel="learning rate", ylabel="loss (nats)")
    _match_heights(panels)
    panels[0][0].legend(fontsize=9, frameon=False)
    figure.savefig(path, dpi=120, format="png", metadata=PNG_METADATA)


def _panels(rows: int, columns: int) -> tuple[Any, Any]:
    """Make a figure of panels without a frame above and to the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _match_heights(panels: Any) -> None:
    """Give the panels of a row one scale, so that they compare."""
    for row in panels:
        bounds = [axes.get_ylim() for axes in row]
        low = min(bottom for bottom, _ in bounds)
        high = max(top for _, top in bounds)
        for axes in row:
            axes.set_ylim(low, high)
