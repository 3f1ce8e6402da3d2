"""`layout: auto`: the layout of a phase, chosen once.

A choice is a function of the configuration, the number of processes and the device, and a
checkpoint keeps it. Whoever continues on as many processes gets the stored one, also where the
estimate would by now choose another.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from data.units import show_bytes
from model.activation_memory.settings import MemorySettings, Recompute
from pretrain.config.config import Config
from pretrain.planner.layout_candidates import (
    CHOSEN_FIELDS,
    SIZE_FIELDS,
    Candidate,
    choose_layout,
    estimate,
)
from pretrain.planner.machine import Device
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.step_time import describe_assumptions
from pretrain.problems import attempt
from pretrain.schedule.phases import Phase

IGNORED_LAYOUT_FIELDS = ("distributed_backend", "distributed_timeout_minutes", "watchdog_seconds")
"""Fields of the layout that no choice depends on."""
NO_LIMIT_BYTES = 2**63
"""More than any device has."""
WITHOUT_DATA = (
    "layout auto: no data is looked at: each sample counts as one document, and data ranks as "
    "equally loaded; plan --search compares layouts with the documents and waits of the data"
)
"""Line beside a choice, which follows from settings alone."""


class SettledLayouts(NamedTuple):
    """What became of the phases of `layout: auto`."""

    phases: list[Phase]
    records: dict[str, dict]
    """What a checkpoint keeps of the choices, by phase name (progress.json: layouts)."""
    lines: list[str]
    """A line for each choice, and those of what their times assume."""


@dataclass(frozen=True)
class LayoutRecord:
    """Holds a choice as a checkpoint keeps it."""

    asked: dict[str, Any]
    """The settings that the choice answers to."""
    chosen: dict[str, Any]
    """Fields of the layout."""
    recompute_granularity: Recompute | None

    @property
    def asked_with_defaults(self) -> dict[str, Any]:
        """`asked`; settings that did not exist then had their defaults."""
        return dataclasses.asdict(MemorySettings()) | self.asked


def settle_layouts(
    phases: list[Phase],
    config: Config,
    world_size: int,
    vocab_size: int,
    stored: dict[str, dict],
    clock: int,
    device: Device | None = None,
) -> SettledLayouts:
    """Give every phase of `layout: auto` its layout.

    Args:
        stored: what the checkpoint that is continued kept, by phase name.
        clock: positions consumed: phases that are over need not fit into memory any more.

    Raises:
        ValueError: some phase has no layout; all at once.
    """
    if not any(phase.auto for phase in phases):
        return SettledLayouts(phases, {}, [])
    device = device or Device.here(config.layout)
    model = MemoryModel.of_run(config, vocab_size, device.hardware)
    settled = []
    records = {}
    lines = []
    is_any_chosen = False
    problems: list[str] = []
    for phase in phases:
        if not phase.auto:
            settled.append(phase)
            continue
        # A stored choice holds as long as it answers to the same settings.
        asked = _asked(phase, world_size)
        before = LayoutRecord(**stored[phase.name]) if phase.name in stored else None
        if before and before.asked_with_defaults == asked:
            kept = estimate(_apply(phase, before), world_size, model, device.hardware)
            memory = show_bytes(kept.memory.total)
            text = f"{kept.describe()}, {memory} per rank (kept from the checkpoint)"
        else:
            # A phase that is over is chosen for its record only.
            is_over = phase.end <= clock
            room = dataclasses.replace(device, memory_bytes=NO_LIMIT_BYTES) if is_over else device
            choice = attempt(
                problems, partial(choose_layout, phase, config, world_size, vocab_size, room)
            )
            if choice is None:
                continue
            is_any_chosen = True
            kept = choice.best
            text = choice.describe() + _why_again(before, asked)
        settled.append(kept.settled())
        records[phase.name] = dataclasses.asdict(_record(kept, asked))
        lines.append(f"phase {phase.name}: layout auto: {text}")
    if problems:
        raise ValueError("\n".join(problems))
    if is_any_chosen:
        lines += [describe_assumptions(config.model, device.hardware), WITHOUT_DATA]
    return SettledLayouts(settled, records, lines)


def with_choice(phase: Phase, record: dict) -> Phase:
    """Return the phase with the layout that a checkpoint kept for it."""
    return _apply(phase, LayoutRecord(**record))


def _apply(phase: Phase, record: LayoutRecord) -> Phase:
    # The switch would say a strategy of its own beside the chosen one.
    layout = dataclasses.replace(phase.layout, use_distributed_optimizer=None, **record.chosen)
    phase = dataclasses.replace(phase, layout=layout)
    return phase.with_memory(recompute_granularity=record.recompute_granularity)


def _asked(phase: Phase, world_size: int) -> dict[str, Any]:
    """Return what a choice answers to, as JSON gives it back.

    The device is no part of it: another one keeps the stored choice.
    """
    given = {
        "world_size": world_size,
        "open": phase.auto,
        "seq_length": phase.seq_length,
        "global_batch_tokens": phase.global_batch_tokens,
        "micro_batch_size": phase.micro_batch_size,
        **dataclasses.asdict(phase.memory),
    }
    # Sizes that were given beside `auto`, and everything that check_layout reads.
    layout = dataclasses.asdict(phase.layout)
    given |= {name: layout[name] for name in layout if name not in IGNORED_LAYOUT_FIELDS}
    # Tuples become lists, so that it equals what a checkpoint gives back.
    return json.loads(json.dumps(given))


def _record(candidate: Candidate, asked: dict[str, Any]) -> LayoutRecord:
    layout = dataclasses.asdict(candidate.phase.layout)
    chosen = {name: layout[name] for name in CHOSEN_FIELDS}
    return LayoutRecord(asked, chosen, candidate.phase.memory.recompute_granularity)


def _why_again(before: LayoutRecord | None, asked: dict[str, Any]) -> str:
    """Say which settings have changed since the stored choice, and what that was."""
    if before is None:
        return ""
    # A setting may be new since then, so that there is nothing it was.
    then = before.asked_with_defaults
    changed = [f"{name} was {then.get(name)}" for name in asked if then.get(name) != asked[name]]
    was = " ".join(f"{short} {before.chosen[name]}" for short, name in SIZE_FIELDS.items())
    return f" (chosen again, since {', '.join(changed)}; it was {was})"
