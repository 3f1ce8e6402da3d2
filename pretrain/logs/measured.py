"""Sum up over all ranks, after each step, what is reported besides the loss."""

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from data.batch import Batch
from data.digest import DIGEST_BITS
from model.windows import Window, mean_pairs_seen
from parallel.collectives import all_reduce
from parallel.layout import Layout
from pretrain.processes.deals import other_deals

STATM = Path("/proc/self/statm")
"""The kernel's count of this process's pages; the second number are those in memory."""


@dataclass(frozen=True)
class Measured:
    """One step, as all ranks know it."""

    causal_pairs: float
    """Pairs of a query and a key in the global batch's documents and windows, a layer's mean."""
    is_stopped: bool
    """Does any rank want to stop?"""
    is_save_due: bool
    """Are the minutes between two checkpoints over on any rank?"""
    data_digest: str
    """Hash of the global batch's tokens, hexadecimal."""
    peak_memory_bytes: int
    """On the rank with the most."""
    data_seconds: float
    """On the rank that read for the longest."""
    has_failed_save: bool
    """Has the background write of a checkpoint failed on any rank?"""
    busy_seconds: list[float]
    """Seconds of the step in which a rank did not wait for others, in the order of the ranks."""
    peak_reserved_bytes: int | None
    """What the GPU's allocator held at most, on the rank with the most; None on a CPU."""
    host_memory_bytes: int
    """What the process has in the host's memory now, on the rank with the most."""
    losses_by_source: list[float]
    """Sum of the target losses in nats that each source's tokens had; empty where not asked for."""
    targets_by_source: list[int]
    """Targets that each source gave."""


def measure(
    microbatches: Sequence[Batch],
    layout: Layout,
    windows: Sequence[Window],
    *,
    wants_stop: bool,
    wants_save: bool,
    data_seconds: float,
    has_failed_save: bool,
    busy_seconds: float,
    source_losses: torch.Tensor | None = None,
    deal_hash: int = 0,
) -> Measured:
    """Sum up over all ranks; collective over the world.

    Args:
        windows: of the model's layers.
        source_losses: this rank's (see `step.py: Stepper.start`); None = they are not asked for.
        deal_hash: of how this rank found the step's samples dealt.

    Raises:
        Refused: ranks found them dealt in different ways; on all ranks.
    """
    num_sources = 0 if source_losses is None else len(source_losses)
    own_pairs, own_digest, own_targets = _own_data(microbatches, layout, windows, num_sources)
    # A rank's own time is a sum, too: the others add nothing at its place.
    own_busy = [0.0] * layout.world.size
    own_busy[layout.world.rank] = busy_seconds
    flags = [wants_stop, wants_save, has_failed_save]
    to_sum = [own_pairs, own_digest, *flags, *own_busy, *own_targets]
    to_compare = [peak_memory(layout), data_seconds, _reserved_memory(layout) or 0, host_memory()]
    # Both ends of what the ranks found, as the highest of it and of its negative.
    to_compare += [deal_hash, -deal_hash]

    sums = _sum_over_ranks(to_sum, source_losses, layout)
    pairs, digest, stops, saves, failed_saves, *rest = sums
    busy = rest[: layout.world.size]
    by_source = rest[layout.world.size :]
    memory, slowest, reserved, host, *deals = _highest_over_ranks(to_compare, layout)
    if deals[0] != -deals[1]:
        raise other_deals("this step")

    # A sum of digests does not depend on the order in which the slices were read.
    text = f"{int(digest) % 2**DIGEST_BITS:010x}"
    return Measured(
        causal_pairs=pairs,
        is_stopped=stops > 0,
        is_save_due=saves > 0,
        data_digest=text,
        peak_memory_bytes=int(memory),
        data_seconds=slowest,
        has_failed_save=failed_saves > 0,
        busy_seconds=busy,
        peak_reserved_bytes=None if _reserved_memory(layout) is None else int(reserved),
        host_memory_bytes=int(host),
        losses_by_source=by_source[num_sources:],
        targets_by_source=[int(count) for count in by_source[:num_sources]],
    )


def _own_data(
    microbatches: Sequence[Batch], layout: Layout, windows: Sequence[Window], num_sources: int
) -> tuple[float, int, list[int]]:
    """Return what this rank adds to the step's pairs, its digest and the targets of each source.

    Each slice counts once: all tp and pp ranks have the same ones. All cp ranks have the lengths of
    the whole microbatch.
    """
    has_own_slice = layout.tp.is_first and layout.pp.is_first
    if not has_own_slice:
        return 0.0, 0, [0] * num_sources
    digest = sum(batch.digest for batch in microbatches) % 2**DIGEST_BITS
    targets = _targets_by_source(microbatches, num_sources)
    if not layout.cp.is_first:
        return 0.0, digest, targets
    lengths = [batch.cu_seqlens.diff().double() for batch in microbatches]
    pairs = float(sum(mean_pairs_seen(n.numpy(), windows).sum() for n in lengths))
    return pairs, digest, targets


def _targets_by_source(microbatches: Sequence[Batch], num_sources: int) -> list[int]:
    """Count the targets of this rank's slices by the source that gave them."""
    counts = [0] * num_sources
    if num_sources:
        for batch in microbatches:
            for run in batch.source_runs:
                counts[run.source] += run.num_targets
    return counts


def _sum_over_ranks(
    values: Sequence[float], source_losses: torch.Tensor | None, layout: Layout
) -> list[float]:
    """Add up each value over all ranks, and behind them the losses by source where there are."""
    sums = torch.tensor(values, dtype=torch.float64, device=layout.device)
    if source_losses is not None:
        # Those of the last stage are the same on its tp ranks. The host does not look at them here.
        counted = source_losses if layout.tp.is_first else torch.zeros_like(source_losses)
        sums = torch.cat([sums, counted])
    return all_reduce(sums, layout.world).tolist()


def _highest_over_ranks(values: Sequence[float], layout: Layout) -> list[float]:
    """Find the highest of each value over all ranks."""
    highest = torch.tensor(values, dtype=torch.float64, device=layout.device)
    return all_reduce(highest, layout.world, dist.ReduceOp.MAX).tolist()


def peak_memory(layout: Layout) -> int:
    """Return the most bytes so far: allocated on the GPU, or in the process's host memory."""
    if layout.device.type == "cuda":
        return torch.cuda.max_memory_allocated(layout.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reserved_memory(layout: Layout) -> int | None:
    """Return the most bytes so far that the GPU's allocator held; None on a CPU."""
    if layout.device.type != "cuda":
        return None
    return torch.cuda.max_memory_reserved(layout.device)


def host_memory() -> int:
    """Return the bytes that this process has in the host's memory now."""
    pages = int(STATM.read_text().split()[1])
    return pages * resource.getpagesize()
