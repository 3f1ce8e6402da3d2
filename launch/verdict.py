"""Who is at fault when a run stands still: a pure function of what all ranks do.

A rank that waits in a collective waits for those of its group that have not come there. Whoever is
waited for and does not wait itself is at fault. Where there is no such rank, ranks wait for each
other (two collectives in another order, or of another kind), or all have come and the network or a
device stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from launch.rank_view import IN_DEVICE, RankView

SHOWN_RANKS = 8
"""Most ranks that are named one by one."""
SAME_BYTES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
"""Collectives whose bytes are the same on all ranks."""
WAITING_FOR_DEVICE = "waiting for the device"
"""The activity of a rank whose host has handed out all kernels of a step."""


@dataclass(frozen=True)
class Verdict:
    """Says who is at fault, in lines for a person, the most important first."""

    ranks: tuple[int, ...]
    """The ranks at fault; empty where no rank is."""
    lines: tuple[str, ...]


def judge(views: Sequence[RankView], silent_nodes: Sequence[str] = ()) -> Verdict:
    """Find who is at fault.

    Args:
        views: of all ranks whose node answers.
        silent_nodes: names of the nodes that do not answer.
    """
    if silent_nodes:
        return Verdict((), tuple(f"{name} does not answer" for name in silent_nodes))
    # The kernel knows best who cannot go on.
    stopped = [view for view in views if view.is_stopped]
    waits_for = who_waits_for_whom(views)
    if stopped:
        return _blame(stopped, _add_stopped(views, stopped, waits_for))
    # Whoever is waited for, and does not wait.
    waited_for = set().union(*waits_for.values()) if waits_for else set()
    roots = [view for view in views if view.rank in waited_for and not waits_for.get(view.rank)]
    busy = [view for view in roots if view.wait is None]
    if busy:
        return _blame(busy, waits_for)
    if roots:
        return _describe_standstill(roots)
    if mismatch := _find_mismatch(views):
        return mismatch
    if waits_for:
        return _describe_circle(views, waits_for)
    return _describe_standstill(views)


def who_waits_for_whom(views: Sequence[RankView]) -> dict[int, set[int]]:
    """Map each rank that waits to the ranks that it waits for."""
    # How far each rank is on each group: axis and ranks make a group.
    numbers: dict[tuple[str, tuple[int, ...]], dict[int, int]] = {}
    for view in views:
        for each in view.collectives:
            if each.counts_alike and each.ranks:
                numbers.setdefault((each.axis, tuple(each.ranks)), {})[view.rank] = each.number
    found: dict[int, set[int]] = {}
    for view in views:
        missing: set[int] = set()
        for each in view.collectives:
            if not each.ranks:
                continue
            waits_here = view.wait is not None and view.wait.axis == each.axis
            if waits_here and view.wait is not None and view.wait.peer >= 0:
                if not _meets(views, view, view.wait.peer):
                    missing.add(view.wait.peer)
                continue
            # A host that waits for its device waits in whatever was handed to it.
            if not waits_here and view.activity != WAITING_FOR_DEVICE:
                continue
            if each.counts_alike:
                number = view.wait.number if view.wait is not None else each.number
                others = numbers[each.axis, tuple(each.ranks)]
                missing |= {rank for rank in each.ranks if others.get(rank, 0) < number}
        missing.discard(view.rank)
        if missing:
            found[view.rank] = missing
    return found


def _add_stopped(
    views: Sequence[RankView], stopped: Sequence[RankView], waits_for: dict[int, set[int]]
) -> dict[int, set[int]]:
    """Let all who wait in a group of a stopped rank wait for it, though it has come there.

    What it began goes no further while it is stopped: its threads send and receive no more.
    """
    found = {rank: set(others) for rank, others in waits_for.items()}
    for view in views:
        for each in view.collectives:
            if view.wait is None or view.wait.axis != each.axis:
                continue
            group = {view.wait.peer} if view.wait.peer >= 0 else set(each.ranks)
            missing = {one.rank for one in stopped if one.rank in group} - {view.rank}
            if missing:
                found.setdefault(view.rank, set()).update(missing)
    return found


def _meets(views: Sequence[RankView], view: RankView, peer: int) -> bool:
    """Tell whether the peer of a send or receive waits for this rank in the opposite one."""
    opposite = {"send": "recv", "recv": "send"}
    assert view.wait is not None
    return any(
        other.rank == peer
        and other.wait is not None
        and other.wait.peer == view.rank
        and other.wait.op == opposite.get(view.wait.op)
        for other in views
    )


def _blame(guilty: Sequence[RankView], waits_for: dict[int, set[int]]) -> Verdict:
    """Name the ranks at fault, what they do and who waits for them."""
    lines = [f"{_describe(view)}{_waiters(view.rank, waits_for)}" for view in guilty[:SHOWN_RANKS]]
    if len(guilty) > SHOWN_RANKS:
        lines.append(f"and {len(guilty) - SHOWN_RANKS} more ranks like these")
    return Verdict(tuple(view.rank for view in guilty), tuple(lines))


def _describe(view: RankView) -> str:
    """Say what a rank does, or why it does nothing."""
    how = f"has been {view.activity} for {view.activity_seconds:.0f} s"
    if view.activity == WAITING_FOR_DEVICE:
        how = f"has waited for its device for {view.activity_seconds:.0f} s"
    if view.wait is not None:
        how = f"waits in {describe_wait(view)}, {view.activity}"
    if view.is_stopped:
        how = f"is stopped by a signal for {view.stopped_seconds:.0f} s, {view.activity}"
    if view.process_state == IN_DEVICE:
        how += " (in an uninterruptible wait for a disk or a driver)"
    return f"{view.name} {how}; step {view.step:,}"


def describe_wait(view: RankView) -> str:
    """Name the collective that a rank waits in."""
    wait = view.wait
    assert wait is not None
    if wait.peer >= 0:
        preposition = "to" if wait.op == "send" else "from"
        return f"{wait.op} {preposition} rank {wait.peer} for {wait.seconds:.0f} s"
    return f"{wait.op} {wait.number:,} on {wait.axis} for {wait.seconds:.0f} s"


def _waiters(rank: int, waits_for: dict[int, set[int]]) -> str:
    """Say how many ranks wait for this one, also by way of others."""
    found = {rank}
    while True:
        more = {one for one, others in waits_for.items() if others & found} - found
        if not more:
            break
        found |= more
    count = len(found) - 1
    return f"; {count_ranks(count)} wait{'s' if count == 1 else ''} for it" if count else ""


def _find_mismatch(views: Sequence[RankView]) -> Verdict | None:
    """Find ranks that are at the same place of a group with another collective."""
    places: dict[tuple, dict[str, list[RankView]]] = {}
    for view in views:
        for each in view.collectives:
            wait = view.wait
            if wait is None or wait.axis != each.axis or wait.peer >= 0 or not each.ranks:
                continue
            place = (each.axis, tuple(each.ranks), wait.number)
            kind = wait.op
            if wait.op in SAME_BYTES and wait.number == each.number:
                kind = f"{wait.op} of {each.num_bytes:,} bytes"
            places.setdefault(place, {}).setdefault(kind, []).append(view)
    for (axis, _, number), kinds in places.items():
        if len(kinds) < 2:
            continue
        # The smaller party is the one that has gone another way.
        parties = sorted(kinds.items(), key=lambda item: len(item[1]))
        lines = [f"ranks do not agree on collective {number:,} of {axis}:"]
        for kind, members in parties:
            named = ", ".join(view.name for view in members[:SHOWN_RANKS])
            more = "" if len(members) <= SHOWN_RANKS else f" and {len(members) - SHOWN_RANKS} more"
            lines.append(f"  {kind}: {named}{more}; step {members[0].step:,}")
        return Verdict(tuple(view.rank for view in parties[0][1]), tuple(lines))
    return None


def _describe_circle(views: Sequence[RankView], waits_for: dict[int, set[int]]) -> Verdict:
    """Name the ranks that wait for each other."""
    # Whoever waits only for ranks outside the circle falls out, round by round.
    circle = dict(waits_for)
    while True:
        waited_for = set().union(*circle.values())
        inner = {rank: others for rank, others in circle.items() if rank in waited_for}
        if len(inner) == len(circle):
            break
        circle = inner
    members = [view for view in views if view.rank in circle]
    lines = ["ranks wait for each other:"]
    for view in members[:SHOWN_RANKS]:
        others = ", ".join(map(str, sorted(circle[view.rank])[:SHOWN_RANKS]))
        place = describe_wait(view) if view.wait is not None else view.activity
        lines.append(f"  {view.name} waits in {place} for rank {others}; step {view.step:,}")
    return Verdict(tuple(view.rank for view in members), tuple(lines))


def _describe_standstill(views: Sequence[RankView]) -> Verdict:
    """Say what all ranks do where nobody misses anybody."""
    waiting = [view for view in views if view.wait is not None]
    if waiting:
        places = sorted({describe_wait(view).rsplit(" for ", 1)[0] for view in waiting})
        hosts = sorted({view.host for view in views})
        of_hosts = f" of {', '.join(hosts[:4])}" + (", ..." if len(hosts) > 4 else "")
        text = (
            f"{count_ranks(len(waiting))} wait{'s' if len(waiting) == 1 else ''} in "
            f"{', '.join(places[:3])}, and nobody is missing: the network{of_hosts} stands"
        )
        return Verdict((), (text,))
    if views and all(view.activity == WAITING_FOR_DEVICE for view in views):
        text = (
            f"all {count_ranks(len(views))} have handed their step to the devices: one of these, "
            "or the network between them, stands (see NCCL's flight recorder)"
        )
        return Verdict((), (text,))
    return _blame(views, {})


def is_network_down(views: Sequence[RankView]) -> bool:
    """Tell whether all ranks wait in collectives to which all have come."""
    return all(view.wait is not None for view in views) and not judge(views).ranks


def count_ranks(count: int) -> str:
    """Count ranks in words."""
    return f"{count:,} rank" + ("" if count == 1 else "s")
