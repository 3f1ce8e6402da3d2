"""Describe each phase of a run in a row: what was planned, what changed, what came of it."""

import dataclasses
import statistics
from collections.abc import Callable

from pretrain.planner.auto_layout import with_choice
from pretrain.schedule.phases import Phase
from pretrain.schedule.resolve import resolve_phases
from tools.reporting.run_record import PhaseSpan, RunRecord, before_and_after, series_of
from tools.shared.number_text import NOTHING, gain_text, gibibytes, length, short


def phase_rows(run: RunRecord) -> list[dict]:
    """Make a row of texts per span of the run; a cell with several lines is a list."""
    planned = planned_phases(run)
    batch_of = dict(zip((step["tokens"] for step in run.steps), run.batches(), strict=True))
    return [_phase_row(run, span, planned.get(span.name), batch_of) for span in run.phases()]


def _phase_row(
    run: RunRecord, span: PhaseSpan, planned: Phase | None, batch_of: dict[int, int]
) -> dict:
    # What the steps recorded.
    steps = run.steps_of(span)
    batches = [batch_of[step["tokens"]] for step in steps]
    low = min(batches)
    high = max(batches)
    memory = [
        step["peak_memory_bytes"] for step in steps if step.get("peak_memory_bytes") is not None
    ]
    return {
        "name": span.name,
        "length": length(span.seq_length),
        "tokens": short(span.end - span.begin),
        "batch": length(low) if low == high else f"{length(low)} to {length(high)}",
        "layout": _layout_text(planned) if planned else NOTHING,
        "rope": _rope_text(planned) if planned else NOTHING,
        "rate": short(statistics.median(step["tokens_per_second"] for step in steps)),
        "memory": gibibytes(max(memory)) if memory else NOTHING,
        "loss": _changes(run.evaluations, span, lambda record: f"{record['valid_loss']:.4f}"),
        "gain": _changes(run.gains, span, gain_text, " →\n", most=1),
    }


def _changes(
    records: list[dict],
    span: PhaseSpan,
    text: Callable[[dict], str],
    arrow: str = " → ",
    most: int = 8,
) -> list[str]:
    """Write "before → after" of up to `most` sets at the phase's length, as lines."""
    lines = []
    series = [item for item in series_of(records).items() if item[0][1] in (None, span.seq_length)]
    has_several_sets = len({name for (name, _), _ in series}) > 1
    for (name, _), found in series[:most]:
        before, after = before_and_after(found, span)
        if before or after:
            pair = arrow.join(text(record) if record else NOTHING for record in (before, after))
            lines += (f"{name}: {pair}" if has_several_sets else pair).split("\n")
    # What there is no room for is in the tables below.
    lines = lines or [NOTHING]
    more = len(series) - most
    if more > 0:
        lines.append(f"and {more} more set{'s' if more > 1 else ''} below")
    return lines


def planned_phases(run: RunRecord) -> dict[str, Phase]:
    """Map names to phases of the checkpoint's configuration; empty where that is not known."""
    if run.config is None:
        return {}
    # The layouts of phases with `layout: auto`, which the settings leave open.
    chosen = run.progress.layouts if run.progress else {}
    try:
        return {
            phase.name: with_choice(phase, chosen[phase.name]) if phase.name in chosen else phase
            for phase in resolve_phases(run.config)
            if phase.name in chosen or not phase.auto
        }
    except ValueError:
        # A configuration of another version of the trainer.
        return {}


def _layout_text(phase: Phase) -> str:
    """Spell the sizes of the axes, and the pipeline schedule where there is a pipeline."""
    tp, pp, cp = phase.layout.sizes
    return (
        f"tp {tp}, pp {pp}, cp {cp}"
        + (f", {phase.layout.schedule}" if pp > 1 else "")
        + (" (auto)" if phase.auto else "")
    )


def _rope_text(phase: Phase) -> str:
    """Spell the rotary base, and the scaling where there is one."""
    values = dataclasses.asdict(phase)
    rope = values.get("rope") or {"base": values["rotary_base"]}
    scaling = rope.get("type", "default")
    return f"base {rope['base']:,.12g}" + (
        f", {scaling} × {rope.get('factor')}" if scaling != "default" else ""
    )
