"""Draw what each training step recorded: rate, memory, time, gradient, batch."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, PercentFormatter

from tools.reporting.axes import (
    SERIES,
    Palette,
    column,
    first_tenth,
    fit_scale,
    round_ticks,
    running_median,
    thin,
)
from tools.reporting.run_record import RunRecord
from tools.shared.number_text import length, short

LINE_STYLES = ("-", "--", ":", "-.")
"""Styles of lines that tell curves of one colour apart."""
LONGEST_NAME = 40
"""Characters of a source's name that a chart has room for, its last ones."""


def draw_rate(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw tokens per second."""
    _draw_steps(axes, run, palette, "tokens_per_second", 2)
    axes.set_ylabel("tokens / s")
    axes.yaxis.set_major_formatter(FuncFormatter(short))


def draw_mfu(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw the model FLOPs utilization."""
    _draw_steps(axes, run, palette, "mfu", 2)
    axes.set_ylabel("MFU")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def draw_memory(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw the peak memory in GiB."""
    values = column(run, "peak_memory_bytes", 2.0**-30)
    tokens = column(run, "tokens")
    kept = thin(values)
    axes.plot(tokens[kept], values[kept], color=palette.series(3))
    axes.set_ylim(0, 1.1 * float(np.nanmax(values)) or 1)
    axes.ticklabel_format(axis="y", useOffset=False, style="plain")
    axes.set_ylabel("GiB")
    axes.yaxis.set_major_locator(round_ticks(4))


def draw_time(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw the seconds of a step, and those of it spent waiting for data."""
    _draw_steps(axes, run, palette, "step_seconds", 0, "step")
    _draw_steps(axes, run, palette, "data_seconds", 1, "of it waiting for data", from_zero=False)
    axes.set_ylabel("seconds")


def draw_waits(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw the shares of a step that wait for data, and in collectives for other ranks."""
    if has_numbers(run, "communication_share"):
        _draw_steps(axes, run, palette, "communication_share", 4, "other ranks", from_zero=False)
    _draw_steps(axes, run, palette, "data_share", 1, "data", from_zero=False)
    axes.set_ylabel("share of the step")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def draw_imbalance(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw what the slowest ranks of a step compute over the mean, dealt and in order."""
    for name, series, label in (
        ("imbalance_in_order", 3, "in the order drawn"),
        ("imbalance", 2, "dealt by cost"),
    ):
        _draw_steps(axes, run, palette, name, series, label, from_zero=False)
    axes.set_ylabel("slowest ranks / mean")


def draw_source_losses(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw the running median of each source's training loss."""
    tokens = column(run, "tokens")
    late: list[float] = []
    for number, name in enumerate(source_names(run)):
        # A step without a target of the source has no value, and breaks no line.
        losses = np.array([_source_loss(step, name) for step in run.steps])
        centers, medians = running_median(run, losses)
        known = np.isfinite(medians)
        late += medians[tokens[centers] > first_tenth(run)].tolist()
        axes.plot(
            tokens[centers[known]],
            medians[known],
            color=palette.series(number),
            linestyle=LINE_STYLES[number // SERIES % len(LINE_STYLES)],
            linewidth=1.6,
            label=name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :],
        )
    fit_scale(axes, late)
    axes.set_ylabel("loss (nats per token)")
    axes.yaxis.set_major_locator(round_ticks(5))


def source_names(run: RunRecord) -> list[str]:
    """List the sources whose losses some step tells, in the order in which they first come."""
    names = (
        name
        for step in run.steps
        for name in step.get("source_losses") or {}
        if math.isfinite(_source_loss(step, name))
    )
    return list(dict.fromkeys(names))


def _source_loss(step: dict, name: str) -> float:
    """Return a source's loss in a step; NaN where it had no target, or is not told."""
    value = (step.get("source_losses") or {}).get(name)
    return math.nan if value is None else value


def has_numbers(run: RunRecord, name: str) -> bool:
    """Tell whether some step has a finite number in a field."""
    return bool(np.isfinite(column(run, name)).any())


def draw_learning(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw the learning rate."""
    rates = column(run, "lr")
    tokens = column(run, "tokens")
    kept = thin(rates)
    axes.plot(tokens[kept], rates[kept], color=palette.series(3))
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(round_ticks(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))


def draw_gradient(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw the gradient norm."""
    norms = column(run, "grad_norm")
    # A logarithmic scale where a few steps are far above the others.
    positive = norms[np.isfinite(norms) & (norms > 0)]
    if len(positive) and positive.max() > 20 * np.median(positive):
        axes.set_yscale("log")
    _draw_steps(axes, run, palette, "grad_norm", 4, from_zero=axes.get_yscale() == "linear")
    axes.set_ylabel("gradient norm")


def draw_batch(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw the tokens of a step."""
    batches = np.array(run.batches(), dtype=float)
    tokens = column(run, "tokens")
    # Only where it changes, and at both ends: a batch lasts from the step before to its own.
    changes = [0, *(np.flatnonzero(np.diff(batches)) + 1), len(batches) - 1]
    axes.step(
        [*(tokens[i] - batches[i] for i in changes[:-1]), tokens[-1]],
        batches[np.array(changes)],
        where="post",
        color=palette.series(0),
    )
    axes.set_ylim(bottom=0, top=1.1 * batches.max())
    axes.set_ylabel("tokens per step")
    # Each batch size has a tick, unless there are many or two are close.
    used = np.unique(batches)
    far_apart = len(used) <= 5 and (np.diff(used) > 0.1 * used[-1]).all()
    axes.yaxis.set_major_locator(FixedLocator(used.tolist()) if far_apart else round_ticks(4))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: length(int(value)) if value % 1024 == 0 else short(value))
    )


def _draw_steps(
    axes: Axes,
    run: RunRecord,
    palette: Palette,
    name: str,
    number: int,
    label: str | None = None,
    *,
    from_zero: bool = True,
) -> None:
    """Draw a field of every step as points, with its running median."""
    values = column(run, name)
    tokens = column(run, "tokens")
    kept = thin(values)
    axes.plot(
        tokens[kept], values[kept], ".", markersize=2.5, color=palette.series(number), alpha=0.3
    )
    centers, medians = running_median(run, values)
    axes.plot(tokens[centers], medians, color=palette.series(number), linewidth=1.6, label=label)
    if from_zero:
        # The slow few, as a first step or one that saved, may leave the picture.
        high = np.nanquantile(np.append(values[np.isfinite(values)], np.nanmax(medians)), 0.99)
        axes.set_ylim(0, 1.15 * max(float(high), float(np.nanmax(medians))) or 1)
        axes.yaxis.set_major_locator(round_ticks(4))
