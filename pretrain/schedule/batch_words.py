"""A step's batch in the words in which the user gave it: samples or tokens."""

from dataclasses import dataclass, replace

from pretrain.config.config import Config
from pretrain.config.phase_config import PhaseConfig


@dataclass(frozen=True)
class BatchWords:
    """Speaks of a phase's batch as the user did."""

    setting: str
    """The setting that the batch comes from."""
    given: str | None
    """The text of a schedule of batches, if the batch is one of those."""
    seq_length: int
    in_samples: bool

    @staticmethod
    def make(config: Config, entry: PhaseConfig, seq_length: int) -> "BatchWords":
        """Find the setting that gives the batch of the phase `entry`, and its unit."""
        schedule = config.schedule
        # A schedule of batches comes before a single one, the phase's before the run's.
        section = entry if entry.has_own_batch else schedule
        for name in ("step_batch_size_schedule", "rampup_batch_size"):
            value = getattr(section, name)
            if value:
                given = value if isinstance(value, str) else " ".join(map(str, value))
                return BatchWords(name, given, seq_length, in_samples=True)
        # Samples only where nobody gave tokens.
        tokens = (entry.global_batch_tokens, schedule.global_batch_tokens)
        in_samples = tokens == (None, None) and schedule.global_batch_size is not None
        setting = "global_batch_size" if in_samples else "global_batch_tokens"
        return BatchWords(setting, None, seq_length, in_samples)

    def name(self, batch: int) -> str:
        """Write `setting = value` for a batch of `batch` tokens."""
        if self.given is None:
            return f"{self.setting} = {self.count(batch)}"
        return f"{self.setting} = {self.given}: its step of {self.show(batch)}"

    def count(self, tokens: int) -> int:
        """Convert tokens to samples, where the user counts in those."""
        return tokens // self.seq_length if self.in_samples else tokens

    def show(self, tokens: int) -> str:
        """Write a number of tokens in the user's unit, with its name."""
        return count_of(self.count(tokens), "sample" if self.in_samples else "token")

    def not_a_multiple(self, batch: int, unit: int, factors: str) -> str:
        """Say that `batch` tokens are no multiple of `unit`, the product of `factors`.

        Args:
            factors: what the unit is made of besides the sample's length.
        """
        # The samples of the run's ramp have the first phase's length, not this one's.
        if self.in_samples and batch % self.seq_length:
            return replace(self, in_samples=False).not_a_multiple(batch, unit, factors)
        product = factors if self.in_samples else f"seq_length x {factors}"
        return (
            f"{self.name(batch)}: must be a multiple of {product} = {self.count(unit)}. "
            f"Fix: {self.nearest(batch, unit)}."
        )

    def nearest(self, batch: int, unit: int) -> str:
        """Write the multiples of `unit` around `batch`."""
        below = batch // unit * unit
        counts = [self.count(tokens) for tokens in (below, below + unit) if tokens]
        return " or ".join(map(str, counts))


def count_of(number: int, unit: str) -> str:
    """Write `3 samples` or `1 sample`."""
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


def largest_part(samples: int, limit: int) -> int:
    """Return the largest number up to `limit` that divides `samples`."""
    return next(part for part in range(min(samples, limit), 0, -1) if samples % part == 0)
