"""Who talks to whom: the groups of every axis, and the nodes that they are on."""

from dataclasses import dataclass

from parallel.config import LayoutConfig
from tools.planning.report import AxisPlan, PhasePlan

MOST_SHOWN_RANKS = 16
"""Ranks of a group that a plan lists."""


@dataclass(frozen=True)
class AxisGroups:
    """Holds the groups of one axis: ranks of the world, in their order on the axis."""

    name: str
    purpose: str
    stride: int
    groups: list[tuple[int, ...]]

    def plan(self, devices_per_node: int) -> AxisPlan:
        """Describe the axis on nodes of so many devices."""
        first = self.groups[0][:MOST_SHOWN_RANKS]
        return AxisPlan(
            name=self.name,
            size=len(self.groups[0]),
            stride=self.stride,
            num_groups=len(self.groups),
            purpose=self.purpose,
            first_group=first,
            nodes_of_first_group=tuple(dict.fromkeys(rank // devices_per_node for rank in first)),
            is_inside_node=all(
                group[0] // devices_per_node == group[-1] // devices_per_node
                for group in self.groups
            ),
        )


def groups_of_layout(
    layout: LayoutConfig, world_size: int, *, has_muon: bool = False
) -> list[AxisGroups]:
    """List the groups of every axis of more than one rank, the fastest axis first.

    The order of the ranks is that of parallel/layout.py.

    Args:
        has_muon: all ranks of a stage exchange the matrices that Muon updates.
    """
    tp, pp, cp = layout.sizes
    dp = world_size // (tp * pp * cp)
    a2a, gather = layout.context_levels
    muon = "matrices that Muon updates: brings them to their owners and back"
    tokens = "tokens of a sample: trades them for heads around attention"
    rows = [
        ("tp", tp, 1, "heads, MLP width and vocabulary: sums activations in every layer"),
        # With one level all of cp trades tokens for heads.
        ("cp" if gather == 1 else "cp_a2a", a2a, tp, tokens),
        ("cp_gather", gather, tp * a2a, "tokens of a sample: gathers keys and values"),
        ("dp_cp", dp * cp, tp, "parameters, gradients and optimizer: gathers and reduces them"),
        ("dp", dp, tp * cp, "samples of the global batch: nothing by itself (dp_cp reduces)"),
        *([("dp_cp_tp", dp * cp * tp, 1, muon)] if has_muon else []),
        ("pp", pp, tp * cp * dp, "layers: hands activations and gradients to its neighbours"),
    ]
    return [
        AxisGroups(name, purpose, stride, _groups(size, stride, world_size))
        for name, size, stride, purpose in rows
        if size > 1
    ]


def _groups(size: int, stride: int, world_size: int) -> list[tuple[int, ...]]:
    """List the groups of `size` ranks that are `stride` apart."""
    firsts = [rank for rank in range(world_size) if rank // stride % size == 0]
    return [tuple(first + number * stride for number in range(size)) for first in firsts]


def crossing_warnings(phase: PhasePlan, devices_per_node: int) -> list[str]:
    """Warn of axes that talk in every layer and leave a node, with what that takes of a step."""
    found = []
    for axis in phase.layout.axes:
        if axis.name not in ("tp", "cp", "cp_a2a") or axis.is_inside_node:
            continue
        seconds = sum(each.seconds for each in phase.traffic if each.axis == axis.name)
        found.append(
            f"phase {phase.name!r}: {axis.name} {axis.size} is not inside a node of "
            f"{devices_per_node} devices and talks in every layer: {seconds:.3g} s of a step's "
            f"{phase.speed.step_seconds:.3g} s go over the network"
        )
    return found
