"""What is known of a training step once it is done: its line of metrics.jsonl."""

import dataclasses
from typing import Any

import torch

from parallel.layout import Layout
from pretrain.planner.hardware import peak_flops


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step; its fields are the keys of metrics.jsonl, in that order."""

    step: int
    tokens: int
    """The clock after the step."""
    real_tokens: int
    """Consumed tokens that were not padding; on global rank 0 only."""
    phase: str
    seq_length: int
    global_batch_tokens: int
    loss: float
    """Mean over the batch's targets, nats."""
    grad_norm: float
    """Before clipping."""
    lr: float
    num_targets: int
    tokens_per_second: float
    """Tokens of the global batch over the step's seconds, on all ranks together."""
    mfu: float | None
    """Model FLOPs utilization; None where the hardware's rate is unknown."""
    peak_memory_bytes: int
    """On the rank with the most."""
    step_seconds: float
    data_seconds: float
    """Waited for data, on the rank that waited longest."""
    skipped: bool
    """Was nothing updated, since loss or gradient were not finite, or a spike?"""
    data_digest: str
    """Hash of the batch's tokens, in whatever order and layout they were read."""
    sources: dict[str, int] | None
    """Consumed real tokens of each source; None where there are too many to show."""
    spike: bool = False
    """Were loss or gradient norm far above those of the last steps (guards/spikes.py)?"""

    def to_json(self) -> dict[str, Any]:
        """Return the line of metrics.jsonl, its keys in order."""
        return dataclasses.asdict(self)


def flops_utilization(flops: float, seconds: float, layout: Layout) -> float | None:
    """Compute the share of the world's peak rate that a step used; None = not known."""
    if layout.device.type != "cuda":
        return None
    rate = peak_flops(torch.cuda.get_device_name(layout.device))
    return flops / (seconds * rate * layout.world.size) if rate else None
