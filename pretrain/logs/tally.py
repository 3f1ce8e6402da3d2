"""Whether a run's steps came to anything: targets to learn from, and updates of the weights."""

from dataclasses import dataclass

from pretrain.step import StepResult


@dataclass
class StepTally:
    """What the steps since the start of this process came to."""

    with_targets: int
    """Steps of the whole run that had a target, those before this start included."""
    steps: int = 0
    updates: int = 0
    """Steps whose gradient was finite."""
    unsaved_steps: int = 0
    unsaved_updates: int = 0
    without_target: int = 0

    def note(self, result: StepResult) -> None:
        """Count one more step."""
        self.steps += 1
        self.unsaved_steps += 1
        if not result.skipped:
            self.updates += 1
            self.unsaved_updates += 1
        if result.num_targets > 0:
            self.with_targets += 1
        else:
            self.without_target += 1

    def note_save(self) -> None:
        """Count from here what the last checkpoint does not hold."""
        self.unsaved_steps = 0
        self.unsaved_updates = 0

    @property
    def nothing_to_save(self) -> bool:
        """Were all steps since the last save skipped?"""
        return self.unsaved_steps > 0 and self.unsaved_updates == 0

    def failure(self) -> str | None:
        """Say why an end of the run, or of one of its phases, is no success; None = it is one."""
        # Weights that hold NaN make every gradient NaN: the run went through and did nothing.
        if self.steps and not self.updates:
            return (
                f"all {self.steps:,} steps since the start were skipped, since their gradients "
                "were not finite: nothing was trained, and nothing is saved over the last "
                "checkpoint. Fix: look for NaN in the weights that the run started from, or a "
                "lower learning rate."
            )
        # Documents of one token have nothing to predict: the loss is 0, which looks perfect.
        if self.steps and not self.with_targets:
            return (
                "no step had a target: nothing was learnt. Fix: documents of two tokens or more "
                "(--append-eod when they are made), or --no-document-masking."
            )
        return None

    def describe(self) -> str:
        """Count the steps that came to nothing, for a run's last line; empty if there are none."""
        # Both kinds may come in one run: together in one sentence.
        skipped = self.steps - self.updates
        parts = []
        if skipped:
            parts.append(f"{skipped:,} were skipped, since their gradients were not finite")
        if self.without_target:
            parts.append(f"{self.without_target:,} had no target")
        if not parts:
            return ""
        return f"; of {self.steps:,} steps since the start {' and '.join(parts)}"
