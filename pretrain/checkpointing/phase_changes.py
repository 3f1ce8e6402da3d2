"""Differences between the phases of a checkpoint and those of the run that continues it.

Only phases that have begun are compared: later ones are free to change.
"""

import dataclasses
import json

from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.setting_changes import Change
from pretrain.config.config import Config
from pretrain.config.facts import facts_of_section
from pretrain.schedule.batch_schedule import BatchStretch, batch_at
from pretrain.schedule.phases import Phase, phase_at
from pretrain.schedule.resolve import resolve_phases


def begun_phase(phases: list[Phase], progress: Progress) -> Phase | None:
    """Return the phase at the checkpoint's clock, if its last step was in that phase, too.

    None where a phase begins, and after the last one.
    """
    phase = phase_at(phases, progress.clock)
    # The last step may reach beyond the end of its phase, where the batch was changed within it.
    return phase if phase is not None and phase.start <= progress.last_step_clock else None


def phase_changes(stored: Config, progress: Progress, phases: list[Phase]) -> list[Change]:
    """List what differs in the phase that goes on and in those before it."""
    current = begun_phase(phases, progress)
    found = []
    if current is not None:
        found += _field_changes(stored, progress, current) + _batch_changes(progress, current)
    return found + _past_changes(stored, progress, phases, current)


def _field_changes(stored: Config, progress: Progress, current: Phase) -> list[Change]:
    """List the fields of the phase that differ, of those whose declaration gives a kind."""
    now = json.loads(json.dumps(dataclasses.asdict(current)))  # as progress.json writes it
    # A setting that is newer than the checkpoint had its default then.
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(Phase)
        if field.default is not dataclasses.MISSING
    }
    before = defaults | progress.phase
    # A rope that no layer uses turns nothing.
    unused = set() if "main" in stored.model.layer_ropes else {"rope"}
    return [
        Change(f"phase {current.name!r}: {name}", before[name], now[name], facts.resume)
        for name, facts in facts_of_section(Phase).items()
        if facts.resume is not None and name not in unused
        if name in before and before[name] != now[name]
    ]


def _batch_changes(progress: Progress, current: Phase) -> list[Change]:
    """Say where the batch first differs from what it would have been; at most one difference."""
    clock = progress.clock
    theirs = [BatchStretch(*stretch) for stretch in progress.phase["stretches"]]
    end = min(theirs[-1].end, current.end)
    # A batch can change only where a stretch begins.
    starts = [stretch.start for stretch in (*theirs, *current.stretches)]
    for at in sorted({clock, *(start for start in starts if clock < start < end)}):
        before = batch_at(theirs, at)
        now = current.batch_at(at)
        if before != now:
            name = f"phase {current.name!r}: global_batch_tokens from token {at:,} on"
            return [Change(name, before, now, "optimization")]
    return []


def _past_changes(
    stored: Config, progress: Progress, phases: list[Phase], current: Phase | None
) -> list[Change]:
    """List phases that are over and are others now: one would come again, or one never."""

    def over(of: list[Phase]) -> list[Phase]:
        begun = [phase for phase in of if phase.start <= progress.last_step_clock]
        # The phase that goes on is compared by itself.
        return begun if current is None else begun[:-1]

    def describe(of: list[Phase]) -> str:
        parts = [f"{phase.name} of {phase.seq_length:,} from {phase.start:,}" for phase in of]
        return ", ".join(parts) or "none"

    theirs = over(resolve_phases(stored))
    ours = over(phases)
    their_places = [(phase.start, phase.seq_length) for phase in theirs]
    if their_places == [(phase.start, phase.seq_length) for phase in ours]:
        return []
    name = f"phases before token {progress.clock:,}"
    return [Change(name, describe(theirs), describe(ours), "data")]
