"""Draw what the evaluations found: validation loss, context gain, hidden numbers."""

import math
import statistics
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from tools.reporting.axes import (
    MARKERS,
    Palette,
    clothe,
    round_ticks,
    thin,
)
from tools.reporting.run_record import RunRecord, series_of
from tools.shared.number_text import length


def draw_validation(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw the validation loss of each set at each length.

    A first evaluation of the untrained model is left out where it is far above all others: beside
    it nothing else could be seen.
    """
    losses = [record["valid_loss"] for record in run.evaluations if record["tokens"] > 0]
    highest = math.inf
    if len(losses) > 1:
        highest = max(losses) + 2 * (max(losses) - min(losses))
    shown = [
        record
        for record in run.evaluations
        if record["tokens"] > 0 or record["valid_loss"] <= highest
    ]
    series = series_of(shown)
    for records, style, label in _styled(series, palette):
        _plot_marks(axes, records, "valid_loss", style, label)
    axes.set_ylabel("loss (nats per token)")
    axes.yaxis.set_major_locator(round_ticks(5))


def draw_gain(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw the context gain, with its 95 % interval where there is one."""
    for records, style, label in _styled(series_of(run.gains), palette):
        _plot_marks(axes, records, "gain", style, label)
        # A vertical line over each interval that is known.
        intervals = [
            (record["tokens"], *interval) for record in records if (interval := _interval(record))
        ]
        if intervals:
            tokens, lows, highs = zip(*intervals, strict=True)
            axes.vlines(
                tokens,
                lows,
                highs,
                color=style["color"],
                linewidth=1.6,
            )
    axes.axhline(0, color=palette["muted"], linewidth=1)
    axes.set_ylabel("gain (nats per token)")
    axes.yaxis.set_major_locator(round_ticks(5))


def _interval(record: dict) -> tuple[float, float] | None:
    low = record.get("gain_low")
    high = record.get("gain_high")
    return None if low is None or high is None else (low, high)


def _styled(
    series: dict[tuple[str, int | None], list[dict]], palette: Palette
) -> Iterator[tuple[list[dict], dict, str]]:
    """Give each series its style and label: a colour per length, a marker per set.

    With a single set, markers tell the lengths apart, too.

    Yields:
        (records, arguments for matplotlib, label)
    """
    sets = list(dict.fromkeys(name for name, _ in series))
    lengths = sorted({seq_length for _, seq_length in series}, key=lambda found: found or 0)
    for (name, seq_length), records in series.items():
        number = lengths.index(seq_length)
        marker = MARKERS[(sets.index(name) if len(sets) > 1 else number) % len(MARKERS)]
        parts = [] if len(sets) == 1 and name == "valid" else [name]
        parts += [length(seq_length)] if seq_length else []
        style = {
            "color": palette.series(number),
            "marker": marker,
            "markeredgecolor": palette["ground"],
        }
        label = ", ".join(parts) or "validation"
        # matplotlib hides labels that begin with an underscore.
        yield records, style, f" {label}" if label.startswith("_") else label


def _plot_marks(axes: Axes, records: list[dict], name: str, style: dict, label: str) -> None:
    """Draw a field of the records over tokens, as marks on a line."""
    kept = thin(np.array([record[name] for record in records], dtype=float))
    axes.plot(
        [records[i]["tokens"] for i in kept],
        [records[i][name] for i in kept],
        **style,
        markersize=6,
        linewidth=1.2,
        clip_on=False,
        zorder=4,
        label=label,
    )


def last_passkeys(run: RunRecord) -> dict[tuple[float, int], float]:
    """Map (depth, length) to the accuracy in the last evaluation."""
    last = max(record["tokens"] for record in run.passkeys)
    return {
        (record["depth"], record["seq_length"]): record["accuracy"]
        for record in run.passkeys
        if record["tokens"] == last
    }


def draw_passkey_map(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw the accuracy of the last evaluation as a map, depth x length."""
    found = last_passkeys(run)
    depths = sorted({depth for depth, _ in found})
    lengths = sorted({seq_length for _, seq_length in found})
    for (depth, seq_length), accuracy in found.items():
        x = lengths.index(seq_length)
        y = depths.index(depth)
        share = min(1.0, max(0.0, accuracy))
        red, green, blue = _shade(share)
        axes.fill_between(
            [x - 0.48, x + 0.48], y - 0.47, y + 0.47, color=(red, green, blue), linewidth=0
        )
        # Dark text on a light cell, and the other way round.
        brightness = 0.3 * red + 0.59 * green + 0.11 * blue
        axes.text(
            x,
            y,
            f"{100 * accuracy:.0f} %",
            ha="center",
            va="center",
            fontsize=9,
            color="#111111" if brightness > 0.48 else "#fafafa",
        )
    clothe(axes, palette)
    axes.grid(False)
    axes.set_xticks(range(len(lengths)), [length(found) for found in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.3g} %" for depth in depths])
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    # The beginning of the text is above.
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth of the key")
    axes.spines[["left", "bottom"]].set_visible(False)


def _shade(share: float) -> tuple[float, float, float]:
    """Blend dark violet (0) over blue-green to pale yellow (1): lightness alone tells the value."""
    stops = np.array([[0.20, 0.11, 0.33], [0.16, 0.45, 0.55], [0.99, 0.91, 0.55]])
    red, green, blue = (float(np.interp(share, (0, 0.5, 1), stops[:, i])) for i in range(3))
    return red, green, blue


def draw_passkey(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw the accuracy over tokens, the mean over depths."""
    # All depths of one length in one evaluation.
    groups: dict[tuple, list[dict]] = {}
    for record in run.passkeys:
        groups.setdefault((record["seq_length"], record["tokens"], record.get("phase")), []).append(
            record
        )
    means = [
        {
            "seq_length": key[0],
            "tokens": key[1],
            "accuracy": statistics.fmean(r["accuracy"] for r in records),
        }
        for key, records in groups.items()
    ]
    for records, style, label in _styled(series_of(means), palette):
        _plot_marks(axes, records, "accuracy", style, label)
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("keys found")
