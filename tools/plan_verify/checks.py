"""What the traces of some ranks must have in common, each check by itself.

A problem is one line: which rank, which axis, what was expected and what was found.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from data.units import show_bytes
from parallel.config import LayoutConfig
from parallel.schedule import stages_of_rank
from pretrain.planner.hardware import Hardware
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.traffic import step_traffic
from pretrain.planner.workload import Workload
from tools.plan_verify.recorder import first_difference
from tools.plan_verify.rehearsal import RankTrace
from tools.plan_verify.sample import Sizes

MEMORY_TOLERANCE = 0.1
"""Share by which the formula may miss the tensors that were alive."""
BYTES_TOLERANCE = 0.05
"""Share by which the formula may miss the bytes that a rank sends over an axis."""
SHOWN_RANKS = 6
"""Most ranks of a group that a line names."""


def expected_axes(layout: LayoutConfig, world_size: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Work out the ranks of each axis of one rank, from the rank order alone."""
    sizes = Sizes.of_layout(layout, world_size)
    tp, cp, dp, pp = sizes.places(rank)
    a2a, _ = layout.context_levels
    group, place = divmod(cp, a2a)
    along_cp = [sizes.rank(tp, other, dp, pp) for other in range(sizes.cp)]
    return {
        "tp": tuple(sizes.rank(other, cp, dp, pp) for other in range(sizes.tp)),
        "cp": tuple(along_cp),
        "dp": tuple(sizes.rank(tp, cp, other, pp) for other in range(sizes.dp)),
        "pp": tuple(sizes.rank(tp, cp, dp, other) for other in range(sizes.pp)),
        "cp_a2a": tuple(along_cp[group * a2a : (group + 1) * a2a]),
        "cp_gather": tuple(along_cp[place::a2a]),
        "dp_cp": tuple(
            sizes.rank(tp, other_cp, other_dp, pp)
            for other_dp in range(sizes.dp)
            for other_cp in range(sizes.cp)
        ),
        "dp_cp_tp": tuple(
            sizes.rank(other_tp, other_cp, other_dp, pp)
            for other_dp in range(sizes.dp)
            for other_cp in range(sizes.cp)
            for other_tp in range(sizes.tp)
        ),
    }


def check_groups(
    traces: Sequence[RankTrace], layout: LayoutConfig, world_size: int
) -> tuple[str, list[str]]:
    """Check that all ranks make the same groups, and that these are what the rank order says."""
    problems = [*_wrong_axes(traces, layout, world_size), *_unlike_groups(traces)]
    # Every group of every rank must be among those that are made.
    made = {frozenset(group.ranks) for group in traces[0].groups}
    counted: dict[str, set[tuple[int, ...]]] = {}
    for rank in range(world_size):
        for name, ranks in expected_axes(layout, world_size, rank).items():
            counted.setdefault(name, set()).add(ranks)
    for name, groups in counted.items():
        missing = [ranks for ranks in sorted(groups) if frozenset(ranks) not in made]
        if missing and len(missing[0]) > 1:
            problems.append(f"{name}: no process makes the group {show_ranks(missing[0])}")
    sizes = {name: len(next(iter(groups))) for name, groups in counted.items()}
    parts = [f"{name} {len(counted[name])} x {size}" for name, size in sizes.items() if size > 1]
    return f"each axis parts the {world_size:,} ranks ({', '.join(parts)})", problems


def _wrong_axes(
    traces: Sequence[RankTrace], layout: LayoutConfig, world_size: int
) -> Iterator[str]:
    for trace in traces:
        for name, expected in expected_axes(layout, world_size, trace.rank).items():
            found = trace.axes[name]
            if found != expected:
                yield (
                    f"rank {trace.rank}: {name}: expected ranks {show_ranks(expected)}, found "
                    f"{show_ranks(found)}"
                )


def _unlike_groups(traces: Sequence[RankTrace]) -> Iterator[str]:
    """Compare the groups that ranks make: each waits for the others in that order."""
    first = traces[0]
    for other in traces[1:]:
        if len(other.groups) != len(first.groups):
            yield (
                f"rank {other.rank} makes {len(other.groups)} groups, rank {first.rank} makes "
                f"{len(first.groups)}"
            )
            continue
        pairs = zip(first.groups, other.groups, strict=True)
        unlike = [(number, *pair) for number, pair in enumerate(pairs) if pair[0] != pair[1]]
        if unlike:
            number, ours, theirs = unlike[0]
            yield (
                f"group number {number}: rank {first.rank} makes {ours.name} "
                f"{show_ranks(ours.ranks)}, rank {other.rank} makes {theirs.name} "
                f"{show_ranks(theirs.ranks)}"
            )


def check_order(traces: Sequence[RankTrace]) -> tuple[str, list[str]]:
    """Check that ranks which share a group make its collectives in one order, and messages pair."""
    problem = first_difference([trace.calls for trace in traces], [trace.rank for trace in traces])
    most = max(len(trace.calls) for trace in traces)
    return f"up to {most:,} calls, one order, every message met", [problem] if problem else []


def check_bytes(
    traces: Sequence[RankTrace], model: MemoryModel, load: Workload, hardware: Hardware
) -> tuple[str, list[str]]:
    """Compare what the busiest sampled rank sends over each axis with the plan's formula."""
    expected: dict[str, float] = {}
    for traffic in step_traffic(model, load, hardware):
        expected[traffic.axis] = expected.get(traffic.axis, 0) + traffic.sent_bytes
    if load.layout.pipeline_model_parallel_size > 1:
        expected["pp"] *= _share_of_neighbours(load.layout)
    if "dp_cp_tp" in expected:
        # The plan counts the rank that owns most, which may not be among these.
        expected["dp_cp_tp"] = max(_sent_by_muon(trace, model, load) for trace in traces)
    problems = []
    shares = []
    for axis, size in expected.items():
        busiest = max(traces, key=lambda trace: trace.sent_bytes.get(axis, 0))
        found = busiest.sent_bytes.get(axis, 0)
        shares.append(f"{axis} {found / size:.3f}")
        if abs(found / size - 1) > BYTES_TOLERANCE:
            problems.append(
                f"rank {busiest.rank}: {axis}: expected {show_bytes(int(size))} sent in a step, "
                f"found {show_bytes(int(found))}"
            )
    return f"sent over the formula's bytes: {', '.join(shares)}", problems


def _share_of_neighbours(layout: LayoutConfig) -> float:
    """Return the most that a rank hands on, over what stages between two others would.

    The plan counts those: the first stage hands no gradient on, and the last no activation.
    """
    pp = layout.pipeline_model_parallel_size
    per_rank = layout.stages_per_rank
    last = pp * per_rank - 1
    edges = [
        sum((number > 0) + (number < last) for number in stages)
        for stages in (stages_of_rank(layout.schedule, rank, pp, per_rank) for rank in range(pp))
    ]
    return max(edges) / (2 * per_rank)


def _sent_by_muon(trace: RankTrace, model: MemoryModel, load: Workload) -> float:
    """Count the bytes of matrices and updates that one rank sends, by those that it owns."""
    assert model.muon is not None, "the axis is Muon's alone"
    parts = sum(model.parts_of_rank(load.layout, trace.pp_rank), Counter())
    tp = load.layout.tensor_model_parallel_size
    owners = model.muon.owners(parts["layers"], tp, load.shards)
    place = trace.axes["dp_cp_tp"].index(trace.rank)
    return model.muon.element_bytes * owners.sent_by(place)


def check_memory(
    traces: Sequence[RankTrace], model: MemoryModel, load: Workload
) -> tuple[str, list[str], float]:
    """Compare the peak of live tensors with the formula.

    Returns:
        The result, the problems, and the largest share of the formula's bytes that was found.
    """
    problems = []
    shares = []
    for trace in traces:
        expected = model.estimate_rank(load, trace.pp_rank)
        share = trace.peak_bytes / expected.total
        shares.append(share)
        if abs(share - 1) > MEMORY_TOLERANCE:
            problems.append(
                f"rank {trace.rank}: memory: the formula gives {show_bytes(expected.total)}, "
                f"{show_bytes(trace.peak_bytes)} of tensors were alive ({share:.2f} of it)"
            )
    fullest = max(traces, key=lambda trace: trace.peak_bytes)
    result = (
        f"live tensors {min(shares):.2f} to {max(shares):.2f} of the formula, most "
        f"{show_bytes(fullest.peak_bytes)} on rank {fullest.rank}"
    )
    return result, problems, max(shares)


def check_device(
    traces: Sequence[RankTrace], model: MemoryModel, load: Workload, share: float, limit_bytes: int
) -> tuple[str, list[str]]:
    """Check that the fullest rank of the whole step fits into a device.

    Args:
        model, load: of the whole step.
        share: live tensors over the formula's bytes, where that was more than 1.
    """
    needs = {
        trace.rank: int(max(1.0, share) * model.estimate_rank(load, trace.pp_rank).total)
        for trace in traces
    }
    rank = max(needs, key=lambda each: needs[each])
    result = f"rank {rank} needs most: {show_bytes(needs[rank])} of {show_bytes(limit_bytes)}"
    if needs[rank] <= limit_bytes:
        return result, []
    return result, [
        f"rank {rank}: out of memory: expected at most {show_bytes(limit_bytes)}, found "
        f"{show_bytes(needs[rank])}"
    ]


def show_ranks(ranks: Sequence[int]) -> str:
    """Write a group's ranks, the ends of a long one."""
    if len(ranks) <= SHOWN_RANKS:
        return f"({', '.join(map(str, ranks))})"
    head = ", ".join(map(str, ranks[:3]))
    return f"({head}, ... {ranks[-1]}; {len(ranks)} ranks)"
