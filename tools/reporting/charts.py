"""The charts of a report: what each shows of a run, and the sentence that stands where it has
nothing to show."""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter

from tools.reporting.axes import (
    LIGHT,
    MARKERS,
    Palette,
    TokenScale,
    clothe,
    column,
    distinct,
    label_phases,
    new_figure,
    prepare,
    running_median,
    settings,
    thin,
    window_of,
)
from tools.reporting.run_record import Run, series_of
from tools.shared.number_text import length, short

Draw = Callable[[Axes, Run, Palette], None]


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    draw: Draw
    missing: Callable[[Run], str | None]
    """Why there is nothing to draw, or None."""
    caption: str = ""
    is_wide: bool = False
    over_tokens: bool = True


# ---------------------------------------------------------------- loss and evaluations


def draw_loss(axes: Axes, run: Run, palette: Palette) -> None:
    """Training and validation loss, skipped steps, restarts and saves."""
    scale = TokenScale(run)
    losses = column(run, "loss")
    tokens, (centers, smoothed) = column(run, "tokens"), running_median(run, losses)
    if window_of(len(losses)) > 1:
        kept = thin(losses)
        axes.plot(
            tokens[kept],
            losses[kept],
            color=palette["raw"],
            linewidth=0.8,
            label="training, each step",
        )
        axes.plot(
            tokens[centers],
            smoothed,
            color=palette.series(0),
            linewidth=1.8,
            label="training, running median",
        )
    else:
        axes.plot(tokens, losses, color=palette.series(0), linewidth=1.8, label="training")
    # A spike of one step may leave the picture, the curve may not.
    _limit(axes, [*smoothed, *_mark_validation(axes, run, palette)])
    _mark_events(axes, run, palette, scale)
    axes.set_ylabel("loss (nats per token)")
    axes.yaxis.set_major_locator(MaxNLocator(6))


def draw_late_loss(axes: Axes, run: Run, palette: Palette) -> None:
    """Training loss on a scale that fits what follows the first tenth of the tokens."""
    losses = column(run, "loss")
    tokens = column(run, "tokens")
    kept, (centers, smoothed) = thin(losses), running_median(run, losses)
    axes.plot(tokens[kept], losses[kept], color=palette["raw"], linewidth=0.8)
    axes.plot(tokens[centers], smoothed, color=palette.series(0), linewidth=1.6)
    phases = run.phases()
    _limit(
        axes, smoothed[tokens[centers] > phases[0].begin + 0.1 * (phases[-1].end - phases[0].begin)]
    )
    axes.set_ylabel("loss (nats per token)")
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _limit(axes: Axes, values: Iterable[float]) -> None:
    """Let the axis follow what is finite of the values."""
    shown = [value for value in values if math.isfinite(value)]
    if shown:
        low = min(shown)
        high = max(shown)
        margin = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)


def _mark_validation(axes: Axes, run: Run, palette: Palette) -> list[float]:
    """Each set's loss at the length of the phase it was measured in -> the values shown."""
    lengths = {(phase.name, phase.seq_length) for phase in run.phases()}
    own = [
        record
        for record in run.evaluations
        if record.get("seq_length") is None
        or "phase" not in record
        or (record["phase"], record["seq_length"]) in lengths
    ]
    sets: dict[str, list[dict]] = {}
    for record in own:
        sets.setdefault(record.get("set", "valid"), []).append(record)
    for number, (name, records) in enumerate(sets.items()):
        axes.plot(
            [record["tokens"] for record in records],
            [record["valid_loss"] for record in records],
            MARKERS[number % len(MARKERS)],
            color=palette.series(1),
            markersize=6,
            zorder=5,
            clip_on=False,
            markeredgecolor=palette["ground"],
            label="validation" if name == "valid" else f"validation: {name}",
        )
    return [record["valid_loss"] for record in own]


def _mark_events(axes: Axes, run: Run, palette: Palette, scale: TokenScale) -> None:
    """Marks along the lower and the upper edge."""
    skipped = [step["tokens"] for step in run.steps if step.get("skipped")]
    unplanned, planned = run.restarts()
    for tokens, height, marker, color, label in (
        (skipped, 0.02, "x", "ink", "skipped step"),
        ([event["tokens"] for event in run.events_of("save")], 0.0, "|", "muted", "checkpoint"),
        ([event["tokens"] for event in unplanned], 0.975, "v", "series-3", "restart"),
        (
            [event["tokens"] for event in planned],
            0.975,
            "d",
            "series-2",
            "restart for another layout",
        ),
    ):
        if tokens:
            marks = distinct(tokens, scale)
            axes.plot(
                marks,
                [height] * len(marks),
                marker,
                color=palette[color],
                markersize=6,
                clip_on=False,
                transform=axes.get_xaxis_transform(),
                label=label,
                zorder=6,
            )


def draw_validation(axes: Axes, run: Run, palette: Palette) -> None:
    """Validation loss of each set at each length; without an untrained model, beside which nothing
    else shows."""
    losses = [record["valid_loss"] for record in run.evaluations if record["tokens"] > 0] or [
        math.inf
    ]
    highest = max(losses) + 2 * (max(losses) - min(losses)) if len(losses) > 1 else math.inf
    shown = [
        record
        for record in run.evaluations
        if record["tokens"] > 0 or record["valid_loss"] <= highest
    ]
    series = series_of(shown)
    for records, style, label in _styled(series, palette):
        _plot_marks(axes, records, "valid_loss", style, label)
    axes.set_ylabel("loss (nats per token)")
    axes.yaxis.set_major_locator(MaxNLocator(5))


def draw_gain(axes: Axes, run: Run, palette: Palette) -> None:
    """Context gain with its 95 % interval where there is one."""
    for records, style, label in _styled(series_of(run.gains), palette):
        _plot_marks(axes, records, "gain", style, label)
        known = [record for record in records if _interval(record)]
        if known:
            lows, highs = ([_interval(record)[i] for record in known] for i in (0, 1))
            axes.vlines(
                [record["tokens"] for record in known],
                lows,
                highs,
                color=style["color"],
                linewidth=1.6,
            )
    axes.axhline(0, color=palette["muted"], linewidth=1)
    axes.set_ylabel("gain (nats per token)")
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _interval(record: dict) -> tuple[float, float] | None:
    low = record.get("gain_low")
    high = record.get("gain_high")
    return None if low is None or high is None else (low, high)


def _styled(series: dict[tuple[str, int | None], list[dict]], palette: Palette):
    """Each series with its style and label: a color per length, a marker per set (or per length, of
    one set)."""
    sets = list(dict.fromkeys(name for name, _ in series))
    lengths = sorted({seq_length for _, seq_length in series}, key=lambda found: found or 0)
    for (name, seq_length), records in series.items():
        number = lengths.index(seq_length)
        marker = MARKERS[(sets.index(name) if len(sets) > 1 else number) % len(MARKERS)]
        parts = [] if len(sets) == 1 and name == "valid" else [name]
        parts += [length(seq_length)] if seq_length else []
        yield (
            records,
            {
                "color": palette.series(number),
                "marker": marker,
                "markeredgecolor": palette["ground"],
            },
            (", ".join(parts).replace("_", " _", name.startswith("_")) or "validation"),
        )  # a first _ hides a label


def _plot_marks(axes: Axes, records: list[dict], name: str, style: dict, label: str) -> None:
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


# ---------------------------------------------------------------- passkey


def last_passkeys(run: Run) -> dict[tuple[float, int], float]:
    """(depth, length) -> accuracy in the last evaluation."""
    last = max(record["tokens"] for record in run.passkeys)
    return {
        (record["depth"], record["seq_length"]): record["accuracy"]
        for record in run.passkeys
        if record["tokens"] == last
    }


def draw_passkey_map(axes: Axes, run: Run, palette: Palette) -> None:
    """Accuracy of the last evaluation, depth x length."""
    found = last_passkeys(run)
    depths, lengths = (sorted({key[i] for key in found}) for i in (0, 1))
    for (depth, seq_length), accuracy in found.items():
        x = lengths.index(seq_length)
        y = depths.index(depth)
        share = min(1.0, max(0.0, accuracy))
        red, green, blue = _shade(share)
        axes.fill_between(
            [x - 0.48, x + 0.48], y - 0.47, y + 0.47, color=(red, green, blue), linewidth=0
        )
        axes.text(
            x,
            y,
            f"{100 * accuracy:.0f} %",
            ha="center",
            va="center",
            fontsize=9,
            color="#111111" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.48 else "#fafafa",
        )
    clothe(axes, palette)
    axes.grid(False)
    axes.set_xticks(range(len(lengths)), [length(found) for found in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.3g} %" for depth in depths])
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)  # the beginning of the text is above
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth of the key")
    axes.spines[["left", "bottom"]].set_visible(False)


def _shade(share: float) -> tuple[float, float, float]:
    """Dark violet (0) over a middle blue-green to a pale yellow (1): its lightness alone tells the
    value."""
    stops = np.array([[0.20, 0.11, 0.33], [0.16, 0.45, 0.55], [0.99, 0.91, 0.55]])
    return tuple(float(np.interp(share, (0, 0.5, 1), stops[:, i])) for i in range(3))


def draw_passkey(axes: Axes, run: Run, palette: Palette) -> None:
    """Accuracy over tokens, the mean over depths."""
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


# ---------------------------------------------------------------- how it ran


def draw_rate(axes: Axes, run: Run, palette: Palette) -> None:
    _draw_steps(axes, run, palette, "tokens_per_second", 2)
    axes.set_ylabel("tokens / s")
    axes.yaxis.set_major_formatter(FuncFormatter(short))


def draw_mfu(axes: Axes, run: Run, palette: Palette) -> None:
    _draw_steps(axes, run, palette, "mfu", 2)
    axes.set_ylabel("MFU")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def draw_memory(axes: Axes, run: Run, palette: Palette) -> None:
    values = column(run, "peak_memory_bytes", 2.0**-30)
    tokens = column(run, "tokens")
    kept = thin(values)
    axes.plot(tokens[kept], values[kept], color=palette.series(3))
    axes.set_ylim(0, 1.1 * float(np.nanmax(values)) or 1)
    axes.set_ylabel("GiB")
    axes.yaxis.set_major_locator(MaxNLocator(4))


def draw_time(axes: Axes, run: Run, palette: Palette) -> None:
    _draw_steps(axes, run, palette, "step_seconds", 0, "step")
    _draw_steps(axes, run, palette, "data_seconds", 1, "of it waiting for data", from_zero=False)
    axes.set_ylabel("seconds")


def draw_learning(axes: Axes, run: Run, palette: Palette) -> None:
    rates = column(run, "lr")
    tokens = column(run, "tokens")
    kept = thin(rates)
    axes.plot(tokens[kept], rates[kept], color=palette.series(3))
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))


def draw_gradient(axes: Axes, run: Run, palette: Palette) -> None:
    norms = column(run, "grad_norm")
    positive = norms[np.isfinite(norms) & (norms > 0)]
    if len(positive) and positive.max() > 20 * np.median(positive):
        axes.set_yscale("log")
    _draw_steps(axes, run, palette, "grad_norm", 4, from_zero=axes.get_yscale() == "linear")
    axes.set_ylabel("gradient norm")


def draw_batch(axes: Axes, run: Run, palette: Palette) -> None:
    batches = np.array(run.batches(), dtype=float)
    tokens = column(run, "tokens")
    # Only where it changes, and at both ends: a batch lasts from the step before to its own.
    changes = [0, *(np.flatnonzero(np.diff(batches)) + 1), len(batches) - 1]
    axes.step(
        [*(tokens[i] - batches[i] for i in changes[:-1]), tokens[-1]],
        batches[changes],
        where="post",
        color=palette.series(0),
    )
    axes.set_ylim(bottom=0, top=1.1 * batches.max())
    axes.set_ylabel("tokens per step")
    used = np.unique(batches)
    far_apart = len(used) <= 5 and (np.diff(used) > 0.1 * used[-1]).all()
    axes.yaxis.set_major_locator(FixedLocator(used) if far_apart else MaxNLocator(4))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: length(int(value)) if value % 1024 == 0 else short(value))
    )


def _draw_steps(
    axes: Axes,
    run: Run,
    palette: Palette,
    name: str,
    number: int,
    label: str | None = None,
    from_zero: bool = True,
) -> None:
    """A field of every step as points, with its running median."""
    values = column(run, name)
    tokens = column(run, "tokens")
    kept = thin(values)
    axes.plot(
        tokens[kept], values[kept], ".", markersize=2.5, color=palette.series(number), alpha=0.3
    )
    centers, medians = running_median(run, values)
    axes.plot(tokens[centers], medians, color=palette.series(number), linewidth=1.6, label=label)
    if from_zero:
        # A step that saved, or the first one, may leave the picture.
        high = np.nanquantile(np.append(values[np.isfinite(values)], np.nanmax(medians)), 0.99)
        axes.set_ylim(0, 1.15 * max(float(high), float(np.nanmax(medians))) or 1)
        axes.yaxis.set_major_locator(MaxNLocator(4))


# ---------------------------------------------------------------- the list


def _no_field(name: str, text: str = "") -> Callable[[Run], str | None]:
    """For a chart of one field of metrics.jsonl."""

    def missing(run: Run) -> str | None:
        return (
            None
            if np.isfinite(column(run, name)).any()
            else text or f"metrics.jsonl holds no {name}."
        )

    return missing


def _no_record(attribute: str, text: str) -> Callable[[Run], str | None]:
    return lambda run: None if getattr(run, attribute) else text


_NO_PASSKEY = (
    "Passkey retrieval was not evaluated in this run: validation.jsonl has no line of that kind."
)
CHARTS = {
    chart.name: chart
    for chart in (
        Chart("loss", "Loss", draw_loss, lambda run: None, is_wide=True),
        Chart(
            "late-loss",
            "Training loss after the first tenth",
            draw_late_loss,
            lambda run: None,
            "The scale fits what comes after the first tenth of the tokens.",
        ),
        Chart(
            "validation",
            "Validation loss at each length",
            draw_validation,
            _no_record("evaluations", "No validation loss was recorded in this run."),
            "An evaluation before the first step is left out where it is far above all others.",
        ),
        Chart(
            "gain",
            "Context gain",
            draw_gain,
            _no_record(
                "gains",
                "Context gain was not evaluated in this run: validation.jsonl has no line of that "
                "kind.",
            ),
        ),
        Chart(
            "passkey-map",
            "Passkey retrieval, last evaluation",
            draw_passkey_map,
            _no_record("passkeys", _NO_PASSKEY),
            over_tokens=False,
        ),
        Chart(
            "passkey",
            "Passkey retrieval over tokens",
            draw_passkey,
            _no_record("passkeys", _NO_PASSKEY),
            "The mean over all depths.",
        ),
        Chart("rate", "Throughput", draw_rate, _no_field("tokens_per_second")),
        Chart(
            "mfu",
            "Model FLOPs utilization",
            draw_mfu,
            _no_field(
                "mfu",
                "MFU is not known: metrics.jsonl has it as null where the hardware's rate is not known.",
            ),
        ),
        Chart(
            "memory",
            "Peak memory",
            draw_memory,
            _no_field("peak_memory_bytes"),
            "Of the rank that used most.",
        ),
        Chart(
            "time",
            "Step time",
            draw_time,
            _no_field("step_seconds"),
            "Waiting for data: of the slowest rank.",
        ),
        Chart("learning-rate", "Learning rate", draw_learning, _no_field("lr")),
        Chart(
            "gradient",
            "Gradient norm",
            draw_gradient,
            _no_field("grad_norm", "metrics.jsonl holds no finite grad_norm."),
        ),
        Chart("batch", "Global batch", draw_batch, lambda run: None),
    )
}


def chart_figure(chart: Chart, run: Run, palette: Palette, width: float, height: float) -> Figure:
    """One chart by itself, in inches; higher by the rows that its labels and its legend take beyond
    one each."""
    with settings():
        figure = new_figure(width, height)
        axes = figure.subplots()
        rows = 0
        chart.draw(axes, run, palette)
        if chart.over_tokens:
            scale = TokenScale(run)
            prepare(axes, run, palette, scale)
            axes.set_xlabel("tokens (positions consumed)")
            if chart.is_wide:
                rows = label_phases(axes, run, palette, scale) - 1
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            columns = min(len(labels), max(1, int(width * 11 / (max(map(len, labels)) + 6))))
            rows += -(-len(labels) // columns) - 1
            figure.legend(
                handles,
                labels,
                loc="outside lower left",
                ncols=columns,
                fontsize=9,
                frameon=False,
                labelcolor=palette["ink"],
            )
        figure.set_size_inches(width, height + 0.195 * rows)
    return figure


def draw_sheet(run: Run, palette: Palette = LIGHT) -> Figure:
    """Loss, throughput and learning rate on one sheet."""
    with settings():
        figure = new_figure(11, 8.5)
        panels = figure.subplots(3, 1, sharex=True, height_ratios=(4, 1.2, 1.2))
        scale = TokenScale(run)
        for axes, draw in zip(panels, (draw_loss, draw_rate, draw_learning), strict=True):
            draw(axes, run, palette)
            prepare(axes, run, palette, scale)
        panels[-1].set_xlabel("tokens (positions consumed)")
        label_phases(panels[0], run, palette, scale)
        panels[0].legend(fontsize=10, framealpha=0.9, loc="upper right")
        figure.suptitle(run.name, fontsize=13)
        figure.align_ylabels()
    return figure
