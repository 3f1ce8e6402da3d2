"""Plot how long documents are: how many there are, and where the tokens lie."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

from tools.outputs.files import PNG_METADATA, check_file, is_own_picture  # noqa: E402
from tools.shared.number_text import length  # noqa: E402

COLORS = ("#1f4e8c", "#c8401d", "#2f7d4f", "#7a4ea3", "#b8860b", "#4a4a4a")
BINS_PER_DOUBLING = 4
"""Bins of the histogram between a length and twice that length."""


def plot_lengths(lengths: dict[str, np.ndarray], path: str) -> None:
    """Plot histograms of document lengths over powers of 2, one line per source.

    Args:
        lengths: source -> tokens of each document.
        path: PNG file to write.

    Raises:
        ValueError: the file exists and is no picture of ours.
    """
    check_file("plot", Path(path), "tools.inspect_data", is_own_picture)
    highest = max(int(found.max()) for found in lengths.values())
    edges = 2.0 ** np.arange(
        0, np.log2(max(2, highest)) + 2 / BINS_PER_DOUBLING, 1 / BINS_PER_DOUBLING
    )
    figure, axes = pyplot.subplots(2, 1, figsize=(11, 7), sharex=True, constrained_layout=True)
    for number, (source, found) in enumerate(lengths.items()):
        found = found[found > 0].astype(np.float64)
        color = COLORS[number % len(COLORS)]
        style = "-" if number < len(COLORS) else "--"
        # Above, documents count alike; below, each by its tokens.
        for panel, weights in zip(axes, (None, found), strict=True):
            counts, _ = np.histogram(found, bins=edges, weights=weights)
            panel.stairs(
                100 * counts / max(1.0, counts.sum()),
                edges,
                color=color,
                linestyle=style,
                linewidth=1.6,
                fill=len(lengths) == 1,
                alpha=0.6 if len(lengths) == 1 else 1.0,
                label=source,
            )
    for panel, what in zip(axes, ("documents (%)", "tokens (%)"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_ylabel(what)
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length(int(value))))
    axes[1].set_xlabel("tokens of a document")
    axes[0].legend(fontsize=9, frameon=False, loc="upper right")
    figure.savefig(path, dpi=120, format="png", metadata=PNG_METADATA)
    pyplot.close(figure)
