"""Fill the page of a plan (template: page.html): layout, step, memory, traffic, cost of a run."""

from dataclasses import asdict, dataclass
from pathlib import Path

from data.units import show_bytes, show_tokens
from tools.planning.layout_picture import first_node_rows, layout_picture
from tools.planning.report import MemoryPlan, PhasePlan, RunPlan, TrafficPlan
from tools.planning.text import cost_rows, show_seconds
from tools.reporting.html import render
from tools.shared.number_text import short

STEP_COLORS = {
    "products": "series-0",
    "attention": "series-5",
    "logits": "series-7",
    "pointwise": "part-1",
    "overhead": "raw",
    "tensor": "series-1",
    "context": "series-4",
    "pipeline": "series-3",
    "imbalance": "part-0",
    "bubble": "grid",
    "sharding_exposed": "series-6",
    "sharding_slowdown": "part-2",
    "update": "series-2",
}
"""Part of a step -> the variable of its colour: mostly blue for the layers, warm for what is sent,
light grey for ranks that wait."""
STEP_WORDS = {
    "products": "matrix products",
    "logits": "output projection and loss",
    "pointwise": "norms, gates, rotations, loss",
    "overhead": "waiting for the host",
    "tensor": "sums over tp",
    "context": "exchanges over cp",
    "pipeline": "handing on over pp",
    "imbalance": "waiting for the slowest data rank",
    "bubble": "pipeline bubble",
    "sharding_exposed": "gathers and reductions, exposed",
    "sharding_slowdown": "computing slowed by those that are hidden",
    "update": "clipping and optimizer",
}
MEMORY_COLORS = {
    "parameters": "series-0",
    "optimizer": "series-2",
    "gradients": "series-1",
    "gathered": "series-5",
    "activations": "series-3",
    "loss": "series-4",
    "buffers": "series-6",
    "messages": "raw",
    "copy": "series-7",
}
"""Part of a rank's memory -> the variable of its colour."""
LEAST_SHARE = 5e-4
"""Share of a bar below which a part is not drawn; it stays in the table."""


@dataclass(frozen=True)
class BarPart:
    """One part of a bar, and its row in the table below."""

    name: str
    color: str
    share: float
    """Share of the whole bar."""
    value: str

    @property
    def percent(self) -> str:
        return f"{100 * self.share:.1f} %"

    @property
    def is_drawn(self) -> bool:
        return self.share >= LEAST_SHARE


@dataclass(frozen=True)
class Bar:
    """A bar of parts that add up, described in words."""

    title: str
    parts: list[BarPart]

    @property
    def description(self) -> str:
        """What a screen reader says."""
        words = ", ".join(f"{part.name} {part.value} ({part.percent})" for part in self.parts)
        return f"{self.title}: {words}."


def plan_page(plan: RunPlan) -> str:
    """Make the whole page as HTML. Everything that comes from the run is escaped."""
    return render(
        Path(__file__).with_name("page.html"),
        plan=plan,
        tiles=tiles(plan),
        phases=[phase_values(phase, plan) for phase in plan.phases],
        costs=cost_rows(plan),
        saved=checkpoint_text(plan),
        show_seconds=show_seconds,
    )


def tiles(plan: RunPlan) -> list[tuple[str, str, str]]:
    """List the plan's main figures as (what, figure, what belongs to it)."""
    fullest = max(plan.phases, key=lambda phase: phase.memory.total_bytes)
    speeds = [phase.speed.model_flops_utilization for phase in plan.phases]
    low = f"{100 * min(speeds):.0f}"
    high = f"{100 * max(speeds):.0f}"
    limit = show_bytes(fullest.memory.limit_bytes)
    found = [
        ("devices", f"{plan.world_size:,}", f"{plan.hardware.name}, {plan.nodes:,} nodes"),
        ("tokens", short(plan.total.tokens), f"{plan.total.steps:,} steps"),
        ("days", f"{plan.total.days:,.1f}", f"{plan.total.device_hours:,.0f} GPU hours"),
        ("MFU", f"{low} %" if low == high else f"{low}–{high}\u00a0%", "expected, by phase"),
        ("memory", show_bytes(fullest.memory.total_bytes), f"of {limit}, phase {fullest.name}"),
        (
            "effective time",
            f"{100 * plan.failures.effective_share:.1f} %",
            f"{plan.failures.failures:,.1f} failures expected",
        ),
    ]
    if plan.total.price is not None:
        rate = f"at {plan.price_per_device_hour:g} for a GPU's hour"
        found.append(("price", f"{plan.total.price:,.0f}", rate))
    return found


def phase_values(phase: PhasePlan, plan: RunPlan) -> dict:
    """Collect what the template shows of a phase."""
    return {
        "plan": phase,
        "row": phase_row(phase),
        "picture": layout_picture(phase, plan.world_size, plan.devices_per_node),
        "node": first_node_rows(phase, plan.world_size, plan.devices_per_node),
        "step": step_bar(phase),
        "hidden": show_seconds(phase.speed.parts_seconds.sharding_hidden)
        if phase.speed.parts_seconds.sharding_hidden
        else "",
        "memory": memory_bar(phase.memory),
        "traffic": [traffic_row(each) for each in phase.traffic],
    }


def phase_row(phase: PhasePlan) -> list[tuple[str, str]]:
    """List the (name, value) of a phase that are asked about first."""
    slowest = phase.balance.slowest_over_mean
    return [
        ("context", show_tokens(phase.batch.seq_length)),
        ("batch", show_tokens(phase.batch.global_batch_tokens)),
        ("steps", f"{phase.cost.steps:,}"),
        ("step time", show_seconds(phase.speed.step_seconds)),
        ("MFU", f"{100 * phase.speed.model_flops_utilization:.1f} %"),
        ("tokens/s", short(phase.speed.tokens_per_second)),
        ("memory", show_bytes(phase.memory.total_bytes)),
        ("days", f"{phase.cost.days:,.2f}"),
        ("layout", phase.layout.description),
        *([("slowest data rank", f"{slowest:.2f} of the mean")] if phase.balance.steps else []),
    ]


def step_bar(phase: PhasePlan) -> Bar:
    """Make the bar of a step: its parts in their order, as shares of its time."""
    step = phase.speed.parts_seconds
    parts = [
        BarPart(
            STEP_WORDS.get(name, name),
            STEP_COLORS[name],
            value / step.total,
            show_seconds(value),
        )
        for name, value in step.parts.items()
        if value
    ]
    return Bar(f"A step of {show_seconds(step.total)}", parts)


def memory_bar(memory: MemoryPlan) -> Bar:
    """Make the bar of a rank's memory: its parts, what is free, what stays free on purpose."""
    # A CPU's memory is no limit by itself.
    whole = max(memory.limit_bytes, memory.total_bytes) if memory.is_checked else memory.total_bytes
    sizes = {name: size for name, size in asdict(memory.parts_bytes).items() if name != "host"}
    parts = [
        BarPart(name, MEMORY_COLORS[name], size / whole, show_bytes(size))
        for name, size in sizes.items()
        if size
    ]
    if not memory.is_checked:
        return Bar(f"Memory of {show_bytes(whole)}", parts)
    free = max(0, memory.usable_bytes - memory.total_bytes)
    margin = max(0, whole - max(memory.usable_bytes, memory.total_bytes))
    parts.append(BarPart("free", "ground", free / whole, show_bytes(free)))
    parts.append(BarPart("margin that stays free", "grid", margin / whole, show_bytes(margin)))
    title = f"{show_bytes(memory.total_bytes)} of the {show_bytes(memory.limit_bytes)} of a device"
    return Bar(title, parts)


def traffic_row(each: TrafficPlan) -> list[str]:
    """Make a row of what a rank sends in a step."""
    return [
        each.axis,
        each.operation,
        f"{each.collectives:,.0f}",
        show_bytes(int(each.sent_bytes)),
        show_bytes(int(each.between_nodes_bytes)) if each.between_nodes_bytes else "–",
        show_seconds(each.seconds),
        "inside a node" if each.is_inside_node else "between nodes",
        each.what + (", beside computing" if each.is_overlapped else ""),
    ]


def checkpoint_text(plan: RunPlan) -> str:
    """Say in a sentence or two what checkpoints take."""
    saved = plan.checkpoints
    if saved is None:
        return "No checkpoint is written: --save is not given."
    interval = (
        f"every {show_seconds(saved.interval_seconds)}"
        if saved.interval_seconds is not None
        else "at the end of each phase"
    )
    way = "in the background" if saved.is_in_background else "while training waits"
    return (
        f"{saved.saves:,} checkpoints of {show_bytes(saved.size_bytes)}, {interval}, at most "
        f"{saved.kept:,} of them kept ({show_bytes(saved.kept_bytes)}). One is written in "
        f"{show_seconds(saved.write_seconds)} {way}; steps wait "
        f"{show_seconds(saved.stall_seconds)}."
    )
