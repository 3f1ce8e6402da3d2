"""Sum up over all ranks, after each step, what is reported besides the loss."""

import resource
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data.batch import Batch
from data.digest import DIGEST_BITS
from parallel.collectives import all_reduce
from parallel.layout import Layout


@dataclass(frozen=True)
class Measured:
    """One step, as all ranks know it."""

    causal_pairs: float
    """Pairs of a query and a key in the documents of the global batch."""
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


def measure(
    microbatches: Sequence[Batch],
    layout: Layout,
    *,
    wants_stop: bool,
    wants_save: bool,
    data_seconds: float,
    has_failed_save: bool,
    busy_seconds: float,
) -> Measured:
    """Sum up over all ranks; collective over the world."""
    lengths = [batch.cu_seqlens.diff().double() for batch in microbatches]
    own_pairs = sum(float((n * (n + 1) / 2).sum()) for n in lengths)
    own_digest = sum(batch.digest for batch in microbatches) % 2**DIGEST_BITS

    # Each slice counts once: all tp and pp ranks have the same ones. All cp ranks have the lengths
    # of the whole microbatch.
    has_own_slice = layout.tp.is_first and layout.pp.is_first
    has_own_lengths = has_own_slice and layout.cp.is_first
    # A rank's own time is a sum, too: the others add nothing at its place.
    busy = [0.0] * layout.world.size
    busy[layout.world.rank] = busy_seconds
    to_sum = [
        own_pairs if has_own_lengths else 0,
        own_digest if has_own_slice else 0,
        wants_stop,
        wants_save,
        has_failed_save,
        *busy,
    ]
    to_compare = [peak_memory(layout), data_seconds]
    sums = torch.tensor(to_sum, dtype=torch.float64, device=layout.device)
    highest = torch.tensor(to_compare, dtype=torch.float64, device=layout.device)
    pairs, digest, stops, saves, failed_saves, *busy = all_reduce(sums, layout.world).tolist()
    memory, slowest = all_reduce(highest, layout.world, dist.ReduceOp.MAX).tolist()

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
    )


def peak_memory(layout: Layout) -> int:
    """Return the most bytes so far: allocated on the GPU, or in the process's host memory."""
    if layout.device.type == "cuda":
        return torch.cuda.max_memory_allocated(layout.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
