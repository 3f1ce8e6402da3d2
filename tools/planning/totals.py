"""What a whole run takes: checkpoints, failures, days, device hours and price."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pretrain.checkpointing.save_folder import checkpoint_bytes, most_kept
from pretrain.checkpointing.save_schedule import SECONDS_PER_MINUTE
from pretrain.plan import Plan
from tools.planning.phases import PhaseEstimate
from tools.planning.report import CheckpointPlan, CostPlan, FailurePlan
from tools.shared.effective_time import (
    GIGABYTE,
    GROUPS_SECONDS,
    NOTICE_SECONDS,
    SECONDS_PER_HOUR,
    FailureCosts,
)

HOURS_PER_DAY = 24
DEVICE_HOURS_TO_FAILURE = 7.9 * 1024
"""Mean hours to a failure of a job, times its GPUs: 7.9 hours with 1,024 (arXiv 2410.21680)."""
OWN_RESTART_SECONDS = 4.5
"""What the launcher and the trainer take of a restart: to end, launch, import, plan and make the
first step. Measured on two cores (launch/README.md, "How fast it comes back")."""
READS = 2
"""How often a restart reads a checkpoint: once for its checksums, once for its tensors."""


@dataclass(frozen=True)
class Assumed:
    """Holds what a plan cannot know of a cluster."""

    disk_gigabytes_per_second: float
    """What a node reads and writes of the shared file system."""
    hours_to_failure: float
    """Mean hours between two failures of the whole run."""
    price_per_device_hour: float | None
    are_hours_given: bool = False
    """Are the hours of this cluster, and not those that are assumed of any?"""


@dataclass(frozen=True)
class Totals:
    """Estimates what the phases of a run take together."""

    plan: Plan
    estimates: Sequence[PhaseEstimate]
    nodes: int
    assumed: Assumed

    @property
    def train_seconds(self) -> float:
        """Seconds of all steps."""
        return sum(estimate.train_seconds for estimate in self.estimates)

    # ------------------------------------------------------------ checkpoints

    def saves_of(self, estimate: PhaseEstimate) -> int:
        """Count the checkpoints of a phase: those of its intervals, and the one at its end."""
        settings = self.plan.config.checkpoint
        # In steps, so that an interval that divides them does so without a rounding error.
        intervals: list[float] = []
        if settings.save_interval is not None:
            intervals.append(settings.save_interval)
        if settings.save_interval_in_mins is not None:
            step_seconds = estimate.train_seconds / estimate.steps
            intervals.append(settings.save_interval_in_mins * SECONDS_PER_MINUTE / step_seconds)
        if not intervals:
            return 1
        # Nothing is due twice at the phase's end.
        return math.ceil(estimate.steps / max(1, min(intervals)))

    def checkpoints(self) -> CheckpointPlan | None:
        """Describe the run's checkpoints; None without --save."""
        config = self.plan.config
        if config.checkpoint.save is None:
            return None
        size = checkpoint_bytes(config, self.plan.vocab_size)
        saves = sum(self.saves_of(estimate) for estimate in self.estimates)
        kept = min(most_kept(config, [each.phase for each in self.estimates]), saves)
        per_device = max(self._bytes_per_device(estimate) for estimate in self.estimates)
        write = size / (self.nodes * self.assumed.disk_gigabytes_per_second * GIGABYTE)
        hardware = self.estimates[0].hardware
        copy = per_device / (hardware.host_bytes_per_second * hardware.efficiency.links)
        has_interval = saves > len(self.estimates)
        in_background = config.checkpoint.async_save
        return CheckpointPlan(
            size_bytes=size,
            bytes_per_device=per_device,
            saves=saves,
            kept=kept,
            kept_bytes=kept * size,
            interval_seconds=self.train_seconds / saves if has_interval else None,
            is_in_background=in_background,
            stall_seconds=copy if in_background else copy + write,
            write_seconds=write,
        )

    def _bytes_per_device(self, estimate: PhaseEstimate) -> int:
        """Return what the rank that writes most writes of a checkpoint."""
        load = estimate.load
        pp = load.layout.pipeline_model_parallel_size
        with_optimizer = not self.plan.config.checkpoint.no_save_optim
        return max(
            estimate.model.saved_bytes(load, rank, with_optimizer=with_optimizer)
            for rank in {0, pp - 1}
        )

    # ------------------------------------------------------------ failures

    def costs_of_failures(self, saved: CheckpointPlan | None) -> FailureCosts:
        """Return what one failure and one save cost; without saves the run begins again."""
        size = saved.size_bytes if saved else 0
        stall = saved.stall_seconds if saved else 0.0
        between = self.train_seconds / (saved.saves if saved else 1)
        return FailureCosts(
            hours_to_failure=self.assumed.hours_to_failure,
            notice_seconds=NOTICE_SECONDS,
            own_seconds=OWN_RESTART_SECONDS,
            groups_seconds=GROUPS_SECONDS,
            read_bytes=READS * size / self.nodes,
            read_bytes_per_second=self.assumed.disk_gigabytes_per_second * GIGABYTE,
            save_seconds=between + stall,
            stall_seconds=stall,
        )

    def with_time_left(self, costs: FailureCosts) -> tuple[FailureCosts, list[str]]:
        """Return costs that let the run end, and a line that says what was left out for that.

        Raises:
            ValueError: the given failures let it make no progress.
        """
        if costs.effective_share > 0:
            return costs, []
        hours = costs.hours_to_failure
        seconds = costs.restart_seconds + costs.again_seconds
        fix = "save more often (--save-interval, --save-interval-in-mins), or fewer nodes"
        if self.assumed.are_hours_given:
            raise ValueError(
                f"mtbf_hours = {hours:g}: a failure costs {seconds:,.0f} s, so that the run never "
                f"ends. Fix: {fix}."
            )
        line = (
            f"failures are left out: one is assumed in {hours:.3g} h and costs {seconds:,.0f} s, "
            f"so that the run would never end. Fix: {fix}"
        )
        return replace(costs, hours_to_failure=math.inf), [line]

    def failures(self, costs: FailureCosts) -> FailurePlan:
        """Describe what failures take, and what is left."""
        share = costs.effective_share
        hours = self.train_seconds / share / SECONDS_PER_HOUR
        return FailurePlan(
            hours_to_failure=self.assumed.hours_to_failure,
            failures=hours / costs.hours_to_failure,
            restart_seconds=costs.restart_seconds,
            again_seconds=costs.again_seconds,
            effective_share=share,
            arithmetic=tuple(costs.arithmetic()),
        )

    # ------------------------------------------------------------ what it comes to

    def cost(self, estimates: Sequence[PhaseEstimate], costs: FailureCosts) -> CostPlan:
        """Return what some of the phases take, with their part of failures and saves."""
        train = sum(estimate.train_seconds for estimate in estimates)
        whole = train / costs.effective_share
        hours = whole / SECONDS_PER_HOUR
        device_hours = hours * self.estimates[0].world_size
        price = self.assumed.price_per_device_hour
        return CostPlan(
            tokens=sum(estimate.tokens for estimate in estimates),
            steps=sum(estimate.steps for estimate in estimates),
            train_seconds=train,
            save_seconds=whole * costs.lost_to_saves,
            failure_seconds=whole * costs.lost_to_failures,
            days=hours / HOURS_PER_DAY,
            device_hours=device_hours,
            price=None if price is None else price * device_hours,
        )
