"""Settings of how much is trained, in what portions, without the list of phases."""

from dataclasses import dataclass

from pretrain.config.facts import at_most_one, setting
from pretrain.config.token_count import Tokens


@dataclass(kw_only=True)
class FlatScheduleConfig:
    """How much is trained, in what portions, by the run's own settings."""

    seq_length: Tokens | None = setting(None, per_phase=True, resume="effect", above=0)
    """Tokens of one sample."""
    micro_batch_size: int = setting(1, per_phase=True, resume="free", above=0)
    """Samples that a rank packs into one microbatch."""
    global_batch_size: int | None = setting(None, resume="effect", above=0)
    """Samples per optimizer step over all ranks (or give --global-batch-tokens)."""
    global_batch_tokens: Tokens | None = setting(None, per_phase=True, resume="effect", above=0)
    """Tokens per optimizer step over all ranks."""
    rampup_batch_size: list[int] = setting(list, per_phase=True, resume="effect")
    """START INCREMENT SAMPLES: grow the batch from START samples to the full one over SAMPLES
    samples."""
    step_batch_size_schedule: str | None = setting(None, per_phase=True, resume="effect")
    """"0:768 250B:1536": from 0 tokens on 768 samples per step, from 250B tokens on 1,536."""
    train_iters: int | None = setting(None, resume="effect", above=0)
    """Optimizer steps (or give --train-samples or --train-tokens)."""
    train_samples: int | None = setting(None, resume="effect", above=0)
    """Samples to train on."""
    train_tokens: Tokens | None = setting(None, per_phase=True, resume="effect", above=0)
    """Tokens to train on."""
    manual_gc: bool = setting(False, resume="free")
    """Collect Python's garbage at evaluations and saves only, so that no rank pauses by itself in
    between."""

    def validate(self) -> list[str]:
        """List settings that say the same thing in different units, of which one may be given."""
        lengths = at_most_one(self, "train_iters", "train_samples", "train_tokens")
        return lengths + at_most_one(self, "global_batch_size", "global_batch_tokens")
