"""One phase of a plan: its layout, memory, traffic and speed, all but what failures take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.forecast import Forecast
from data.sources import Corpus
from model.windows import Window, mean_pairs_seen
from parallel.schedule import layers_of_stage
from pretrain.config.config import Config
from pretrain.planner.documents import PhaseDocuments
from pretrain.planner.hardware import Hardware
from pretrain.planner.machine import Machine
from pretrain.planner.memory_check import is_checked
from pretrain.planner.phase_memory import PhaseMemory
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.step_time import estimate_step, step_seconds
from pretrain.planner.traffic import Traffic, step_traffic
from pretrain.planner.workload import Workload
from pretrain.schedule.phases import Phase
from tools.planning.axes import groups_of_layout
from tools.planning.report import (
    BalancePlan,
    BatchPlan,
    LayoutPlan,
    MemoryPlan,
    SourcePlan,
    SpeedPlan,
    TrafficPlan,
)


@dataclass(frozen=True)
class PhaseEstimate:
    """Estimates a phase of a run on a cluster."""

    phase: Phase
    config: Config
    world_size: int
    machine: Machine
    model: MemoryModel
    clock: int
    """Consumed tokens where the run starts."""
    documents: PhaseDocuments
    """What is known of the documents that the phase draws."""

    @property
    def hardware(self) -> Hardware:
        """What each process computes on."""
        return self.machine.device.hardware

    @property
    def load(self) -> Workload:
        """What the largest step asks of a rank."""
        return Workload.of_phase(self.phase, self.world_size, self.documents)

    @property
    def steps(self) -> int:
        """Steps that are still to be trained."""
        return sum(steps for steps, _ in self._coming())

    @property
    def tokens(self) -> int:
        """Tokens that are still to be trained."""
        return sum(steps * batch for steps, batch in self._coming())

    @property
    def train_seconds(self) -> float:
        """Seconds of the steps that are still to be trained."""
        total = 0.0
        for steps, batch in self._coming():
            count = self.phase.num_microbatches(self.world_size, batch)
            load = replace(self.load, num_microbatches=count)
            total += steps * step_seconds(self.model, load, self.hardware)
        return total

    def _coming(self) -> list[tuple[int, int]]:
        """List (steps, tokens of a step) that are still to be trained."""
        found = []
        for start, end, batch in self.phase.stretches:
            if end > self.clock:
                found.append(((end - max(start, self.clock)) // batch, batch))
        return found

    # ------------------------------------------------------------ parts of the report

    def layout(self) -> LayoutPlan:
        """Describe who talks to whom."""
        layout = self.phase.layout
        tp, pp, cp = layout.sizes
        a2a, gather = layout.context_levels
        stages = pp * layout.stages_per_rank
        dp = self.load.data_parallel_size
        per_node = self.hardware.devices_per_node
        return LayoutPlan(
            description=f"{layout.describe()} dp {dp} {layout.sharding_strategy}",
            tp=tp,
            pp=pp,
            cp=cp,
            cp_a2a=a2a,
            cp_gather=gather,
            dp=dp,
            sharding_strategy=layout.sharding_strategy,
            schedule=layout.schedule,
            stages_per_rank=layout.stages_per_rank,
            layers_per_stage=tuple(
                len(layers_of_stage(self.config.model.num_layers, number, stages))
                for number in range(stages)
            ),
            sequence_parallel=layout.sequence_parallel and tp > 1,
            recompute_granularity=self.phase.memory.recompute_granularity,
            is_chosen=bool(self.phase.auto),
            axes=tuple(
                groups.plan(per_node)
                for groups in groups_of_layout(
                    layout, self.world_size, has_muon=self.model.muon is not None
                )
            ),
        )

    def memory(self) -> MemoryPlan:
        """Estimate the rank that needs most, and a node's host."""
        needs = PhaseMemory(self.phase, self.config, self.world_size, self.model, self.machine)
        # Ranks between the ends of the pipeline hold less.
        ends = sorted({0, self.phase.layout.pipeline_model_parallel_size - 1})
        of_ends = {rank: self.model.estimate_rank(self.load, rank) for rank in ends}
        fullest = max(of_ends, key=lambda rank: of_ends[rank].total)
        device = self.machine.device
        return MemoryPlan(
            pipeline_rank=fullest,
            parts_bytes=of_ends[fullest],
            total_bytes=of_ends[fullest].total,
            limit_bytes=device.memory_bytes,
            usable_bytes=device.usable,
            is_checked=is_checked(self.config, self.model),
            host_offload_bytes=needs.host_of_node(self.phase, self.world_size),
            host_copy_bytes=needs.copies_of_node,
            host_limit_bytes=self.machine.host_bytes,
        )

    def batch(self) -> BatchPlan:
        """Describe what the largest step is made of."""
        load = self.load
        return BatchPlan(
            seq_length=load.seq_length,
            global_batch_tokens=self.phase.global_batch_tokens,
            micro_batch_size=load.micro_batch_size,
            num_microbatches=load.num_microbatches,
            pairs_per_token=load.tokens_seen(self.config.model.windows),
        )

    def balance(self) -> BalancePlan:
        """Compare what the data ranks have to compute in a step."""
        shape = self.load.step_shape
        costs = self.documents.costs
        if shape.dp_size == 1:
            return BalancePlan(False, 1.0, 1.0, 0, "one data rank")
        if costs is None:
            return BalancePlan(False, 1.0, 1.0, 0, self.documents.why_equal)
        return BalancePlan(
            is_dealt=self.documents.is_dealt,
            slowest_over_mean=self.documents.slowest_over_mean(shape),
            slowest_over_mean_in_order=costs.slowest_over_mean(shape, is_dealt=False),
            steps=costs.steps,
            why_equal="",
        )

    def speed(self) -> SpeedPlan:
        """Estimate the largest step."""
        load = self.load
        step = estimate_step(self.model, load, self.hardware)
        tokens = self.phase.global_batch_tokens
        flops = self.model.size.step_flops(
            tokens, tokens * load.tokens_seen(self.config.model.windows)
        )
        rate = self.hardware.flops * self.world_size
        return SpeedPlan(
            parts_seconds=step,
            step_seconds=step.total,
            model_flops=flops,
            model_flops_utilization=flops / (step.total * rate),
            tokens_per_second=tokens / step.total,
            tokens_per_second_per_device=tokens / step.total / self.world_size,
        )

    def traffic(self) -> tuple[TrafficPlan, ...]:
        """List what a rank sends in the largest step, by purpose."""
        inside = {axis.name: axis.is_inside_node for axis in self.layout().axes}
        return tuple(
            self._traffic_plan(each, is_inside_node=inside[each.axis])
            for each in step_traffic(self.model, self.load, self.hardware)
        )

    def _traffic_plan(self, traffic: Traffic, *, is_inside_node: bool) -> TrafficPlan:
        return TrafficPlan(
            axis=traffic.axis,
            what=traffic.what,
            operation=traffic.operation,
            collectives=traffic.calls,
            sent_bytes=traffic.sent_bytes,
            between_nodes_bytes=traffic.between_nodes_bytes,
            is_inside_node=is_inside_node,
            seconds=traffic.seconds,
            is_overlapped=_is_overlapped(traffic, self.hardware),
        )

    def sources(self, forecast: Sequence[Forecast]) -> tuple[SourcePlan, ...]:
        """List what the phase draws of each source."""
        return tuple(
            SourcePlan(
                name=row.source,
                share=row.share,
                tokens=row.tokens,
                epoch_tokens=row.epoch_tokens,
                from_epoch=row.from_epoch,
                to_epoch=row.to_epoch,
            )
            for row in forecast
            if row.phase == self.phase.name
        )


def _is_overlapped(traffic: Traffic, hardware: Hardware) -> bool:
    """Tell whether a rank computes while it sends: layers, or Muon's bucket before this one."""
    # A CPU sends in the thread that computes (step_time.py).
    if hardware.is_cpu:
        return False
    return traffic.axis == "dp_cp" or (traffic.axis == "dp_cp_tp" and traffic.calls > 1)


# ---------------------------------------------------------------- documents


def mean_pairs(
    phase: Phase, corpus: Corpus, forecast: Sequence[Forecast], windows: Sequence[Window]
) -> float | None:
    """Return how many tokens a token sees on average in a phase; None without data or masking.

    The average is also over the layers, whose windows are given. A document longer than a sample is
    cut into samples; that others are cut where a sample ends is left out.
    """
    rows = [row for row in forecast if row.phase == phase.name and row.tokens]
    if not phase.document_masking or not rows:
        return None
    total = sum(row.tokens for row in rows)
    return sum(
        row.tokens
        / total
        * pairs_of_lengths(corpus.train[row.source].lengths, phase.seq_length, windows)
        for row in rows
    )


def pairs_of_lengths(lengths: np.ndarray, seq_length: int, windows: Sequence[Window]) -> float:
    """Return the causal pairs per token of documents, those beyond a sample cut into samples."""
    whole, rest = np.divmod(lengths.astype(np.float64), seq_length)
    of_sample = mean_pairs_seen(np.array([seq_length]), windows)
    pairs = whole * of_sample + mean_pairs_seen(rest, windows)
    return float(pairs.sum() / lengths.sum(dtype=np.float64))
