"""Which of a run's checkpoints are kept, from what they say of themselves: a pure function.

The last --keep-last stay, the ends of phases, and what --keep-every, --save-retain-interval and
--keep-best name. What another run wrote is never chosen.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from data.units import show_tokens
from pretrain.checkpointing.progress import ValidationScore
from pretrain.config.checkpoint_config import CheckpointConfig


@dataclass(frozen=True)
class CheckpointFacts:
    """Holds what decides whether a published checkpoint is kept."""

    step: int
    clock: int
    """Consumed tokens."""
    run_id: str | None
    """None = written before runs had ids."""
    phase_end: str | None = None
    """Name of the phase that ends with it."""
    score: ValidationScore | None = None
    """What the evaluation at this very step found."""


@dataclass(frozen=True)
class Choice:
    """Says which checkpoints go, and why the others stay."""

    delete: list[int] = field(default_factory=list)
    """Steps, ascending."""
    kept: dict[int, str] = field(default_factory=dict)
    """Step -> what it is kept for, ascending."""
    foreign: list[int] = field(default_factory=list)
    """Steps of checkpoints that this run did not write, ascending."""


def what_to_delete(
    found: Collection[CheckpointFacts],
    settings: CheckpointConfig,
    *,
    run_id: str,
    published: int,
    verified: Collection[int],
    started_from: int | None = None,
    in_use: Collection[int] = (),
) -> Choice:
    """Choose the checkpoints that are no longer needed.

    Args:
        found: all published checkpoints of the folder, in any order.
        run_id: of the run that asks; those of other runs stay.
        published: step that the text file names. Later ones are of a time that the run was set
            back from: they stay, and are not counted, until the run has passed them.
        verified: steps whose files were read again and are whole; without `published` among
            them nothing goes.
        started_from: step of the checkpoint that this process began with.
        in_use: steps that are being exported, or are to be.
    """
    ours = sorted(
        (facts for facts in found if facts.run_id == run_id), key=lambda facts: facts.step
    )
    foreign = sorted(facts.step for facts in found if facts.run_id != run_id)
    past = [facts for facts in ours if facts.step <= published]
    reasons = _reasons_to_keep(past, settings)
    for facts in ours:
        if facts.step > published:
            reasons.setdefault(facts.step, []).append("later than the published one")
        elif facts.step == started_from:
            reasons.setdefault(facts.step, []).append("this run started from it")
        if facts.step in in_use:
            reasons.setdefault(facts.step, []).append("its export is not done")
    # The one that is to be relied on must be there, whole, and this run's own.
    is_safe = published in verified and published in {facts.step for facts in past}
    if settings.keep_all or not is_safe:
        for facts in ours:
            reasons.setdefault(facts.step, [])
    kept = {step: ", ".join(reasons[step]) for step in sorted(reasons)}
    delete = [facts.step for facts in ours if facts.step not in reasons]
    return Choice(delete, kept, foreign)


def _reasons_to_keep(
    past: list[CheckpointFacts], settings: CheckpointConfig
) -> dict[int, list[str]]:
    """Find out what each checkpoint is kept for, as the settings say; steps ascend in `past`."""
    reasons: dict[int, list[str]] = {}

    def keep(facts: CheckpointFacts, reason: str) -> None:
        reasons.setdefault(facts.step, []).append(reason)

    for facts in past:
        if settings.keep_phase_ends and facts.phase_end is not None:
            keep(facts, f"end of phase {facts.phase_end}")

    # The first one at or after each multiple of so many tokens. Once kept it stays the first.
    if settings.keep_every is not None:
        text = f"every {show_tokens(settings.keep_every)}"
        reached = 0
        for facts in past:
            multiple = facts.clock // settings.keep_every
            if multiple > reached:
                keep(facts, text)
                reached = multiple

    if settings.save_retain_interval is not None:
        for facts in past:
            if facts.step % settings.save_retain_interval == 0:
                keep(facts, f"every {settings.save_retain_interval:,} steps")

    for facts in _best(past, settings.keep_best):
        assert facts.score is not None
        keep(facts, f"best {facts.score.describe()}")

    for facts in past[-settings.keep_last :]:
        keep(facts, f"last {settings.keep_last}")
    return reasons


def _best(past: list[CheckpointFacts], count: int) -> list[CheckpointFacts]:
    """Find the `count` lowest losses of each set and length: others do not compare."""
    contests: dict[tuple[str, int], list[tuple[float, int, CheckpointFacts]]] = {}
    for facts in past:
        # A loss that is no number is nobody's best, and would spoil the order of the others.
        if facts.score is not None and math.isfinite(facts.score.loss):
            key = (facts.score.set, facts.score.seq_length)
            contests.setdefault(key, []).append((facts.score.loss, facts.step, facts))
    # Of equal losses the earlier one: a later one does not push it out.
    return [facts for entries in contests.values() for *_, facts in sorted(entries)[:count]]
