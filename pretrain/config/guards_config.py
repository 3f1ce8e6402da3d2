"""Settings of the guards against numbers that go wrong while all processes look healthy."""

from dataclasses import dataclass
from typing import Literal

from pretrain.config.facts import setting


@dataclass(kw_only=True)
class GuardsConfig:
    """What is watched in the numbers of a run, and what is done about them."""

    spike_policy: Literal["warn", "skip", "rewind"] = "warn"
    """About a loss or gradient norm far above those of the last steps: say so; make no update in
    that step; or go back to the last checkpoint and pass over the data up to and with that step."""
    spike_window: int = setting(128, at_least=8)
    """Finite steps of a phase that a spike is measured against; none is called before half of
    them."""
    spike_threshold: float = setting(10.0, above=0)
    """A spike lies this many standard deviations (estimated from the median absolute deviation)
    above the median, and at least 5 % above the median loss or 100 % above the median norm."""
    max_rewinds: int = setting(3, at_least=1)
    """Rewinds of a run for spikes; one more ends it."""
    rewind_skip_steps: int = setting(200, above=0)
    """Steps of data that a rewind passes over, those up to and with the spike, none from before the
    checkpoint."""
    check_weight_hash_across_dp_replicas_interval: int | None = setting(None, above=0)
    """Steps between checks of every weight and moment: copies must be the same on all ranks, and
    nothing may have changed since the last update wrote it; the rank that differs is named."""
    replay_interval: int | None = setting(None, above=0)
    """Steps between replays: a microbatch (under pipeline parallelism a batch) is run twice,
    forward and backward, and everything that ranks send is compared bit for bit; the rank that
    computed something else is named."""

    def validate(self) -> list[str]:
        """List the problems of these settings with each other: there are none."""
        return []
