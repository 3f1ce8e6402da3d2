"""The page of a report: its words, its tables, and the charts in their places (template:
page.html)."""

import dataclasses
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from markupsafe import Markup

from pretrain.planner.auto_layout import with_choice
from pretrain.planner.model_size import num_parameters
from pretrain.schedule.phases import Phase
from pretrain.schedule.resolve import resolve_phases
from tools.reporting.axes import VARIABLES, TokenScale, style_rules, to_svg
from tools.reporting.charts import CHARTS, Chart, chart_figure, last_passkeys
from tools.reporting.run_record import Run, Stretch, before_and_after, repeated_tokens, series_of
from tools.shared.number_text import gibibytes, length, short

WIDE = (9.4, 4.3)
NARROW = (4.7, 3.9)
CARD = (5.4, 2.9)
"""Sizes of charts in inches: across the page, the same on a narrow screen, and half the page."""
OPEN_EVENTS = 20
"""A longer table of events is closed at first."""
MOST_EVENTS = 2000
NOTHING = "–"


def page(run: Run) -> str:
    """The whole page as HTML. Everything that comes from the run is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
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
        drawn=[totals for totals in (_total(run, False), _total(run, True)) if totals],
        account=run.account,
        account_tokens=run.account_tokens,
        events=event_rows(run),
        num_events=len(run.events),
        is_long=len(run.events) > OPEN_EVENTS,
        passkey_at=_last_passkey_tokens(run),
    )


def chart_html(chart: Chart, run: Run) -> Markup:
    """The chart as inline SVG, or the sentence that says why there is none."""
    if sentence := chart.missing(run):
        return Markup('<p class="none">{}</p>').format(sentence)
    return Markup("").join(
        Markup('<div class="chart {}">{}</div>').format(
            size,
            Markup(
                to_svg(
                    chart_figure(chart, run, VARIABLES, *inches),
                    f"{chart.name}-{size}",
                    chart.title,
                )
            ),
        )
        for size, inches in sizes(chart, run).items()
    )


def sizes(chart: Chart, run: Run) -> dict[str, tuple[float, float]]:
    """Class in the page's style -> inches, of each form in which a chart stands there; the main one
    first."""
    if chart.is_wide:
        return {"wide": WIDE, "narrow": NARROW}
    rows = len({depth for depth, _ in last_passkeys(run)}) if chart.name == "passkey-map" else 0
    return {"card": (CARD[0], max(CARD[1], 0.8 + 0.3 * rows))}


# ---------------------------------------------------------------- words


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(what, figure, what it is compared with) of the run's main figures."""
    last = run.steps[-1]
    first = run.steps[0]
    phases = run.phases()
    found = [
        ("tokens", short(last["tokens"]), f"{last['step']:,} steps"),
        ("context", length(phases[-1].seq_length), f"from {length(phases[0].seq_length)}"),
        ("training loss", f"{last['loss']:.3f}", f"from {first['loss']:.3f}"),
    ]
    if run.evaluations:
        (_, seq_length), records = _main_series(run, run.evaluations)
        found.append(
            (
                "validation loss",
                f"{records[-1]['valid_loss']:.3f}",
                (f"at {length(seq_length)}, " if seq_length else "")
                + f"from {records[0]['valid_loss']:.3f}",
            )
        )
    if run.gains:
        (_, seq_length), records = _main_series(run, run.gains)
        found.append(
            (
                "context gain",
                f"{records[-1]['gain']:+.3f}",
                f"at {length(seq_length)}, nats per token",
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


def _main_series(run: Run, records: list[dict]) -> tuple[tuple[str, int | None], list[dict]]:
    """The series of the last phase's length, of the first set; else the one with the last
    record."""
    series = series_of(records)
    final = run.phases()[-1].seq_length
    return next(
        (item for item in series.items() if item[0][1] == final),
        max(series.items(), key=lambda item: item[1][-1]["tokens"]),
    )


def lead(run: Run) -> list[str]:
    """The run in a few sentences."""
    last = run.steps[-1]
    phases = run.phases()
    model = f"A model of {parameters(run)} parameters" if parameters(run) else "The model"
    over = f"over {len(phases)} phases" if len(phases) > 1 else "in one phase"
    said = [f"{model} has read {short(last['tokens'])} tokens in {last['step']:,} steps {over}."]
    if run.gains:
        (_, seq_length), records = _main_series(run, run.gains)
        interval = _interval_text(records[-1])
        said.append(
            f"The context gain at {length(seq_length)} is {gain_text(records[-1])}"
            f"{'' if interval else ' (no interval: too few documents)'}: so many nats per token does the whole "
            f"context give over its last {length(records[-1]['cut'])}."
        )
    unplanned, planned = run.restarts()
    skipped = sum(bool(step.get("skipped")) for step in run.steps)
    if run.events:
        crossed = f", and {_times(len(planned))} for another layout" if planned else ""
        said.append(f"It was interrupted and started again {_times(len(unplanned))}{crossed}.")
    said.append(
        f"{skipped or 'No'} step{'' if skipped == 1 else 's'} {'was' if skipped == 1 else 'were'} skipped for "
        "a gradient that is not finite."
    )
    seconds = sum(step.get("step_seconds") or 0 for step in run.steps)
    if seconds:
        said.append(
            f"The steps took {_duration(seconds)}, without evaluations, saves and restarts."
        )
    return said


def parameters(run: Run) -> str | None:
    """The model's size, if the checkpoint's configuration is known."""
    if run.config is None or run.config.data.vocab_size is None:
        return None
    return short(num_parameters(run.config.model, run.config.data.vocab_size))


def about(run: Run) -> list[tuple[str, str]]:
    """(what, value) of the model and the latest checkpoint."""
    rows = []
    if run.config is not None:
        model = run.config.model
        exact = (
            num_parameters(model, run.config.data.vocab_size)
            if run.config.data.vocab_size
            else None
        )
        rows += [
            ("parameters", f"{exact:,}" if exact else "not known"),
            (
                "model",
                f"{f'{model.model}: ' if model.model else ''}{model.num_layers} layers, width "
                f"{model.hidden_size:,}, {model.num_attention_heads} heads, {model.num_kv_heads} key/value "
                f"heads, vocabulary {run.config.data.vocab_size or 0:,}",
            ),
        ]
    rows += [
        (
            "tokens trained",
            f"{run.steps[-1]['tokens']:,} positions"
            + (
                f", {real:,} of them not padding"
                if (real := run.steps[-1].get("real_tokens")) is not None
                else ""
            ),
        )
    ]
    if run.progress is not None:
        world = run.progress.world_size
        by = f", written by {world:,} process{'' if world == 1 else 'es'}" if world else ""
        rows.append(("latest checkpoint", f"step {run.progress.step:,}{by}"))
    return rows


def _times(count: int) -> str:
    return {0: "not at all", 1: "once", 2: "twice"}.get(count, f"{count:,} times")


def _duration(seconds: float) -> str:
    for limit, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.1f} seconds"


# ---------------------------------------------------------------- tables


def phase_rows(run: Run) -> list[dict]:
    """A row of texts per stretch; a cell with several lines is a list."""
    planned = _planned_phases(run)
    batch_of = dict(zip((step["tokens"] for step in run.steps), run.batches(), strict=True))
    return [
        _phase_row(run, stretch, planned.get(stretch.name), batch_of) for stretch in run.phases()
    ]


def _phase_row(run: Run, stretch: Stretch, planned: Phase | None, batch_of: dict[int, int]) -> dict:
    steps = run.steps_of(stretch)
    batches = [batch_of[step["tokens"]] for step in steps]
    low = min(batches)
    high = max(batches)
    memory = [
        step["peak_memory_bytes"] for step in steps if step.get("peak_memory_bytes") is not None
    ]
    return {
        "name": stretch.name,
        "length": length(stretch.seq_length),
        "tokens": short(stretch.end - stretch.begin),
        "batch": length(low) if low == high else f"{length(low)} to {length(high)}",
        "layout": _layout_text(planned) if planned else NOTHING,
        "rope": _rope_text(planned) if planned else NOTHING,
        "rate": short(statistics.median(step["tokens_per_second"] for step in steps)),
        "memory": gibibytes(max(memory)) if memory else NOTHING,
        "loss": _changes(run.evaluations, stretch, lambda record: f"{record['valid_loss']:.4f}"),
        "gain": _changes(run.gains, stretch, gain_text, " →\n", most=1),
    }


def _changes(
    records: list[dict],
    stretch: Stretch,
    text: Callable[[dict], str],
    arrow: str = " → ",
    most: int = 8,
) -> list[str]:
    """ "before → after" of up to `most` sets at the phase's length, as lines."""
    lines = []
    series = [
        item for item in series_of(records).items() if item[0][1] in (None, stretch.seq_length)
    ]
    for (name, _), found in series[:most]:
        before, after = before_and_after(found, stretch)
        if before or after:
            pair = arrow.join(text(record) if record else NOTHING for record in (before, after))
            lines += (f"{name}: {pair}" if len({key[0] for key, _ in series}) > 1 else pair).split(
                "\n"
            )
    more = len(series) - most
    return (lines or [NOTHING]) + (
        [f"and {more} more set{'s' if more > 1 else ''} below"] if more > 0 else []
    )


def _planned_phases(run: Run) -> dict[str, Phase]:
    """Name -> phase as the checkpoint's configuration says; empty where that is not known."""
    if run.config is None:
        return {}
    # Of the phases with `layout: auto`, which the settings leave open.
    chosen = run.progress.layouts if run.progress else {}
    try:
        return {
            phase.name: with_choice(phase, chosen[phase.name]) if phase.name in chosen else phase
            for phase in resolve_phases(run.config)
            if phase.name in chosen or not phase.auto
        }
    except ValueError:  # a configuration of another version of the trainer
        return {}


def _layout_text(phase: Phase) -> str:
    tp, pp, cp = phase.layout.sizes
    return (
        f"tp {tp}, pp {pp}, cp {cp}"
        + (f", {phase.layout.schedule}" if pp > 1 else "")
        + (" (auto)" if phase.auto else "")
    )


def _rope_text(phase: Phase) -> str:
    """The base, and the scaling where there is one."""
    values = dataclasses.asdict(phase)
    rope = values.get("rope") or {"base": values["rotary_base"]}
    scaling = rope.get("type", "default")
    return f"base {rope['base']:,.12g}" + (
        f", {scaling} × {rope.get('factor')}" if scaling != "default" else ""
    )


def gain_text(record: dict) -> str:
    """ "+0.120 [+0.100, +0.140]"; without the interval where it is not known."""
    return " ".join(filter(None, (f"{record['gain']:+.3f}", _interval_text(record))))


def _interval_text(record: dict) -> str:
    low = record.get("gain_low")
    high = record.get("gain_high")
    return "" if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]"


def gain_rows(run: Run) -> list[dict]:
    """A row per phase, set and length with the gain before and after it."""
    rows = []
    for stretch in run.phases():
        for (name, seq_length), records in series_of(run.gains).items():
            before, after = before_and_after(records, stretch)
            if not (before and after) and (
                seq_length != stretch.seq_length or not (before or after)
            ):
                continue
            shown = after or before
            rows.append(
                {
                    "phase": stretch.name,
                    "set": name,
                    "length": length(seq_length),
                    "cut": length(shown["cut"]),
                    "before": gain_text(before) if before else NOTHING,
                    "after": gain_text(after) if after else NOTHING,
                    "change": f"{after['gain'] - before['gain']:+.3f}"
                    if before and after
                    else NOTHING,
                    "full": _number(shown.get("loss_full")),
                    "short": _number(shown.get("loss_cut")),
                    "documents": f"{shown['documents']:,}"
                    if shown.get("documents") is not None
                    else NOTHING,
                }
            )
    return rows


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def _total(run: Run, skipped: bool) -> dict | None:
    """Sums of the rows that were drawn, or that were passed over."""
    rows = [row for row in run.account if row["skipped"] == skipped]
    return (
        {
            "name": "passed over" if skipped else "drawn",
            **{key: sum(row[key] for row in rows) for key in ("samples", "tokens", "documents")},
        }
        if rows
        else None
    )


def repeats(run: Run) -> str:
    """How many tokens were repeated, in one sentence."""
    found = repeated_tokens(run.account)
    repeated, drawn = (sum(pair[i] for pair in found.values()) for i in (0, 1))
    if not repeated:
        return f"None of the {drawn:,} tokens drawn was a repetition: no source went beyond its first epoch."
    parts = ", ".join(f"{source} {again:,}" for source, (again, _) in found.items() if again)
    return (
        f"{repeated:,} of the {drawn:,} tokens drawn ({100 * repeated / max(1, drawn):.1f} %) were repeated, drawn "
        f"in a second or later epoch of their source: {parts}."
    )


def event_rows(run: Run) -> list[dict]:
    """The last `MOST_EVENTS` events as texts, newest last."""
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


def _last_passkey_tokens(run: Run) -> str:
    return short(max(record["tokens"] for record in run.passkeys)) if run.passkeys else ""
