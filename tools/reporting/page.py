"""Fill the page of a report (template: page.html): its words, tables and charts."""

import statistics
import time
from pathlib import Path

from markupsafe import Markup

from tools.reporting.alt_text import describe_figure
from tools.reporting.axes import VARIABLES, TokenScale, to_svg
from tools.reporting.charts import CHARTS, Chart, chart_figure
from tools.reporting.facts_table import about, parameters
from tools.reporting.html import render
from tools.reporting.phase_table import phase_rows
from tools.reporting.run_record import RunRecord, before_and_after, repeated_tokens, series_of
from tools.reporting.validation_charts import last_passkeys
from tools.shared.number_text import (
    NOTHING,
    duration,
    gain_text,
    includes_zero,
    interval_text,
    length,
    loss_text,
    moment,
    short,
)

WIDE = (9.4, 4.3)
"""Size of a chart across the page, in inches."""
NARROW = (4.7, 3.9)
"""Size of such a chart on a narrow screen, in inches."""
CARD = (5.4, 2.9)
"""Size of a chart on half the page, in inches."""
OPEN_EVENTS = 20
"""A longer table of events is closed at first."""
MOST_EVENTS = 2000
"""Events beyond these are not listed, the oldest first."""


HOW_IT_RAN = (
    "rate",
    "mfu",
    "memory",
    "time",
    "waits",
    "imbalance",
    "learning-rate",
    "gradient",
    "batch",
    "progress",
)
"""Charts of the section of that name."""


def page(run: RunRecord, refresh_seconds: int | None = None) -> str:
    """Make the whole page as HTML. Everything that comes from the run is escaped.

    Args:
        refresh_seconds: the browser reads the page again after this time; None = never.
    """
    return render(
        Path(__file__).with_name("page.html"),
        run=run,
        tiles=tiles(run),
        state=state_text(run, time.time(), refresh_seconds),
        refresh_seconds=refresh_seconds,
        lead=lead(run),
        about=about(run),
        phases=phase_rows(run),
        is_stretched=TokenScale(run).is_stretched,
        charts={name: chart_html(CHARTS[name], run) for name in CHARTS},
        captions={name: chart.caption for name, chart in CHARTS.items()},
        titles={name: chart.title for name, chart in CHARTS.items()},
        has_sources=not CHARTS["source-loss"].missing(run),
        how_it_ran=[name for name in HOW_IT_RAN if not CHARTS[name].missing(run)],
        left_out=[why for name in HOW_IT_RAN if (why := CHARTS[name].missing(run))],
        gains=gain_rows(run),
        repeats=repeats(run),
        drawn=[
            totals for totals in (_total(run, skipped=False), _total(run, skipped=True)) if totals
        ],
        account=run.account,
        account_tokens=run.account_tokens,
        events=event_rows(run),
        num_events=len(run.events),
        is_long=len(run.events) > OPEN_EVENTS,
        passkey_at=_last_passkey_tokens(run),
    )


def chart_html(chart: Chart, run: RunRecord) -> Markup:
    """Draw the chart as inline SVG, or give the sentence that says why there is none."""
    if sentence := chart.missing(run):
        return Markup('<p class="none">{}</p>').format(sentence)
    parts = []
    for size, inches in sizes(chart, run).items():
        figure = chart_figure(chart, run, VARIABLES, *inches)
        # to_svg escapes what it is given.
        text = describe_figure(figure, chart.title)
        svg = Markup(to_svg(figure, f"{chart.name}-{size}", text))
        parts.append(Markup('<div class="chart {}">{}</div>').format(size, svg))
    return Markup("").join(parts)


def sizes(chart: Chart, run: RunRecord) -> dict[str, tuple[float, float]]:
    """Map each form in which a chart stands on the page to its size in inches, the main one first.

    A form is a class of the page's style; the style shows one of them.
    """
    if chart.is_wide:
        return {"wide": WIDE, "narrow": NARROW}
    # A map grows with its rows.
    rows = len({depth for depth, _ in last_passkeys(run)}) if chart.name == "passkey-map" else 0
    return {"card": (CARD[0], max(CARD[1], 0.8 + 0.3 * rows))}


# ---------------------------------------------------------------- words


def tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """List the run's main figures as (what, figure, what it is compared with)."""
    last = run.steps[-1]
    first = run.steps[0]
    phases = run.phases()
    found = [
        ("tokens", short(last["tokens"]), f"{last['step']:,} steps"),
        ("context", length(phases[-1].seq_length), f"from {length(phases[0].seq_length)}"),
        ("training loss", f"{last['loss']:.3f}", f"from {first['loss']:.3f}"),
    ]
    # What was evaluated, as far as it was.
    if run.evaluations:
        (_, seq_length), records = _main_series(run, run.evaluations)
        found.append(
            (
                "validation loss",
                f"{records[-1]['valid_loss']:.3f}",
                f"{_at(seq_length, ', ')}from {records[0]['valid_loss']:.3f}",
            )
        )
    if run.gains:
        (_, seq_length), records = _main_series(run, run.gains)
        found.append(
            (
                "context gain",
                f"{records[-1]['gain']:+.3f}",
                f"{_at(seq_length, ', ')}{_doubt(records[-1])}",
            )
        )
    if run.passkeys:
        found.append(
            (
                "keys found",
                f"{100 * statistics.fmean(last_passkeys(run).values()):.0f} %",
                "all lengths and depths",
            )
        )
    speeds = [step["tokens_per_second"] for step in run.steps_of(phases[-1])]
    return [*found, ("tokens / s", short(statistics.median(speeds)), "median of the last phase")]


def _doubt(record: dict) -> str:
    """Say how sure a context gain is, in the few words that a tile has room for."""
    interval = interval_text(record)
    if not interval:
        return "nats per token; no interval"
    return f"{interval}: not distinguishable from 0" if includes_zero(record) else interval


def state_text(run: RunRecord, now: float, refresh_seconds: int | None) -> str:
    """Say when the page was made, and whether the run went on then."""
    made = f"This page was made at {moment(now)} UTC"
    outcome = run.outcome()
    if outcome is not None:
        ended = {"done": "is done", "stopped": "was stopped"}.get(outcome["event"], "was refused")
        text = f": {outcome['text']}" if outcome.get("text") else ""
        return f"{made}. The run {ended} since {moment(outcome['time'])} UTC{text}."
    if refresh_seconds is not None:
        return f"{made} while the run goes on, and reads itself again every {refresh_seconds} s."
    return f"{made}. No event says that the run has ended."


def _main_series(run: RunRecord, records: list[dict]) -> tuple[tuple[str, int | None], list[dict]]:
    """Choose the series of the last phase's length, else the one with the latest record."""
    series = series_of(records)
    # The context that the run ended with says most.
    final = run.phases()[-1].seq_length
    return next(
        (item for item in series.items() if item[0][1] == final),
        max(series.items(), key=lambda item: item[1][-1]["tokens"]),
    )


def lead(run: RunRecord) -> list[str]:
    """Describe the run in a few sentences."""
    last = run.steps[-1]
    phases = run.phases()
    model = f"A model of {parameters(run)} parameters" if parameters(run) else "The model"
    over = f"over {len(phases)} phases" if len(phases) > 1 else "in one phase"
    said = [f"{model} has read {short(last['tokens'])} tokens in {last['step']:,} steps {over}."]
    if run.gains:
        (_, seq_length), records = _main_series(run, run.gains)
        interval = interval_text(records[-1])
        said.append(
            f"The context gain {_at(seq_length, ' ')}is {gain_text(records[-1])}"
            f"{'' if interval else ' (no interval: too few documents)'}"
            f"{', not distinguishable from 0' if includes_zero(records[-1]) else ''}: "
            "with the whole context the loss per token is this many nats lower than with its last "
            f"{length(records[-1]['cut'])}."
        )
    # Interruptions and skipped steps: whoever reads the curves should know of them.
    unplanned, planned = run.restarts()
    # Steps without an update.
    skipped = sum(bool(step.get("skipped")) for step in run.steps)
    if run.events:
        crossed = f", and {_times(len(planned))} for another layout" if planned else ""
        said.append(f"It was interrupted and started again {_times(len(unplanned))}{crossed}.")
    said.append(
        f"{skipped or 'No'} {'step was' if skipped == 1 else 'steps were'} skipped for "
        "a spike, or a loss or gradient that is not finite."
    )
    # Older records have no times.
    seconds = sum(step.get("step_seconds") or 0 for step in run.steps)
    if seconds:
        said.append(f"The steps took {duration(seconds)}, without evaluations, saves and restarts.")
    return said


def _at(seq_length: int | None, end: str) -> str:
    """Spell "at <length>" and `end`; empty where the length is not known."""
    return f"at {length(seq_length)}{end}" if seq_length else ""


def _times(count: int) -> str:
    return {0: "not at all", 1: "once", 2: "twice"}.get(count, f"{count:,} times")


# ---------------------------------------------------------------- tables


def gain_rows(run: RunRecord) -> list[dict]:
    """Make a row per phase, set and length, with the gain before and after it."""
    rows = []
    for span in run.phases():
        for (name, seq_length), records in series_of(run.gains).items():
            before, after = before_and_after(records, span)
            shown = after or before
            # Another length than the phase's is of interest where the phase changed it.
            changed = before is not None and after is not None
            if shown is None or not (changed or seq_length == span.seq_length):
                continue
            change = NOTHING
            if before is not None and after is not None:
                change = f"{after['gain'] - before['gain']:+.3f}"
            documents = shown.get("documents")
            rows.append(
                {
                    "phase": span.name,
                    "set": name,
                    "length": length(seq_length) if seq_length else NOTHING,
                    "cut": length(shown["cut"]),
                    "before": gain_text(before) if before else NOTHING,
                    "after": gain_text(after) if after else NOTHING,
                    "change": change,
                    "full": loss_text(shown.get("loss_full")),
                    "short": loss_text(shown.get("loss_cut")),
                    "documents": NOTHING if documents is None else f"{documents:,}",
                }
            )
    return rows


def _total(run: RunRecord, *, skipped: bool) -> dict | None:
    """Sum up the rows of the account that were drawn, or that were passed over."""
    rows = [row for row in run.account if row["skipped"] == skipped]
    if not rows:
        return None
    totals = {key: sum(row[key] for row in rows) for key in ("samples", "tokens", "documents")}
    return {"name": "passed over" if skipped else "drawn", **totals}


def repeats(run: RunRecord) -> str:
    """Say in one sentence how many tokens were repeated."""
    # Per source: an epoch ends for each by itself.
    found = repeated_tokens(run.account)
    repeated = sum(again for again, _ in found.values())
    drawn = sum(total for _, total in found.values())
    if not repeated:
        return (
            f"None of the {drawn:,} tokens drawn was a repetition: "
            "no source went beyond its first epoch."
        )
    parts = ", ".join(f"{source} {again:,}" for source, (again, _) in found.items() if again)
    return (
        f"{repeated:,} of the {drawn:,} tokens drawn ({100 * repeated / max(1, drawn):.1f} %) "
        f"were repeated, drawn in a second or later epoch of their source: {parts}."
    )


def event_rows(run: RunRecord) -> list[dict]:
    """List the last `MOST_EVENTS` events as texts, newest last."""
    return [
        {
            "time": moment(event["time"]),
            "step": f"{event['step']:,}",
            "tokens": short(event["tokens"]),
            "event": event["event"],
            "text": event.get("text", ""),
        }
        for event in run.events[-MOST_EVENTS:]
    ]


def _last_passkey_tokens(run: RunRecord) -> str:
    return short(max(record["tokens"] for record in run.passkeys)) if run.passkeys else ""
