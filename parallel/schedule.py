"""Pipeline schedules: one row of a table each, which every other file reads.

Sources: 1F1B is PipeDream-Flush (arXiv 2006.09503), interleaved is Megatron-LM's (arXiv
2104.04473), zero-bubble is ZB1P and ZBV its V-shaped form (arXiv 2401.10241).
torch.distributed.pipelining runs them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["1F1B", "interleaved", "zero-bubble", "ZBV"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What one schedule asks of a layout and of a step, and what it costs.

    In the functions, `pp` is the number of pipeline ranks, `per_rank` the number of stages on each
    of them, and `count` the number of microbatches of a step.
    """

    torch_class: str
    """Name of its class in torch.distributed.pipelining, which is slow to import."""
    default_per_rank: int
    """Stages per rank where no setting names their number."""
    fewest_per_rank: int
    most_per_rank: int | None
    """None = any number."""
    per_rank_rule: str
    """What is said of a number of stages per rank outside these: the rule and the fix."""
    is_v_shaped: bool = False
    """Do the stages go round the ranks there and back, so that the first and last share a rank?"""
    splits_backward: bool = False
    """Does it run the backward of inputs and that of weights apart?

    torch's split counts on every parameter being used once in a stage's forward (model/gpt.py does
    so).
    """
    accepts: Callable[[int, int], bool]
    """(pp, count) -> can it run a step of this many microbatches?"""
    count_rule: Callable[[int, int], str]
    """(pp, count) -> what a count that is not accepted should have been, in words."""
    chunks_in_flight: Callable[[int, int, int, int], int]
    """(pp, rank, per_rank, count) -> the most pairs (stage of the rank, microbatch) whose
    activations are kept at once."""
    idle_share: Callable[[int, int, int], float]
    """(pp, per_rank, count) -> time that a rank waits over the time that it works."""

    def allows_per_rank(self, per_rank: int) -> bool:
        """Tell whether it can run with this many stages on each rank."""
        most = per_rank if self.most_per_rank is None else self.most_per_rank
        return self.fewest_per_rank <= per_rank <= most

    @property
    def takes_one_stage(self) -> bool:
        """Does torch's class take a single stage instead of a list of stages?"""
        return self.most_per_rank == 1


# Counts of microbatches.


def _rounds(pp: int, count: int) -> int:
    """Count the rounds of about one microbatch per rank in which torch runs a step."""
    return max(1, count // pp)


def _one_per_rank(pp: int, count: int) -> bool:
    return count >= pp


def _equal_rounds(pp: int, count: int) -> bool:
    return count % _rounds(pp, count) == 0


def _any_count(_pp: int, _count: int) -> bool:
    return True


def _one_per_rank_rule(pp: int, _count: int) -> str:
    return f"at least one per stage = {pp}"


def _equal_rounds_rule(pp: int, count: int) -> str:
    return f"a multiple of {_rounds(pp, count)}, the rounds that it runs them in"


# Pairs (stage, microbatch) whose activations are kept, in the order in which torch's classes run
# them. A schedule that splits the backward keeps them until the backward of the weights.


def _chunks_1f1b(pp: int, rank: int, _per_rank: int, count: int) -> int:
    return min(count, pp - rank)


def _chunks_interleaved(pp: int, rank: int, per_rank: int, count: int) -> int:
    per_round = count // _rounds(pp, count)
    warmup = (per_rank - 1) * per_round + 2 * (pp - 1 - rank)
    return min(per_rank * count, warmup + 1)


def _chunks_zero_bubble(pp: int, _rank: int, per_rank: int, count: int) -> int:
    per_round = count // _rounds(pp, count)
    return per_rank * min(count, max(pp, per_round))


def _chunks_zbv(pp: int, _rank: int, per_rank: int, count: int) -> int:
    return per_rank * min(count, pp)


# The bubble, by the schedules' papers: forward, backward of inputs and backward of weights are
# taken as equally long.


def _idle_1f1b(pp: int, per_rank: int, count: int) -> float:
    return (pp - 1) / per_rank / count


def _idle_zero_bubble(pp: int, per_rank: int, count: int) -> float:
    return _idle_1f1b(pp, per_rank, count) / 3


def _idle_zbv(pp: int, per_rank: int, count: int) -> float:
    # Few microbatches leave a step of a fixed length, counted in torch's order.
    of_fixed_length = (13 * pp - 7) / (6 * count) - 1
    return max(_idle_zero_bubble(pp, per_rank, count), of_fixed_length)


SCHEDULES: dict[ScheduleName, Schedule] = {
    "1F1B": Schedule(
        torch_class="Schedule1F1B",
        default_per_rank=1,
        fewest_per_rank=1,
        most_per_rank=1,
        per_rank_rule=(
            "1F1B has one stage per rank. Fix: 1 stage, or --pipeline-schedule interleaved."
        ),
        accepts=_one_per_rank,
        count_rule=_one_per_rank_rule,
        chunks_in_flight=_chunks_1f1b,
        idle_share=_idle_1f1b,
    ),
    "interleaved": Schedule(
        torch_class="ScheduleInterleaved1F1B",
        default_per_rank=2,
        fewest_per_rank=2,
        most_per_rank=None,
        per_rank_rule="interleaved needs at least 2. Fix: 2, or --pipeline-schedule 1F1B.",
        accepts=_equal_rounds,
        count_rule=_equal_rounds_rule,
        chunks_in_flight=_chunks_interleaved,
        idle_share=_idle_1f1b,
    ),
    "zero-bubble": Schedule(
        torch_class="ScheduleInterleavedZeroBubble",
        default_per_rank=1,
        fewest_per_rank=1,
        most_per_rank=None,
        per_rank_rule="zero-bubble needs at least 1. Fix: 1.",
        splits_backward=True,
        accepts=_equal_rounds,
        count_rule=_equal_rounds_rule,
        chunks_in_flight=_chunks_zero_bubble,
        idle_share=_idle_zero_bubble,
    ),
    "ZBV": Schedule(
        torch_class="ScheduleZBVZeroBubble",
        default_per_rank=2,
        fewest_per_rank=2,
        most_per_rank=2,
        per_rank_rule="ZBV has exactly 2. Fix: 2.",
        is_v_shaped=True,
        splits_backward=True,
        accepts=_any_count,
        count_rule=_equal_rounds_rule,  # never asked: it accepts every count
        chunks_in_flight=_chunks_zbv,
        idle_share=_idle_zbv,
    ),
}


def stages_of_rank(
    schedule: ScheduleName, rank: int, pp_size: int, per_rank: int
) -> tuple[int, ...]:
    """Number the stages on pipeline rank `rank`, in the order of the forward pass.

    Stages go round the ranks; under a V-shaped schedule they go there and back, so the first and
    the last share a rank.
    """
    if SCHEDULES[schedule].is_v_shaped:
        return rank, 2 * pp_size - 1 - rank
    return tuple(rank + i * pp_size for i in range(per_rank))


def layers_of_stage(num_layers: int, stage: int, num_stages: int) -> range:
    """Number the layers that `stage` holds, globally; earlier stages take the remainder."""
    base, extra = divmod(num_layers, num_stages)
    start = stage * base + min(stage, extra)
    return range(start, start + base + (stage < extra))


def accepts(schedule: ScheduleName, pp_size: int, num_microbatches: int) -> bool:
    """Tell whether the schedule can run a step of this many microbatches."""
    if num_microbatches < 1:
        return False
    return pp_size == 1 or SCHEDULES[schedule].accepts(pp_size, num_microbatches)


def nearest_counts(schedule: ScheduleName, pp_size: int, num_microbatches: int) -> list[int]:
    """Find the nearest counts of microbatches, below and above, that the schedule accepts."""
    smaller = range(num_microbatches - 1, 0, -1)
    larger = range(num_microbatches + 1, num_microbatches + 2 * pp_size + 1)
    below = next((n for n in smaller if accepts(schedule, pp_size, n)), None)
    above = next(n for n in larger if accepts(schedule, pp_size, n))
    return [above] if below is None else [below, above]


def chunks_in_flight(
    schedule: ScheduleName, rank: int, pp_size: int, per_rank: int, num_microbatches: int
) -> int:
    """Count the pairs (stage of this rank, microbatch) whose activations are kept at once, at most.

    The order is that of torch's schedules.
    """
    if pp_size == 1:
        return 1
    return SCHEDULES[schedule].chunks_in_flight(pp_size, rank, per_rank, num_microbatches)


def idle_share(schedule: ScheduleName, pp_size: int, per_rank: int, num_microbatches: int) -> float:
    """Estimate the pipeline's bubble: time that a rank waits in a step over the time it works."""
    if pp_size == 1:
        return 0.0
    return SCHEDULES[schedule].idle_share(pp_size, per_rank, num_microbatches)
