"""List the charts of a report, and draw the loss and the whole of a chart.

The curves of single steps are in step_charts.py, those of evaluations in validation_charts.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.reporting.axes import (
    LIGHT,
    MARKERS,
    Palette,
    TokenScale,
    column,
    first_tenth,
    fit_scale,
    label_phases,
    new_figure,
    prepare,
    round_ticks,
    running_median,
    settings,
    thin,
    window_of,
)
from tools.reporting.event_charts import draw_progress, mark_events
from tools.reporting.run_record import RunRecord
from tools.reporting.step_charts import (
    draw_batch,
    draw_gradient,
    draw_imbalance,
    draw_learning,
    draw_memory,
    draw_mfu,
    draw_rate,
    draw_source_losses,
    draw_time,
    draw_waits,
    has_numbers,
    source_names,
)
from tools.reporting.validation_charts import (
    draw_gain,
    draw_passkey,
    draw_passkey_map,
    draw_validation,
)

Draw = Callable[[Axes, RunRecord, Palette], None]
"""Draw a run's curves on the chart."""


@dataclass(frozen=True)
class Chart:
    """Describe one chart of the report."""

    name: str
    title: str
    draw: Draw
    missing: Callable[[RunRecord], str | None]
    """Why there is nothing to draw, or None."""
    caption: str = ""
    is_wide: bool = False
    """Does it take the whole width of the page?"""
    over_tokens: bool = True
    """Are tokens its horizontal scale?"""


# ---------------------------------------------------------------- loss


def draw_loss(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw training and validation loss, skipped steps, restarts and saves."""
    scale = TokenScale(run)
    losses = column(run, "loss")
    tokens = column(run, "tokens")
    centers, smoothed = running_median(run, losses)
    # Every step pale behind the running median; a short run has its steps alone.
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
    fit_scale(axes, [*smoothed, *_mark_validation(axes, run, palette)])
    mark_events(axes, run, palette, scale)
    axes.set_ylabel("loss (nats per token)")
    axes.yaxis.set_major_locator(round_ticks(6))


def draw_late_loss(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw training loss on a scale that fits what follows the first tenth of the tokens."""
    losses = column(run, "loss")
    tokens = column(run, "tokens")
    kept = thin(losses)
    centers, smoothed = running_median(run, losses)
    axes.plot(tokens[kept], losses[kept], color=palette["raw"], linewidth=0.8)
    axes.plot(tokens[centers], smoothed, color=palette.series(0), linewidth=1.6)
    fit_scale(axes, smoothed[tokens[centers] > first_tenth(run)])
    axes.set_ylabel("loss (nats per token)")
    axes.yaxis.set_major_locator(round_ticks(5))


def _mark_validation(axes: Axes, run: RunRecord, palette: Palette) -> list[float]:
    """Mark each set's loss at the length of the phase it was measured in; returns these losses."""
    # Losses at other lengths have a chart of their own.
    lengths = {(phase.name, phase.seq_length) for phase in run.phases()}
    own = [
        record
        for record in run.evaluations
        if record.get("seq_length") is None
        or "phase" not in record
        or (record["phase"], record["seq_length"]) in lengths
    ]
    # A marker for each set.
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


# ---------------------------------------------------------------- the list


def _no_field(name: str, text: str = "") -> Callable[[RunRecord], str | None]:
    """Make the check of a chart of one field of metrics.jsonl."""

    def missing(run: RunRecord) -> str | None:
        return None if has_numbers(run, name) else text or f"metrics.jsonl holds no {name}."

    return missing


def _no_record(attribute: str, text: str) -> Callable[[RunRecord], str | None]:
    """Make the check of a chart of one kind of evaluation."""
    return lambda run: None if getattr(run, attribute) else text


_NO_PASSKEY = (
    "Passkey retrieval was not evaluated in this run: validation.jsonl has no line of that kind."
)
# In the order of the page.
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
            "source-loss",
            "Training loss of each source",
            draw_source_losses,
            lambda run: None if source_names(run) else "metrics.jsonl holds no loss per source.",
            "The running median of the steps in which the source had a target; the scale fits what "
            "comes after the first tenth of the tokens.",
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
                "MFU is not known: metrics.jsonl has it as null where the hardware's rate is not "
                "known.",
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
        Chart(
            "waits",
            "Waiting",
            draw_waits,
            _no_field("data_share"),
            "For data: the slowest rank. For other ranks, in collectives: the mean of all ranks, "
            "which is not known on GPUs.",
        ),
        Chart(
            "imbalance",
            "Work of the slowest ranks",
            draw_imbalance,
            _no_field(
                "imbalance",
                "Samples were not dealt by their cost: --balance none, or one data rank.",
            ),
            "FLOPs that a step waits for, over the mean of the data ranks.",
        ),
        Chart("learning-rate", "Learning rate", draw_learning, _no_field("lr")),
        Chart(
            "gradient",
            "Gradient norm",
            draw_gradient,
            _no_field("grad_norm", "metrics.jsonl holds no finite grad_norm."),
        ),
        Chart("batch", "Global batch", draw_batch, lambda run: None),
        Chart(
            "progress",
            "Tokens over the time of day",
            draw_progress,
            _no_record("events", "No time of day is known: events.jsonl is missing or empty."),
            "Between events the line is straight; where it falls, steps were done again.",
            over_tokens=False,
        ),
    )
}


def chart_figure(
    chart: Chart, run: RunRecord, palette: Palette, width: float, height: float
) -> Figure:
    """Draw one chart by itself.

    Args:
        width, height: in inches; further rows of labels and of the legend add to the height.
    """
    with settings():
        figure = new_figure(width, height)
        axes = figure.subplots()
        rows = 0
        # The curves first: a chart may choose its own vertical scale.
        chart.draw(axes, run, palette)
        if chart.over_tokens:
            scale = TokenScale(run)
            prepare(axes, run, palette, scale)
            axes.set_xlabel("tokens (positions consumed)")
            if chart.is_wide:
                rows = label_phases(axes, run, palette, scale) - 1
        # The legend stands below the chart, in as many columns as the width has room for.
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


def draw_sheet(run: RunRecord, palette: Palette = LIGHT) -> Figure:
    """Draw loss, throughput and learning rate on one sheet."""
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
