"""The plan of a whole run, from what was checked (pretrain/plan.py) and where it is to run."""

import numpy as np

from model.windows import mean_pairs_seen
from pretrain.data_outlook import draw_step_costs
from pretrain.plan import Plan
from pretrain.plan_warnings import warnings_about
from pretrain.planner.documents import PhaseDocuments
from pretrain.planner.hardware import Hardware
from pretrain.planner.machine import MEMORY_MARGIN
from pretrain.planner.model_size import ModelSize
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.step_time import attention_efficiency
from pretrain.schedule.phases import Phase
from tools.planning.axes import crossing_warnings
from tools.planning.cluster import Cluster
from tools.planning.phases import PhaseEstimate, mean_pairs
from tools.planning.report import CheckpointPlan, PhasePlan, RunPlan, SearchPlan, SourcePlan
from tools.planning.search import search_layouts
from tools.planning.totals import Assumed, Totals
from tools.shared.effective_time import GROUPS_SECONDS, NOTICE_SECONDS, FailureCosts


def estimate_phases(
    plan: Plan, cluster: Cluster, document_tokens: int | None
) -> list[PhaseEstimate]:
    """Estimate the phases that are still to be trained.

    Args:
        document_tokens: length of all documents; None = those of the data, or of a sample.

    Raises:
        ValueError: none is left.
    """
    clock = plan.resumed.clock if plan.resumed else 0
    model = MemoryModel.of_run(plan.config, plan.vocab_size, cluster.hardware)
    estimates = []
    for phase in plan.phases:
        if phase.end <= clock:
            continue
        documents = _documents(plan, phase, model, document_tokens)
        estimates.append(
            PhaseEstimate(
                phase, plan.config, cluster.world_size, cluster.machine, model, clock, documents
            )
        )
    if not estimates:
        raise ValueError(
            f"train_tokens: all {plan.phases[-1].end:,} tokens are trained. Fix: raise them to go "
            "on, or give another --save."
        )
    return estimates


def _documents(
    plan: Plan, phase: Phase, model: MemoryModel, document_tokens: int | None
) -> PhaseDocuments:
    """Find out what can be known of the documents of a phase."""
    windows = plan.config.model.windows
    if document_tokens is not None and phase.document_masking:
        length = min(document_tokens, phase.seq_length)
        pairs = float(mean_pairs_seen(np.array([length]), windows)[0]) / length
        return PhaseDocuments(pairs, why_equal="all documents have the length that was given")
    pairs = mean_pairs(phase, plan.corpus, plan.forecast, windows)
    costs, why = draw_step_costs(phase, plan.corpus, plan.forecast, model.size.document_cost)
    return PhaseDocuments(pairs, costs, is_dealt=phase.balance != "none", why_equal=why)


def make_run_plan(
    plan: Plan,
    cluster: Cluster,
    assumed: Assumed,
    *,
    config_name: str,
    document_tokens: int | None = None,
    notes: tuple[str, ...] = (),
    with_search: bool = False,
    across_nodes: bool = False,
) -> RunPlan:
    """Put together everything that the plan knows.

    Args:
        config_name: the run's file, as it was named.
        notes: what was not looked at.
        across_nodes: the search also ranks layouts whose tp or all-to-all leaves a node.

    Raises:
        ValueError: nothing is left to train, or failures leave no time for it.
    """
    estimates = estimate_phases(plan, cluster, document_tokens)
    totals = Totals(plan, estimates, cluster.nodes, assumed)
    saved = totals.checkpoints()
    costs, left_out = totals.with_time_left(totals.costs_of_failures(saved))
    failures = totals.failures(costs)
    phases = tuple(
        _phase_plan(
            estimate,
            totals,
            costs,
            estimate.sources(plan.forecast),
            search_layouts(estimate, across_nodes=across_nodes) if with_search else None,
        )
        for estimate in estimates
    )
    return RunPlan(
        config=config_name,
        model=plan.config.model.model or f"{plan.config.model.num_layers} layers",
        parameters=ModelSize(plan.config.model, plan.vocab_size).num_parameters,
        world_size=cluster.world_size,
        devices_per_node=cluster.hardware.devices_per_node,
        nodes=cluster.nodes,
        hardware=cluster.hardware,
        price_per_device_hour=assumed.price_per_device_hour,
        phases=phases,
        total=totals.cost(estimates, costs),
        checkpoints=saved,
        failures=failures,
        assumptions=_assumptions(plan, cluster, assumed),
        notes=notes,
        warnings=(
            *warnings_about(plan),
            *_crossings(phases, cluster.hardware),
            *_warnings_of_saves(saved),
            *left_out,
        ),
    )


def _phase_plan(
    estimate: PhaseEstimate,
    totals: Totals,
    costs: FailureCosts,
    sources: tuple[SourcePlan, ...],
    search: SearchPlan | None,
) -> PhasePlan:
    return PhasePlan(
        name=estimate.phase.name,
        layout=estimate.layout(),
        memory=estimate.memory(),
        batch=estimate.batch(),
        balance=estimate.balance(),
        speed=estimate.speed(),
        traffic=estimate.traffic(),
        cost=totals.cost([estimate], costs),
        sources=sources,
        search=search,
    )


def _crossings(phases: tuple[PhasePlan, ...], hardware: Hardware) -> list[str]:
    """Warn of what talks in every layer and leaves a node."""
    per_node = hardware.devices_per_node
    return [text for phase in phases for text in crossing_warnings(phase, per_node)]


def _warnings_of_saves(saved: CheckpointPlan | None) -> list[str]:
    """Warn of a run without checkpoints, and of a disk that is too slow for them."""
    if saved is None:
        return ["there are no checkpoints (--save): a failure begins the run again"]
    interval = saved.interval_seconds
    if interval is None or saved.write_seconds <= interval:
        return []
    return [
        f"a checkpoint takes {saved.write_seconds:,.0f} s to write and one is due every "
        f"{interval:,.0f} s: steps wait for the disk. Fix: a longer --save-interval, or a faster "
        "file system (--disk-gigabytes-per-second)"
    ]


def _assumptions(plan: Plan, cluster: Cluster, assumed: Assumed) -> tuple[str, ...]:
    """Say what the figures rest on, a line each."""
    hardware = cluster.hardware
    efficiency = hardware.efficiency
    fp32 = f" and {hardware.fp32_flops / 1e12:g} fp32" if hardware.fp32_flops else ""
    measured = "as measured on an H100" if efficiency == type(efficiency)() else "of the file"
    return (
        f"{hardware.name}: {hardware.flops / 1e12:g} TFLOP/s dense bf16{fp32}, memory "
        f"{hardware.memory_bytes_per_second / 1e12:g} TB/s, to the devices of a node "
        f"{hardware.node_bytes_per_second / 1e9:g} GB/s, to other nodes "
        f"{hardware.network_bytes_per_second / 1e9:g} GB/s (data sheets, one direction)",
        f"reached of that: products {efficiency.products:g}, attention "
        f"{attention_efficiency(plan.config.model, hardware):g} ({measured}); links "
        f"{efficiency.links:g}, memory {efficiency.memory:g}, computing loses "
        f"{efficiency.overlap_slowdown:g} of what runs beside it",
        f"memory: {MEMORY_MARGIN:g} of the device stays free; a node's host has "
        f"{cluster.machine.host_bytes / 2**30:,.0f} GiB",
        f"files: {assumed.disk_gigabytes_per_second:g} GB/s per node, read and written",
        f"failures: one in {assumed.hours_to_failure:.3g} h, {NOTICE_SECONDS} s to notice it, "
        f"{GROUPS_SECONDS} s for the groups",
        # What `layout: auto` chose, and what it took for granted.
        *plan.layout_lines,
    )
