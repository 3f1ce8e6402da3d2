"""Fill the page of a report (template: page.html): its words, tables and charts."""

import statistics
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from markupsafe import Markup

from pretrain.planner.model_size import ModelSize
from tools.reporting.axes import VARIABLES, TokenScale, style_rules, to_svg
from tools.reporting.charts import CHARTS, Chart, chart_figure
from tools.reporting.phase_table import phase_rows
from tools.reporting.run_record import RunRecord, before_and_after, repeated_tokens, series_of
from tools.reporting.validation_charts import last_passkeys
from tools.shared.number_text import NOTHING, gain_text, interval_text, length, loss_text, short

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


def page(run: RunRecord) -> str:
    """Make the whole page as HTML. Everything that comes from the run is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    # Declarations of CSS and drawings are ours; everything else is escaped by autoescape.
    light, dark = map(Markup, style_rules())
    return environment.get_template("page.html").render(
        run=run,
        light=light,
        dark=dark,
        tiles=tiles(run),
        lead=lead(run),
        about=about(run),
        phases=phase_rows(run),
        is_stretched=TokenScale(run).is_stretched,
        charts={name: chart_html(CHARTS[name], run) for name in CHARTS},
        captions={name: chart.caption for name, chart in CHARTS.items()},
        titles={name: chart.title for name, chart in CHARTS.items()},
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
        svg = Markup(to_svg(figure, f"{chart.name}-{size}", chart.title))
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
                f"{_at(seq_length, ', ')}nats per token",
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
            f"{'' if interval else ' (no interval: too few documents)'}: "
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
        "a gradient that is not finite."
    )
    # Older records have no times.
    seconds = sum(step.get("step_seconds") or 0 for step in run.steps)
    if seconds:
        said.append(
            f"The steps took {_duration(seconds)}, without evaluations, saves and restarts."
        )
    return said


def parameters(run: RunRecord) -> str | None:
    """Spell the number of parameters; None where the configuration is not known."""
    if run.config is None or run.config.data.vocab_size is None:
        return None
    return short(ModelSize(run.config.model, run.config.data.vocab_size).num_parameters)


def about(run: RunRecord) -> list[tuple[str, str]]:
    """List (what, value) of the model and the latest checkpoint."""
    rows = []
    # Without a readable checkpoint, only what the steps say is known.
    if run.config is not None:
        model = run.config.model
        vocab_size = run.config.data.vocab_size
        exact = ModelSize(model, vocab_size).num_parameters if vocab_size else None
        rows += [
            ("parameters", f"{exact:,}" if exact else "not known"),
            (
                "model",
                f"{f'{model.model}: ' if model.model else ''}{model.num_layers} layers, "
                f"width {model.hidden_size:,}, {model.num_attention_heads} heads, "
                f"{model.num_kv_heads} key/value heads, "
                f"vocabulary {run.config.data.vocab_size or 0:,}",
            ),
        ]
    trained = f"{run.steps[-1]['tokens']:,} positions"
    real = run.steps[-1].get("real_tokens")
    if real is not None:
        trained += f", {real:,} of them not padding"
    rows.append(("tokens trained", trained))
    if run.progress is not None:
        world = run.progress.world_size
        by = f", written by {world:,} process{'' if world == 1 else 'es'}" if world else ""
        rows.append(("latest checkpoint", f"step {run.progress.step:,}{by}"))
    return rows


def _at(seq_length: int | None, end: str) -> str:
    """Spell "at <length>" and `end`; empty where the length is not known."""
    return f"at {length(seq_length)}{end}" if seq_length else ""


def _times(count: int) -> str:
    return {0: "not at all", 1: "once", 2: "twice"}.get(count, f"{count:,} times")


def _duration(seconds: float) -> str:
    for limit, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.1f} seconds"


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
            "time": datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%S"),
            "step": f"{event['step']:,}",
            "tokens": short(event["tokens"]),
            "event": event["event"],
            "text": event.get("text", ""),
        }
        for event in run.events[-MOST_EVENTS:]
    ]


def _last_passkey_tokens(run: RunRecord) -> str:
    return short(max(record["tokens"] for record in run.passkeys)) if run.passkeys else ""
