"""Times work that all processes of a machine do at once."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from tools.planning.rank_work import Work

ROUNDS = (3, 100)
"""Fewest and most repetitions of a measurement."""


class Clock:
    """Times calls on all processes at once, and makes what they work on."""

    def __init__(self, work: Work, device: torch.device):
        self.work = work
        self.device = device
        self.dtype = getattr(torch, work.dtype)
        self.world_size = dist.get_world_size()

    def seconds_of(self, call: Callable[[], object]) -> float:
        """Return the median seconds of a call that all processes make equally often."""
        first = self._agreed(self._once(call))
        fewest, most = ROUNDS
        count = min(most, max(fewest, int(self.work.seconds / first)))
        return statistics.median(self._once(call) for _ in range(count))

    def _once(self, call: Callable[[], object]) -> float:
        dist.barrier()
        start = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _agreed(self, seconds: float) -> float:
        """Return the longest of all processes' seconds."""
        longest = torch.tensor([seconds], dtype=torch.float64, device=torch.device("cpu"))
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        return float(longest)

    def random(self, *sizes: int) -> torch.Tensor:
        """Make a tensor of small random numbers."""
        return torch.randn(*sizes, dtype=self.dtype, device=self.device).mul_(0.02)
