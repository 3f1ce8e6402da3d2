"""Which ranks are slower than their equals: the others wait for them in every step.

A rank's own time is that of the step without its waits in collectives, so that those who wait for
a slow rank are not slow themselves. On GPUs the host does not wait in a collective: there it is
what the host does (reading data, launching kernels) and not what the device computes.
"""

import socket
import statistics
from collections import deque
from collections.abc import Callable, Sequence

import torch.distributed as dist

from parallel.layout import Layout
from pretrain.config.load import warn

WINDOW = 20
"""Steps that are looked at."""
LEAST_SLOW_STEPS = 11
"""Steps of the window in which a rank must be slow: most of them."""
SLOW_FACTOR = 1.2
"""How much longer than its equals a slow rank takes."""
SLOW_SECONDS = 0.01
"""How much longer at least: shorter differences are the machine's noise."""
UNUSUAL_STEPS = 2
"""Steps after a start that compile and are not looked at."""


def compare(busy_seconds: Sequence[float], ranks_per_stage: int) -> dict[int, float]:
    """Compare each rank with its equals, the ranks of its pipeline stage -> slow rank: factor.

    Their lower median is the measure: of two ranks, the faster one.
    """
    slow = {}
    for first in range(0, len(busy_seconds), ranks_per_stage):
        equals = busy_seconds[first : first + ranks_per_stage]
        usual = statistics.median_low(equals)
        for number, seconds in enumerate(equals):
            if seconds > max(SLOW_FACTOR * usual, usual + SLOW_SECONDS):
                slow[first + number] = seconds / max(usual, 1e-9)
    return slow


class SlowRanks:
    """Names a rank that was slow in most of the last steps, once, and again when that changes."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.ranks_per_stage = layout.world.size // layout.pp.size
        self.window: deque[dict[int, float]] = deque(maxlen=WINDOW)
        self.named: set[int] = set()
        self.to_leave_out = UNUSUAL_STEPS

    def note(self, busy_seconds: Sequence[float], report: Callable[[str, str], None]) -> None:
        """Look at one more step; collective over the world where somebody is to be named."""
        if self.to_leave_out:
            self.to_leave_out -= 1
            return
        self.window.append(compare(busy_seconds, self.ranks_per_stage))
        # All ranks have the same numbers, so that all come to the same result.
        counts: dict[int, int] = {}
        for slow in self.window:
            for rank in slow:
                counts[rank] = counts.get(rank, 0) + 1
        # Who was named is well again when it was slow in few steps: no wavering in between.
        now = {rank for rank, count in counts.items() if count >= LEAST_SLOW_STEPS}
        well = {
            rank
            for rank in self.named
            if counts.get(rank, 0) <= len(self.window) - LEAST_SLOW_STEPS
        }
        new = now - self.named
        if new or well:
            self._say(sorted(new), sorted(well), report)
        self.named = (self.named | new) - well

    def _say(
        self, new: Sequence[int], well: Sequence[int], report: Callable[[str, str], None]
    ) -> None:
        """Name the ranks with their hosts."""
        hosts = self._hosts()
        for rank in new:
            factors = [slow[rank] for slow in self.window if rank in slow]
            text = (
                f"rank {rank} ({hosts[rank]}) is slow: {statistics.median(factors):.1f} x the time "
                f"of its equals in {len(factors)} of the last {len(self.window)} steps; "
                "the others wait for it"
            )
            self._report("slow rank", text, report)
        for rank in well:
            self._report("rank well again", f"rank {rank} ({hosts[rank]}) keeps up again", report)

    def _hosts(self) -> list[str]:
        """Ask all ranks for their hosts, which only they know; collective over the world."""
        hosts: list[str] = [""] * self.layout.world.size
        dist.all_gather_object(hosts, socket.gethostname(), group=self.layout.world.group)
        return hosts

    def _report(self, kind: str, text: str, report: Callable[[str, str], None]) -> None:
        report(kind, text)
        if self.layout.world.is_first:
            warn(text)
