"""How far a run had come at a checkpoint: its progress.json, read and written in one place."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from model.rope import Rope

FILE = "progress.json"


@dataclasses.dataclass
class StepCounts:
    """Counts steps by what they came to."""

    steps: int = 0
    updates: int = 0
    """Those that were not skipped."""
    with_targets: int = 0
    """Those whose batch had a target."""

    def note(self, *, is_update: bool, has_target: bool) -> None:
        """Count one more step."""
        self.steps += 1
        self.updates += is_update
        self.with_targets += has_target


@dataclasses.dataclass(frozen=True)
class ValidationScore:
    """The validation loss of a checkpoint: of the first set, at the longest length."""

    set: str
    seq_length: int
    loss: float
    """Nats per target."""

    def describe(self) -> str:
        """Write the loss, and what it was measured on."""
        return f"loss {self.loss:.4f} of {self.set} at {self.seq_length:,} tokens"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Everything that a checkpoint holds besides tensors, settings and the tokenizer's files."""

    step: int
    """Number of the last step."""
    clock: int
    """Positions consumed, padding included."""
    phase: dict[str, Any]
    """The phase of the last step, its fields as JSON: which there are depends on the version that
    wrote them."""
    longest_seq_length: int
    """The most tokens of a sample in the phases up to this one."""
    data: dict[str, Any] | None
    """The ledger (data/ledger.py: to_json); None = weights only, no clock to go on from."""
    tokenizer: dict[str, Any] | None
    """The tokenizer's description; None where there is none."""
    last_batch_tokens: int = 0
    """Global batch of the last step; 0 where there was none."""
    real_tokens: int = 0
    """Tokens of the clock that were not padding."""
    skipped_in_a_row: int = 0
    """Last steps without an update, since loss or gradient were not finite or a spike."""
    steps_of_run: StepCounts = dataclasses.field(default_factory=StepCounts)
    """What the steps of the whole run came to."""
    steps_of_phase: StepCounts = dataclasses.field(default_factory=StepCounts)
    """What the steps of the phase of the last step came to."""
    spikes: dict[str, Any] | None = None
    """The last steps, against which spikes are measured (guards/spikes.py: SpikeHistory)."""
    has_optimizer: bool = True
    """Were the moments saved?"""
    evaluation_due: str | None = None
    """Name of the phase of an evaluation that a stop cut short: the next start makes up for it."""
    wandb_run_id: str | None = None
    run_id: str | None = None
    """Random name of the run, kept through its restarts; None = written before there were any."""
    ends_phase: bool = False
    """Was the last step the last one of its phase?"""
    validation: ValidationScore | None = None
    """What an evaluation at the last step found; None = there was none."""
    seed: int | None = None
    layouts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Layouts that were chosen, by phase name (planner/auto_layout.py)."""
    world_size: int | None = None
    threads: int | None = None
    """Threads of torch on each rank, on which the last bits of a CPU's sums depend."""

    @property
    def phase_name(self) -> str:
        return self.phase["name"]

    @property
    def seq_length(self) -> int:
        return self.phase["seq_length"]

    @property
    def rope(self) -> Rope:
        """The position angles of the phase of the last step."""
        return Rope(**self.phase["rope"])

    @property
    def last_step_clock(self) -> int:
        """The clock at which the last step began."""
        return self.clock - self.last_batch_tokens

    @staticmethod
    def from_json(stored: dict[str, Any]) -> "Progress":
        """Complete what an older version wrote; leave out what this one does not know.

        Raises:
            ValueError: the step, the clock or another field that every version writes is missing.
        """
        # Keys that this version does not know are left out.
        fields = dataclasses.fields(Progress)
        values = {field.name: stored[field.name] for field in fields if field.name in stored}
        # Keys that older versions did not write: the last phase's length is the longest that is
        # known.
        if "phase" in values:
            values.setdefault("longest_seq_length", values["phase"].get("seq_length"))
        for name in ("steps_of_run", "steps_of_phase"):
            values[name] = _read_counts(stored, name)
        if values.get("validation") is not None:
            values["validation"] = ValidationScore(**values["validation"])
        try:
            return Progress(**values)
        except TypeError as error:
            raise ValueError(f"{FILE}: is not one of ours ({error})") from None

    @staticmethod
    def read(folder: Path) -> "Progress":
        """Read progress.json of a published checkpoint."""
        return Progress.from_json(json.loads((folder / FILE).read_text(encoding="utf-8")))

    @staticmethod
    def read_if_whole(folder: Path) -> "Progress | None":
        """Read progress.json of a checkpoint that may be damaged; None where that fails."""
        try:
            return Progress.read(folder)
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def to_text(self) -> str:
        """Write the content of progress.json."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def _read_counts(stored: dict[str, Any], name: str) -> StepCounts:
    """Read what steps came to; a run of an older version counts as one that trained."""
    if name in stored:
        return StepCounts(**stored[name])
    steps = stored.get("step", 0)
    return StepCounts(steps, steps, stored.get("steps_with_targets", steps))
