"""A plan as text for a terminal: short aligned tables, what is assumed at the end."""

from collections.abc import Sequence

from data.units import show_bytes, show_tokens
from tools.planning.report import (
    BalancePlan,
    CheckpointPlan,
    CostPlan,
    FailurePlan,
    PhasePlan,
    RunPlan,
    SearchPlan,
    TrafficPlan,
)
from tools.shared.message_text import count_of
from tools.shared.number_text import short

SECONDS_PER_DAY = 86_400
LONGEST_SOURCE = 40
"""Characters of a source's name; of a longer one the end is shown."""
MOST_SOURCES = 8
"""Sources of a phase that are listed."""


def describe_plan(plan: RunPlan) -> str:
    """Write the whole plan."""
    blocks = [[_head(plan)], _phase_rows(plan.phases)]
    blocks += [_phase_block(phase, plan.devices_per_node) for phase in plan.phases]
    blocks.append(_totals(plan))
    if plan.checkpoints is not None:
        blocks.append(_checkpoints(plan.checkpoints))
    blocks.append(_failures(plan.failures))
    blocks.append(["assumed:", *(f"  {text}" for text in plan.assumptions)])
    return "\n\n".join("\n".join(lines) for lines in blocks)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)
) -> list[str]:
    """Align cells in columns: numbers to the right, the columns of `left` to the left."""
    everything = [header, *rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(header))]
    lines = []
    for row in everything:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def show_seconds(seconds: float) -> str:
    """Write a time with three digits: 45.2 ms, 12.3 s, 4.5 min, 7.8 h, 3.2 days."""
    for limit, unit, divisor in (
        (1, "ms", 1e-3),
        (120, "s", 1),
        (7200, "min", 60),
        (2 * SECONDS_PER_DAY, "h", 3600),
    ):
        if seconds < limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / SECONDS_PER_DAY:,.1f} days"


def _head(plan: RunPlan) -> str:
    hardware = plan.hardware
    nodes = count_of(plan.nodes, "node")
    return (
        f"plan of {plan.config}: {plan.model}, {plan.parameters:,} parameters, on "
        f"{plan.world_size:,} x {hardware.name} ({nodes} of {plan.devices_per_node})"
    )


def _phase_rows(phases: Sequence[PhasePlan]) -> list[str]:
    """Write a line per phase, of what is asked about first."""
    header = ["phase", "length", "batch", "steps", "step", "MFU", "tokens/s", "memory", "days"]
    rows = [
        [
            phase.name,
            show_tokens(phase.batch.seq_length),
            show_tokens(phase.batch.global_batch_tokens),
            f"{phase.cost.steps:,}",
            show_seconds(phase.speed.step_seconds),
            f"{100 * phase.speed.model_flops_utilization:.1f} %",
            short(phase.speed.tokens_per_second),
            show_bytes(phase.memory.total_bytes),
            f"{phase.cost.days:,.2f}",
            phase.layout.description,
        ]
        for phase in phases
    ]
    return table([*header, "layout"], rows, left=(0, 9))


def _phase_block(phase: PhasePlan, devices_per_node: int) -> list[str]:
    """Write what is known of a phase below its name."""
    memory = phase.memory
    lines = [f"phase {phase.name}"]
    # Who talks to whom.
    for axis in phase.layout.axes:
        where = "inside a node" if axis.is_inside_node else "between nodes"
        ranks = ", ".join(map(str, axis.first_group[:4]))
        dots = ", ..." if axis.size > 4 else ""
        lines.append(f"  {axis.name} {axis.size}, {where}: ranks {ranks}{dots}; {axis.purpose}")
    # Memory and the step.
    of = f" of {show_bytes(memory.limit_bytes)}" if memory.is_checked else ""
    where = f" (pipeline rank {memory.pipeline_rank})" if phase.layout.pp > 1 else ""
    lines.append(f"  memory{where}{of}: {memory.parts_bytes.describe()}")
    host = memory.host_offload_bytes + memory.host_copy_bytes
    if host:
        lines.append(
            f"  host memory of a node: {show_bytes(host)} of {show_bytes(memory.host_limit_bytes)} "
            f"(offloaded {show_bytes(memory.host_offload_bytes)}, copies for saves "
            f"{show_bytes(memory.host_copy_bytes)})"
        )
    step = phase.speed.parts_seconds
    parts = ", ".join(
        f"{name.replace('_', ' ')} {show_seconds(value)}"
        for name, value in step.parts.items()
        if value >= 5e-4 * step.total
    )
    hidden = f"; hidden {show_seconds(step.sharding_hidden)}" if step.sharding_hidden else ""
    lines.append(f"  step {show_seconds(step.total)}: {parts}{hidden}")
    lines.append(
        f"  FLOPs of a step: {phase.speed.model_flops:.3g}, each token sees "
        f"{short(phase.batch.pairs_per_token)} others; "
        f"microbatches {phase.batch.num_microbatches} x {phase.batch.micro_batch_size} samples"
    )
    lines.append(f"  {describe_balance(phase.balance)}")
    lines += _indent(_traffic_table(phase.traffic))
    lines += _indent(_source_table(phase))
    if phase.search is not None:
        lines += _indent(_search_table(phase.search))
    return lines


def describe_balance(balance: BalancePlan) -> str:
    """Say in one line how long data ranks wait for the slowest."""
    if not balance.steps:
        return f"work of the data ranks: taken as equal ({balance.why_equal})"
    in_order = f"{balance.slowest_over_mean_in_order:.3f}"
    found = f"{balance.slowest_over_mean:.3f} of the mean, dealt by cost ({in_order} in order"
    if not balance.is_dealt:
        found = f"{in_order} of the mean (dealt in order"
    drawn = count_of(balance.steps, "step")
    return f"work of the slowest data rank: {found}; the phase's first {drawn})"


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _traffic_table(traffic: Sequence[TrafficPlan]) -> list[str]:
    """Write what a rank sends in a step, a line per purpose."""
    if not traffic:
        return []
    header = ["sent by a rank in a step", "calls", "bytes", "to other nodes", "time", "on", "what"]
    rows = [
        [
            f"{each.axis} {each.operation}",
            f"{each.collectives:,.0f}",
            show_bytes(int(each.sent_bytes)),
            show_bytes(int(each.between_nodes_bytes)) if each.between_nodes_bytes else "",
            show_seconds(each.seconds),
            "node" if each.is_inside_node else "network",
            each.what + (" (beside computing)" if each.is_overlapped else ""),
        ]
        for each in traffic
    ]
    return table(header, rows, left=(0, 5, 6))


def _source_table(phase: PhasePlan) -> list[str]:
    """Write what the phase draws, a line per source."""
    if not phase.sources:
        return []
    rows = [
        [
            source.name[-LONGEST_SOURCE:],
            f"{100 * source.share:.2f} %",
            short(source.tokens),
            short(source.epoch_tokens),
            f"{source.from_epoch:.2f} -> {source.to_epoch:.2f}",
        ]
        for source in phase.sources[:MOST_SOURCES]
    ]
    lines = table(["source", "share", "tokens", "of an epoch of", "epochs"], rows)
    left_out = len(phase.sources) - MOST_SOURCES
    return [*lines, f"and {left_out} more sources"] if left_out > 0 else lines


def _search_table(search: SearchPlan) -> list[str]:
    """Write the ranked layouts, each with what it loses with."""
    rows = [
        [
            ("* " if row.is_own else "  ") + row.description,
            show_seconds(row.step_seconds),
            show_bytes(row.memory_bytes),
            row.why,
        ]
        for row in search.rows
    ]
    where = "also leave" if search.leaves_node else "stay inside"
    title = (
        f"layouts: {search.fitting:,} of {search.legal:,} fit (tp and the all-to-all {where} a "
        "node); * = this plan's"
    )
    return [title, *table(["  layout", "step", "memory", "why not"], rows, left=(0, 3))]


# ---------------------------------------------------------------- what it comes to


def _totals(plan: RunPlan) -> list[str]:
    rows = cost_rows(plan)
    header = ["cost", "tokens", "steps", "training", "saves", "failures", "days", "GPU hours"]
    if plan.price_per_device_hour is None:
        return table(header, [row[:-1] for row in rows])
    return table([*header, f"price at {plan.price_per_device_hour:g}/h"], rows)


def cost_rows(plan: RunPlan) -> list[list[str]]:
    """Make a row of cost per phase, and one for all of them."""
    rows = [_cost_row(phase.name, phase.cost) for phase in plan.phases]
    return [*rows, _cost_row("all", plan.total)] if len(rows) > 1 else rows


def _cost_row(name: str, cost: CostPlan) -> list[str]:
    return [
        name,
        short(cost.tokens),
        f"{cost.steps:,}",
        show_seconds(cost.train_seconds),
        show_seconds(cost.save_seconds),
        show_seconds(cost.failure_seconds),
        f"{cost.days:,.2f}",
        f"{cost.device_hours:,.0f}",
        "–" if cost.price is None else f"{cost.price:,.0f}",
    ]


def _checkpoints(saved: CheckpointPlan) -> list[str]:
    interval = (
        f"every {show_seconds(saved.interval_seconds)}"
        if saved.interval_seconds is not None
        else "at the end of each phase"
    )
    way = "in the background" if saved.is_in_background else "while training waits"
    return [
        f"checkpoints: {show_bytes(saved.size_bytes)} each "
        f"({show_bytes(saved.bytes_per_device)} of a device), {saved.saves:,} in all, {interval}, "
        f"at most {saved.kept:,} kept ({show_bytes(saved.kept_bytes)})",
        f"  written in {show_seconds(saved.write_seconds)} {way}; steps wait "
        f"{show_seconds(saved.stall_seconds)}",
    ]


def _failures(failures: FailurePlan) -> list[str]:
    return [
        f"failures: {failures.failures:,.1f} expected, one in {failures.hours_to_failure:.3g} h",
        *_indent(failures.arithmetic),
    ]
