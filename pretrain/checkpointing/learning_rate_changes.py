"""Differences between the learning rate of a checkpoint and that of the run that continues it."""

import math
from typing import Any

import numpy as np

from pretrain.checkpointing.phase_changes import begun_phase
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.setting_changes import Change, kind_of
from pretrain.config.config import Config
from pretrain.schedule.learning_rate import LearningRate
from pretrain.schedule.phases import Phase, phase_at
from pretrain.schedule.resolve import resolve_phases

COMPARED_POINTS = 300
"""Number of places of the clock at which the learning rates are compared."""
RELATIVE_TOLERANCE = 1e-9
"""Difference of two learning rates that is rounding."""


def makes_learning_rate(name: str) -> bool:
    """Return whether a setting of the optimizer shapes the learning rate."""
    return kind_of("optimizer", name) == "effect"


def stored_scheduler(stored: Config) -> dict[str, Any]:
    """Return the settings that give the checkpoint's learning rate and weight decay to any run."""
    values = {
        name: value
        for name, value in vars(stored.optimizer).items()
        if kind_of("optimizer", name) in ("effect", "scheduler")
    }
    if stored.schedule.phases:
        return values
    (arc,) = LearningRate.make(stored.optimizer, resolve_phases(stored)).arcs
    # In tokens: iterations, samples and "the end of the run" would mean something else there.
    in_tokens = {
        "lr_warmup": arc.warmup,
        "lr_decay": arc.end if arc.style != "constant" else None,
        "lr_wsd_decay": arc.wsd_decay or None,
    }
    for prefix, tokens in in_tokens.items():
        units = [f"{prefix}_{unit}" for unit in ("iters", "samples", "fraction")]
        values |= {name: None for name in units if name in values} | {f"{prefix}_tokens": tokens}
    return values


def learning_rate_changes(
    stored: Config,
    config: Config,
    progress: Progress,
    phases: list[Phase],
    learning_rate: LearningRate,
) -> list[Change]:
    """Say where the learning rate first differs from what the checkpoint's run would have had.

    Compared over the rest of the phase that has begun; over the rest of the run where settings of
    the learning rate were edited outside of `phases`. A run that was over has no rate to compare,
    only its lr and min_lr.
    """
    clock = progress.clock
    current = begun_phase(phases, progress)
    their_phases = resolve_phases(stored)
    their_rate = LearningRate.make(stored.optimizer, their_phases)
    theirs = phase_at(their_phases, clock)  # None: their run was over

    # How far to compare.
    end = clock
    if theirs is not None and _is_edited(stored, config):
        end = min(their_phases[-1].end, phases[-1].end)
    elif theirs is not None and current is not None:
        end = min(theirs.end, current.end)

    # At phases' starts, where a rate bends, and evenly in between.
    starts = [phase.start for phase in (*phases, *their_phases)]
    for at in _points(clock, end, [*starts, *their_rate.corners, *learning_rate.corners]):
        before = _rate_at(their_rate, their_phases, at)
        now = _rate_at(learning_rate, phases, at)
        if not math.isclose(before, now, rel_tol=RELATIVE_TOLERANCE):
            return [Change(f"learning rate at token {at:,}", before, now, "scheduler")]
    if end <= clock and current is not None and theirs is None:
        return _changes_after_the_end(config, progress, current)
    return []


def _is_edited(stored: Config, config: Config) -> bool:
    """Return whether a setting of the learning rate differs outside of `phases`."""
    return any(
        getattr(stored.optimizer, name) != value
        for name, value in vars(config.optimizer).items()
        if makes_learning_rate(name)
    )


def _rate_at(rate: LearningRate, phases: list[Phase], at: int) -> float:
    phase = phase_at(phases, at)
    assert phase is not None, "points lie before the end of both runs"
    return rate.at(at, phase.lr, phase.min_lr)


def _changes_after_the_end(config: Config, progress: Progress, current: Phase) -> list[Change]:
    """List the rates of the phase that goes on although the checkpoint's run was over."""
    # A constant rate has no end to go down to.
    names = ["lr"] if config.optimizer.lr_decay_style == "constant" else ["lr", "min_lr"]
    return [
        Change(
            f"{name} of the phase that goes on",
            progress.phase[name],
            getattr(current, name),
            "scheduler",
        )
        for name in names
        if progress.phase[name] != getattr(current, name)
    ]


def _points(clock: int, end: int, corners: list[int]) -> list[int]:
    """Return places of the clock in [clock, end) to compare at, the corners among them."""
    if end <= clock:
        return []
    evenly = np.linspace(clock, end - 1, COMPARED_POINTS).astype(np.int64).tolist()
    return sorted({*evenly, *(at for at in corners if clock <= at < end)})
