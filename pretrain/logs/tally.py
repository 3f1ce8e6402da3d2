"""Whether a run's steps came to anything: targets to learn from, and updates of the weights.

What decides whether a phase is a success counts from its beginning, whichever process trained its
steps: a run that was stopped and went on ends as one that was not.
"""

import dataclasses
from dataclasses import dataclass, field

from pretrain.checkpointing.progress import Progress, StepCounts
from pretrain.step import StepResult

SKIPPED = "were skipped, since loss or gradient were not finite or a spike"
NOT_FINITE = (
    "weights are NaN or infinite, so that no step can update them. Fix: start from an earlier "
    "checkpoint."
)


@dataclass
class StepTally:
    """Counts what steps came to: those of the run, of its phase, and of this process."""

    of_run: StepCounts = field(default_factory=StepCounts)
    of_phase: StepCounts = field(default_factory=StepCounts)
    of_process: StepCounts = field(default_factory=StepCounts)
    unsaved: StepCounts = field(default_factory=StepCounts)
    """Those that the last checkpoint does not hold."""

    @staticmethod
    def resume(progress: Progress | None) -> "StepTally":
        """Continue the counts of a checkpoint; None = a run that begins."""
        if progress is None:
            return StepTally()
        return StepTally(
            of_run=dataclasses.replace(progress.steps_of_run),
            of_phase=dataclasses.replace(progress.steps_of_phase),
        )

    def begin_phase(self) -> None:
        """Count the steps of another phase from here."""
        self.of_phase = StepCounts()

    def note(self, result: StepResult) -> None:
        """Count one more step."""
        has_target = result.num_targets > 0
        for counts in (self.of_run, self.of_phase, self.of_process, self.unsaved):
            counts.note(is_update=not result.skipped, has_target=has_target)

    def note_save(self) -> None:
        """Count from here what the last checkpoint does not hold."""
        self.unsaved = StepCounts()

    @property
    def nothing_to_save(self) -> bool:
        """Were all steps since the last save skipped?"""
        return self.unsaved.steps > 0 and self.unsaved.updates == 0

    def failure_of_phase(self, phase: str, skipped_in_a_row: int) -> str | None:
        """Say why the end of a phase, or of the run with it, is no success; None = it is one.

        Args:
            skipped_in_a_row: last steps of the run without an update.
        """
        steps = self.of_phase.steps
        # Single steps may be skipped. Where most of a phase is, up to its end, it was given up.
        last = min(skipped_in_a_row, steps)
        if 2 * last > steps:
            which = f"all {steps:,}" if last == steps else f"the last {last:,} of {steps:,}"
            return (
                f"{which} steps of phase {phase} {SKIPPED}: they trained nothing, and nothing is "
                "saved over the last checkpoint. Fix: look for NaN in the weights that the run "
                "started from, or a lower learning rate."
            )
        # Documents of one token have nothing to predict: the loss is 0, which looks perfect.
        if steps and not self.of_phase.with_targets:
            return (
                f"no step of phase {phase} had a target: nothing was learnt. Fix: documents of two "
                "tokens or more (--append-eod when they are made), or --no-document-masking."
            )
        return None

    def failure_of_stop(self) -> str | None:
        """Say why starting again would come to the same; None = the run gets on.

        A run that is stopped before its first update has nothing to save.
        """
        if self.of_run.updates or not self.of_process.steps:
            return None
        return (
            f"all {self.of_process.steps:,} steps until the stop {SKIPPED}: no step of this run "
            "has updated anything, and another start would repeat them. Fix: look for NaN in the "
            "weights that the run started from, or a lower learning rate."
        )

    def describe(self) -> str:
        """Count the steps that came to nothing, for a run's last line; empty if there are none."""
        # Both kinds may come in one run: together in one sentence.
        counts = self.of_process
        skipped = counts.steps - counts.updates
        without_target = counts.steps - counts.with_targets
        parts = []
        if skipped:
            parts.append(f"{skipped:,} {SKIPPED}")
        if without_target:
            parts.append(f"{without_target:,} had no target")
        if not parts:
            return ""
        return f"; of {counts.steps:,} steps since the start {' and '.join(parts)}"


def refuse_endless_skips(count: int, limit: int, last_loss: float) -> None:
    """Raise RuntimeError where more than `limit` steps in a row were skipped."""
    if count > limit:
        raise RuntimeError(
            f"{count} steps in a row were skipped, since loss or gradient were not finite or "
            f"spikes; the last loss was {last_loss}. Lower the learning rate or look at the data "
            "of these steps."
        )
