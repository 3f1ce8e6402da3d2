"""The page that the watchdog writes: who is at fault, what every rank does, and every stack."""

from collections.abc import Sequence

from launch.rank_view import RankView
from launch.stacks import group_stacks
from launch.verdict import describe_wait


def write_page(
    lines: Sequence[str], views: Sequence[RankView], stacks: dict[int, str], when: str
) -> str:
    """Write the whole page.

    Args:
        lines: the verdict.
        when: the time of day.
    """
    parts = [f"The run stood still at {when}.", *lines, ""]
    parts.append("What each rank did:")
    parts += [text for view in views for text in describe_rank(view)]
    parts.append("")
    parts.append("Python stacks, the innermost call first:")
    for ranks, text in group_stacks(stacks):
        named = ", ".join(map(str, ranks))
        parts += [f"--- rank{'s' if len(ranks) > 1 else ''} {named}", text.rstrip(), ""]
    return "\n".join(parts) + "\n"


def describe_rank(view: RankView) -> list[str]:
    """Describe a rank in a line, and its last collective on each axis in a line each."""
    state = f", stopped by a signal for {view.stopped_seconds:.0f} s" if view.is_stopped else ""
    wait = f", waits in {describe_wait(view)}" if view.wait is not None else ""
    lines = [
        f"{view.name}, node {view.node}: step {view.step:,}, {view.activity} for "
        f"{view.activity_seconds:.1f} s{wait}{state}; last sign of life {view.silence:.1f} s ago, "
        f"kernel state {view.process_state or 'gone'}"
    ]
    for each in view.collectives:
        ended = "handed to the device" if view.device == "cuda" else "ended"
        how = ended if each.has_ended else "not ended"
        peer = f" with rank {each.peer}" if each.peer >= 0 else ""
        lines.append(
            f"    {each.axis}: {each.op} {each.number:,}{peer}, {each.num_bytes:,} bytes, begun "
            f"{each.begun_seconds:.1f} s ago, {how}"
        )
    return lines
