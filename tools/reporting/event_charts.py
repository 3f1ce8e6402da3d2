"""Draw what happened to a run: on the axis of its tokens, and over the time of day."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from tools.reporting.axes import Palette, TokenScale, clothe, distinct, round_ticks
from tools.reporting.run_record import RunRecord
from tools.shared.number_text import short

TIME_UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"))
"""Seconds from which a unit is used, seconds of one, its name; below them seconds."""


@dataclass(frozen=True)
class EventKind:
    """Says which events get one marker, and where on the loss chart it stands."""

    label: str
    find: Callable[[RunRecord], list[dict]]
    marker: str
    color: str
    height: float
    """Share of the chart's height."""


def _of(*kinds: str) -> Callable[[RunRecord], list[dict]]:
    return lambda run: [event for event in run.events if event["event"] in kinds]


KINDS = (
    EventKind("checkpoint", _of("save"), "|", "muted", 0.0),
    EventKind("restart", lambda run: run.restarts()[0], "v", "series-3", 0.975),
    EventKind("restart for another layout", lambda run: run.restarts()[1], "d", "series-2", 0.975),
    EventKind("spike", _of("spike", "rewind"), "^", "series-1", 0.05),
    EventKind("slow rank", _of("slow rank"), "s", "series-4", 0.93),
    EventKind("fault found", _of("damaged", "flip", "replay", "refused"), "P", "series-6", 0.93),
)


def mark_events(axes: Axes, run: RunRecord, palette: Palette, scale: TokenScale) -> None:
    """Mark skipped steps and events along the edges of a chart over tokens."""
    skipped = [step["tokens"] for step in run.steps if step.get("skipped")]
    _mark(axes, palette["ink"], scale, skipped, "x", 0.02, "skipped step")
    for kind in KINDS:
        tokens = [event["tokens"] for event in kind.find(run)]
        _mark(axes, palette[kind.color], scale, tokens, kind.marker, kind.height, kind.label)


def _mark(
    axes: Axes,
    color: str,
    scale: TokenScale,
    tokens: list[int],
    marker: str,
    height: float,
    label: str,
) -> None:
    # A kind without any event has no entry in the legend.
    if tokens:
        marks = distinct(tokens, scale)
        axes.plot(
            marks,
            [height] * len(marks),
            marker,
            color=color,
            markersize=6,
            clip_on=False,
            transform=axes.get_xaxis_transform(),
            label=label,
            zorder=6,
        )


def draw_progress(axes: Axes, run: RunRecord, palette: Palette) -> None:
    """Draw the tokens consumed over the time since the first start, with the events on the line."""
    begun = run.events[0]["time"]
    points = [(event["time"], event["tokens"]) for event in run.events]
    # What was trained since the last event of a run that goes on.
    goes_on = run.outcome() is None
    if goes_on and run.written is not None and run.written > points[-1][0]:
        points.append((run.written, run.steps[-1]["tokens"]))
    span = points[-1][0] - begun
    unit, name = next(
        ((unit, name) for least, unit, name in TIME_UNITS if span >= least), (1, "seconds")
    )
    axes.plot(
        [(time - begun) / unit for time, _ in points],
        [tokens for _, tokens in points],
        color=palette.series(0),
        linewidth=1.6,
    )
    for kind in KINDS:
        events = kind.find(run)
        if events:
            axes.plot(
                [(event["time"] - begun) / unit for event in events],
                [event["tokens"] for event in events],
                kind.marker,
                color=palette[kind.color],
                markersize=6,
                clip_on=False,
                zorder=5,
                label=kind.label,
            )
    clothe(axes, palette)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{name} since the first start")
    axes.set_ylabel("tokens")
    axes.xaxis.set_major_locator(round_ticks(6))
    axes.yaxis.set_major_locator(round_ticks(4))
    axes.yaxis.set_major_formatter(FuncFormatter(short))
