"""Draw who talks to whom: for every axis the nodes and ranks of rank 0's group, as SVG.

A picture of 1,024 ranks shows nothing. The first node is drawn rank by rank; each axis shows the
nodes that hold rank 0's group, its members filled, and says how far apart they are.
"""

from collections.abc import Sequence

from markupsafe import Markup, escape

from tools.planning.report import AxisPlan, LayoutPlan, PhasePlan

CELL = 22
"""Side of a rank, in units of the picture."""
GAP = 10
"""Room between two nodes."""
MOST_NODES = 4
"""Nodes that are drawn of an axis at most; dots stand for the others."""
MOST_CELLS = 16
"""Ranks that are drawn of a node."""
LABEL_WIDTH = 92
"""Room for the name of an axis, left of its nodes."""
NODES_WIDTH = 4 * (8 * CELL + GAP)
"""Room for the nodes of an axis: four of 8 ranks."""
LEAST_NODE_WIDTH = 76
"""Room for the name of a node, which has few ranks."""
ROW_HEIGHT = 58
WIDTH = LABEL_WIDTH + NODES_WIDTH + 60
AXIS_COLORS = {
    "tp": "series-0",
    "cp": "series-2",
    "cp_a2a": "series-2",
    "cp_gather": "series-4",
    "dp": "series-5",
    "dp_cp": "series-1",
    "dp_cp_tp": "series-6",
    "pp": "series-3",
}
"""Axis -> the variable of its colour (tools/reporting/axes.py)."""


def layout_picture(phase: PhasePlan, world_size: int, devices_per_node: int) -> Markup:
    """Draw the axes of a phase, a row each, with rank 0's group filled in."""
    per_node = min(devices_per_node, world_size)
    rows = [_axis_row(axis, world_size, per_node) for axis in phase.layout.axes]
    if not rows:
        return Markup('<p class="none">One process: it talks to nobody.</p>')
    shapes = []
    for number, row in enumerate(rows):
        shapes.append(
            Markup('<g transform="translate(0 {})">{}</g>').format(number * ROW_HEIGHT, row)
        )
    return _svg(WIDTH, len(rows) * ROW_HEIGHT, describe_layout(phase.layout), shapes)


def describe_layout(layout: LayoutPlan) -> str:
    """Say in words what the picture shows."""
    parts = [f"The groups of rank 0 in layout {layout.description}."]
    for axis in layout.axes:
        place = "inside one node" if axis.is_inside_node else "over several nodes"
        parts.append(
            f"{axis.name}: {axis.num_groups:,} groups of {axis.size:,} ranks, every "
            f"{ordinal(axis.stride)} rank, {place}."
        )
    return " ".join(parts)


def ordinal(number: int) -> str:
    """Spell a place in a row: 1 -> "1st"."""
    last = number % 10 if number // 10 % 10 != 1 else 0
    return f"{number:,}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(last, 'th') }"


def coordinates(rank: int, layout: LayoutPlan) -> dict[str, int]:
    """Tell where a rank stands on each axis: tp fastest, then cp, dp, pp."""
    places = {}
    for name, size in (("tp", layout.tp), ("cp", layout.cp), ("dp", layout.dp), ("pp", layout.pp)):
        places[name] = rank % size
        rank //= size
    return places


def first_node_rows(phase: PhasePlan, world_size: int, devices_per_node: int) -> list[list[str]]:
    """List the ranks of the first node and where each stands on the axes."""
    ranks = range(min(devices_per_node, world_size))
    return [
        [f"{rank}", *(f"{place}" for place in coordinates(rank, phase.layout).values())]
        for rank in ranks
    ]


def _axis_row(axis: AxisPlan, world_size: int, per_node: int) -> Markup:
    """Draw the first nodes that hold rank 0's group."""
    color = AXIS_COLORS[axis.name]
    shapes = [
        _text(0, 20, axis.name, bold=True),
        _text(0, 37, f"{axis.size:,} ranks"),
    ]
    x = LABEL_WIDTH
    # Nodes of many ranks are wide: fewer are drawn.
    node_width = max(min(per_node, MOST_CELLS) * CELL, LEAST_NODE_WIDTH) + GAP
    shown = axis.nodes_of_first_group[: min(MOST_NODES, NODES_WIDTH // node_width)]
    members = set(axis.first_group)
    for node in shown:
        first = node * per_node
        cells = [rank for rank in range(first, first + per_node) if rank < world_size]
        drawn = cells[:MOST_CELLS]
        shapes.append(_node(x, drawn, members, color))
        more = "" if len(cells) == len(drawn) else f", first {len(drawn)} of {len(cells)} ranks"
        shapes.append(_text(x, 50, f"node {node:,}{more}"))
        x += node_width
    if axis.size > len(members & _ranks_of(shown, per_node)):
        shapes.append(_text(x, 26, "…"))
    return Markup("").join(shapes)


def _ranks_of(nodes: Sequence[int], per_node: int) -> set[int]:
    return {rank for node in nodes for rank in range(node * per_node, (node + 1) * per_node)}


def _node(x: int, ranks: Sequence[int], members: set[int], color: str) -> Markup:
    """Draw a node: a box with a cell per rank, the members of the group filled."""
    shapes = []
    for number, rank in enumerate(ranks):
        is_member = rank in members
        fill = f"var(--{color})" if is_member else "var(--band-0)"
        ink = "var(--ground)" if is_member else "var(--muted)"
        left = x + number * CELL
        shapes.append(
            Markup(
                '<rect x="{}" y="8" width="{}" height="{}" rx="3" '
                'style="fill:{};stroke:var(--ground)"/>'
            ).format(left, CELL, CELL, fill)
        )
        # Numbers of four digits are wider than a cell.
        size = 9 if rank < 1000 else 7
        shapes.append(
            Markup(
                '<text x="{}" y="{}" text-anchor="middle" style="fill:{};font-size:{}px">{}</text>'
            ).format(left + CELL / 2, 8 + CELL / 2 + 3, ink, size, rank)
        )
    frame = Markup(
        '<rect x="{}" y="6" width="{}" height="{}" rx="4" style="fill:none;stroke:var(--muted)"/>'
    ).format(x - 2, len(ranks) * CELL + 4, CELL + 4)
    return Markup("").join([*shapes, frame])


def _text(x: float, y: float, text: str, *, bold: bool = False) -> Markup:
    weight = "600" if bold else "400"
    return Markup(
        '<text x="{}" y="{}" style="fill:var(--ink);font-size:12px;font-weight:{}">{}</text>'
    ).format(x, y, weight, text)


def _svg(width: int, height: int, description: str, shapes: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, escape(description), Markup("").join(shapes)
    )
