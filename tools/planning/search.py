"""The layouts that a phase could have, ranked, with why each loses against the best."""

from collections.abc import Iterable
from dataclasses import replace

from data.units import show_bytes
from pretrain.planner import layout_candidates
from pretrain.planner.layout_candidates import ALL_OPEN, Candidate
from pretrain.schedule.phases import Phase
from tools.planning.phases import PhaseEstimate
from tools.planning.report import CandidatePlan, SearchPlan
from tools.planning.text import show_seconds

MOST_ROWS = 5
"""Layouts of different sizes that are shown."""
PART_WORDS = {
    "products": "computing",
    "attention": "attention",
    "logits": "logits",
    "pointwise": "norms, gates and the loss",
    "overhead": "waiting for the host",
    "tensor": "sums over tp",
    "context": "exchanges over cp",
    "pipeline": "handing on between stages",
    "imbalance": "the slowest data rank",
    "bubble": "the pipeline's bubble",
    "sharding_exposed": "gathers and reductions over dp x cp",
    "sharding_slowdown": "gathers and reductions beside computing",
    "update": "the update",
}


def search_layouts(estimate: PhaseEstimate, *, across_nodes: bool) -> SearchPlan:
    """Rank the layouts of a phase: those that fit, the fastest first, one row for each size.

    The phase's own layout has a row even where it is slow, and so has one that would be faster than
    all of them and does not fit.

    Args:
        across_nodes: tp and the all-to-all may leave a node also where others fit.
    """
    found = layout_candidates.find_candidates(
        opened(estimate.phase),
        estimate.config,
        estimate.world_size,
        estimate.model,
        estimate.machine.device,
        estimate.documents,
        across_nodes=across_nodes,
    )
    usable = estimate.machine.device.usable
    fitting = sorted(found.fitting, key=lambda each: (each.seconds, each.simplicity))
    own = layout_candidates.estimate(
        estimate.phase,
        estimate.world_size,
        estimate.model,
        estimate.hardware,
        estimate.documents,
    )
    best = fitting[0] if fitting else None
    rows = [] if best is None else _of_each_size(fitting)[:MOST_ROWS]
    if own.describe() not in [each.describe() for each in rows]:
        rows.append(own)
    # What would win if it only fitted.
    faster = [each for each in found.legal if each.memory.total > usable]
    if best is not None:
        faster = [each for each in faster if each.seconds < best.seconds]
    if faster:
        fastest = min(faster, key=lambda each: (each.seconds, each.simplicity))
        if fastest.describe() != own.describe():
            rows.append(fastest)
    return SearchPlan(
        legal=len(found.legal),
        fitting=len(fitting),
        leaves_node=found.leave_node,
        rows=tuple(_row(each, best, own, usable) for each in rows),
    )


def opened(phase: Phase) -> Phase:
    """Return the phase with everything open that a layout can choose."""
    layout = replace(
        phase.layout,
        cp_comm_type="a2a",
        hierarchical_context_parallel_sizes=[],
        use_distributed_optimizer=None,
    )
    return replace(phase, layout=layout, auto=ALL_OPEN, predicted_bytes=None)


def _of_each_size(ranked: Iterable[Candidate]) -> list[Candidate]:
    """Keep the first of each tp, pp, cp."""
    first: dict[tuple[int, ...], Candidate] = {}
    for candidate in ranked:
        first.setdefault(candidate.phase.layout.sizes, candidate)
    return list(first.values())


def _row(
    candidate: Candidate, best: Candidate | None, own: Candidate, usable: int
) -> CandidatePlan:
    fits = candidate.memory.total <= usable
    if not fits:
        why = f"needs {show_bytes(candidate.memory.total)} of {show_bytes(usable)}"
    elif best is None or candidate is best:
        why = ""
    else:
        why = why_slower(candidate, best)
    return CandidatePlan(
        description=candidate.describe(),
        fits=fits,
        is_own=candidate.describe() == own.describe(),
        memory_bytes=candidate.memory.total,
        step_seconds=candidate.seconds,
        parts_seconds=candidate.step,
        why=why,
    )


def why_slower(candidate: Candidate, best: Candidate) -> str:
    """Name the part of a step that a layout loses most with."""
    more = {name: value - best.step.parts[name] for name, value in candidate.step.parts.items()}
    name = max(more, key=more.__getitem__)
    slower = candidate.seconds / best.seconds - 1
    if more[name] <= 0:
        return "as fast"
    return f"{100 * slower:.1f} % slower: {show_seconds(more[name])} more for {PART_WORDS[name]}"
