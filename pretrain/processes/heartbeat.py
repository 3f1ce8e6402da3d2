"""What this rank does, step by step: written where the watchdog of the node can read it.

launch/watchdog.py looks at the records of its node's ranks. What may take long without a sign of
life (reading an index, compiling, a save) is entered with more patience.
"""

import faulthandler
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from parallel.collective_log import CollectiveLog
from parallel.layout import (
    HOST_AXIS_TIMEOUT,
    Axis,
    Layout,
    launched_local_rank,
    launched_rank,
    launched_world_size,
    record_folder,
)
from parallel.rank_record import RankRecord

STACK_SIGNAL = signal.SIGUSR2
"""The signal that makes a rank write its stacks; launch/watchdog.py sends it."""
SHARE_OF_TIMEOUT = 0.9
"""The share of --distributed-timeout-minutes that a slow activity may take: the watchdog's page
comes before the collectives of the other ranks give up."""
UNUSUAL_STEPS = 2
"""The steps of a phase that may compile."""
EVALUATION_FACTOR = 3
"""How many times the longest silence of the evaluations so far may pass in the next one."""
EVALUATING = "evaluating"
WAITING_FOR_DEVICE = "waiting for the device"
"""The host has handed out all kernels of a step."""


class Heartbeat:
    """Keeps the record of this process.

    Without a launcher that watches, the record is in memory, and serves this process alone: the
    time that it waits for others is counted in it.
    """

    def __init__(self, path: Path | None = None, **about: object):
        self.record = RankRecord(path, **about)
        self.log = CollectiveLog(self.record)
        self._slow_seconds = 0.0
        self._unusual_steps = 0
        self._evaluated: set[str] = set()
        self._stacks: TextIO | None = None
        self._waited_before = 0
        self.on_activity: Callable[[str], None] | None = None
        """Hears of every activity as it begins."""
        if path is not None:
            # Written by the signal's handler in C, also while Python waits in a collective.
            self._stacks = open(path.with_suffix(".stacks"), "w", encoding="utf-8")  # noqa: SIM115
            faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True)

    @classmethod
    def of_this_process(cls) -> "Heartbeat":
        """Make the record of a process that the launcher has started."""
        folder = record_folder()
        about = {
            "rank": launched_rank(),
            "local_rank": launched_local_rank(),
            "world_size": launched_world_size(),
        }
        path = None if folder is None else Path(folder) / f"rank{launched_rank()}"
        return cls(path, **about)

    def set_limits(self, watchdog_seconds: float, timeout_minutes: float) -> None:
        """Tell the watchdog how long silence may be."""
        self._slow_seconds = SHARE_OF_TIMEOUT * 60 * timeout_minutes
        self.record.tell(watchdog_seconds=watchdog_seconds, slow_seconds=self._slow_seconds)

    def listen(self, world: Axis) -> None:
        """Note the collectives of all processes from now on."""
        self.log.listen()
        self.log.name_axes([world])

    def name_axes(self, layout: Layout) -> None:
        """Note the collectives of every axis from now on."""
        axes = (layout.tp, layout.cp, layout.cp_a2a, layout.cp_gather, layout.dp, layout.dp_cp)
        self.log.name_axes([*axes, layout.dp_cp_tp, layout.pp, layout.embedding])
        self.record.tell(device=layout.device.type, stage=layout.pp.rank)

    # ------------------------------------------------------------ what the rank does

    def _enter(self, activity: str, *, patience: float, counts_gaps: bool) -> None:
        self.record.enter(activity, patience=patience, counts_gaps=counts_gaps)
        if self.on_activity is not None:
            self.on_activity(activity)

    def enter_slow(self, activity: str) -> None:
        """Begin what may take long, and at a time of its own on each rank."""
        self._enter(activity, patience=self._slow_seconds, counts_gaps=False)

    def enter_plan(self) -> None:
        """Begin to plan: the index of a large corpus takes as long as it takes.

        No other rank waits in a collective meanwhile.
        """
        self._enter("making the plan", patience=math.inf, counts_gaps=False)

    def enter_save(self, activity: str) -> None:
        """Begin to save, or to wait for a save: as patient as the ranks that write it together."""
        seconds = max(self._slow_seconds, SHARE_OF_TIMEOUT * HOST_AXIS_TIMEOUT.total_seconds())
        self._enter(activity, patience=seconds, counts_gaps=False)

    def enter(self, activity: str) -> None:
        """Begin a part of a step."""
        # A phase's first step compiles; the second may, but its pace is typical otherwise.
        left = self._unusual_steps
        patience = self._slow_seconds if left else 0.0
        self._enter(activity, patience=patience, counts_gaps=left < UNUSUAL_STEPS)

    def enter_evaluation(self, phase: str) -> None:
        """Begin an evaluation; a phase's first one meets its shapes for the first time."""
        patience = self._slow_seconds
        if phase in self._evaluated:
            # It has a pace of its own.
            longest = self.record.gaps.get(EVALUATING, 0) / 1e9
            patience = min(patience, EVALUATION_FACTOR * longest)
        self._evaluated.add(phase)
        self._enter(EVALUATING, patience=patience, counts_gaps=False)

    def begin_phase(self) -> None:
        """Expect the pace of other shapes, and compilations."""
        self._unusual_steps = UNUSUAL_STEPS

    def begin_step(self, step: int) -> None:
        """Begin the step after `step` steps."""
        self._waited_before = self.record.waited
        self.record.set(step=step + 1)

    def end_step(self) -> float:
        """End a step -> the seconds of it in which this rank waited for others."""
        self._unusual_steps = max(0, self._unusual_steps - 1)
        return (self.record.waited - self._waited_before) / 1e9

    def close(self) -> None:
        """Stop noting collectives; what the rank does stays readable until the process ends."""
        self.log.close()
