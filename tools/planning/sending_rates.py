"""Measures what the processes of a machine send each other, at the shapes of one rank."""

import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist

from tools.planning.clock import Clock

IN_A_ROW = 4
"""Products and collectives in turns, in one measurement."""
TINY_ELEMENTS = 256
"""Elements for each process in a collective whose time is its latency."""


class Sending(Clock):
    """Measures collectives of all processes."""

    def rates(self) -> dict[str, float]:
        """Measure collectives of all processes: bytes per second by kind, and the latency."""
        work = self.work
        latency = self._between_products(self._sum_of(TINY_ELEMENTS * self.world_size))
        tokens = max(2 * TINY_ELEMENTS, work.exchanged_elements // self.world_size)
        # A ring sends each part twice: to be added up, and the sum.
        sums = 2 * self._rate([(tokens, 1)], self._sum_of, latency)
        exchanges = self._rate([(tokens, 1)], self._exchange_of, latency)
        shards = [(elements // self.world_size, times) for elements, times in work.units]
        gathers = self._rate(shards, self._gather_of, latency)
        return {
            "ring_bytes_per_second": statistics.fmean((gathers, sums)),
            "reduction_bytes_per_second": self._rate(shards, self._reduction_of, latency),
            "exchange_bytes_per_second": exchanges,
            "latency_seconds": latency,
        }

    def _rate(
        self,
        sizes: list[tuple[int, int]],
        make: Callable[[int], Callable[[], object]],
        latency: float,
    ) -> float:
        """Return the bytes per second that a process sends.

        Args:
            sizes: elements for every process, and how often.
            make: of as many elements in all.
            latency: of a few bytes, which is no part of the rate.
        """
        seconds = 0.0
        sent = 0
        for each, times in sizes:
            alone = self._between_products(make(each * self.world_size))
            # One call may take less than the latency of another kind.
            seconds += times * max(alone - latency, alone / 2)
            # A rank sends all but its own part.
            sent += times * 4 * each * (self.world_size - 1)
        return sent / seconds

    def _between_products(self, call: Callable[[], object]) -> float:
        """Return what a collective adds to the products around it.

        Processes come to it at different times, as in a layer, and wait for each other.
        """
        left = self.random(self.work.tokens, self.work.hidden_size)
        right = self.random(self.work.hidden_size, self.work.hidden_size)

        def compute() -> None:
            for _ in range(IN_A_ROW):
                torch.mm(left, right)

        def both() -> None:
            for _ in range(IN_A_ROW):
                torch.mm(left, right)
                call()

        alone = self.seconds_of(compute)
        return max(1e-9, self.seconds_of(both) - alone) / IN_A_ROW

    def _sum_of(self, elements: int) -> Callable[[], object]:
        whole = torch.ones(elements, device=self.device)
        return lambda: dist.all_reduce(whole)

    def _exchange_of(self, elements: int) -> Callable[[], object]:
        whole = torch.ones(elements, device=self.device)
        return lambda: dist.all_to_all_single(torch.empty_like(whole), whole)

    def _gather_of(self, elements: int) -> Callable[[], object]:
        shard = torch.ones(elements // self.world_size, device=self.device)

        def gather() -> None:
            whole = torch.empty(elements, device=self.device)
            dist.all_gather_into_tensor(whole, shard)

        return gather

    def _reduction_of(self, elements: int) -> Callable[[], object]:
        weights = torch.ones(elements, device=self.device)

        def reduce() -> None:
            shard = torch.empty(elements // self.world_size, device=self.device)
            dist.reduce_scatter_tensor(shard, weights)

        return reduce
