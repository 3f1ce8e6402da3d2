"""What is known of a training step once it is done: its line of metrics.jsonl."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from data.dealing import Dealt
from parallel.layout import Layout
from pretrain.logs.measured import Measured
from pretrain.planner.hardware import peak_flops
from pretrain.schedule.phases import Phase
from pretrain.state import TrainState
from pretrain.step import StepResult


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
    source_losses: dict[str, float | None] | None = None
    """Mean over the targets that each source gave, nats; None for a source without a target in the
    step, and altogether where there is one source, or too many to show."""
    communication_share: float | None = None
    """Part of the step in which a rank waits in collectives, for data or for slower ranks, averaged
    over all ranks; None on GPUs, whose host does not wait in them."""
    data_share: float | None = None
    """Part of the step in which the rank that read for the longest waited for data."""
    peak_reserved_bytes: int | None = None
    """What the GPU's allocator held at most, on the rank with the most; None on a CPU."""
    host_memory_bytes: int | None = None
    """What a process has in the host's memory, on the rank with the most."""
    max_attention_logit: float | None = None
    """The largest attention logit of the step; None where it is not measured."""
    qk_clipped_heads: int | None = None
    """Query heads that QK-clip scaled down; None without it."""
    imbalance: float | None = None
    """Computing that the step waits for, on the slowest data ranks, over the mean of the ranks, by
    the samples' FLOPs; None where the samples are not dealt by them."""
    imbalance_in_order: float | None = None
    """The same, had the samples been dealt in the order in which they were drawn."""

    def to_json(self) -> dict[str, Any]:
        """Return the line of metrics.jsonl, its keys in order."""
        return dataclasses.asdict(self)


def record_step(
    state: TrainState,
    phase: Phase,
    result: StepResult,
    measured: Measured,
    layout: Layout,
    *,
    seconds: float,
    flops: float,
    lr: float,
    dealt: Dealt,
    sources: dict[str, int] | None,
    source_names: Sequence[str],
    spike: bool,
) -> StepRecord:
    """Put together what is known of the step that `state` has just counted.

    Args:
        flops: of the model, in the whole world.
        dealt: how its samples were dealt to the data ranks.
        sources: consumed real tokens of each source.
        source_names: of the sources whose losses were measured, in the blend's order.
    """
    return StepRecord(
        step=state.step,
        tokens=state.clock,
        real_tokens=state.real_tokens,
        phase=phase.name,
        seq_length=phase.seq_length,
        global_batch_tokens=state.last_batch,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=lr,
        num_targets=result.num_targets,
        tokens_per_second=state.last_batch / seconds,
        mfu=flops_utilization(flops, seconds, layout),
        peak_memory_bytes=measured.peak_memory_bytes,
        step_seconds=seconds,
        data_seconds=measured.data_seconds,
        skipped=result.skipped,
        data_digest=measured.data_digest,
        sources=sources,
        spike=spike,
        source_losses=mean_losses(source_names, measured),
        communication_share=communication_share(measured, seconds, layout),
        data_share=min(1.0, measured.data_seconds / seconds),
        peak_reserved_bytes=measured.peak_reserved_bytes,
        host_memory_bytes=measured.host_memory_bytes,
        max_attention_logit=result.max_attention_logit,
        qk_clipped_heads=result.qk_clipped_heads,
        imbalance=dealt.imbalance,
        imbalance_in_order=dealt.imbalance_in_order,
    )


def mean_losses(names: Sequence[str], measured: Measured) -> dict[str, float | None] | None:
    """Return each source's mean loss; None for a source without a target, or without sources."""
    if not names:
        return None
    counted = zip(names, measured.losses_by_source, measured.targets_by_source, strict=True)
    return {name: loss / targets if targets else None for name, loss, targets in counted}


def communication_share(measured: Measured, seconds: float, layout: Layout) -> float | None:
    """Compute the part of a step's seconds that the ranks waited for others; None = not known."""
    if layout.device.type == "cuda":
        return None
    busy = statistics.fmean(measured.busy_seconds)
    return min(1.0, max(0.0, 1 - busy / seconds))


def flops_utilization(flops: float, seconds: float, layout: Layout) -> float | None:
    """Compute the share of the world's peak rate that a step used; None = not known."""
    if layout.device.type != "cuda":
        return None
    rate = peak_flops(torch.cuda.get_device_name(layout.device))
    return flops / (seconds * rate * layout.world.size) if rate else None
