"""Pipeline schedules by name: where each puts its stages, and what it asks of a step.

Sources: 1F1B is PipeDream-Flush (arXiv 2006.09503), interleaved is Megatron-LM's (arXiv
2104.04473), zero-bubble is ZB1P and ZBV its V-shaped form (arXiv 2401.10241).
torch.distributed.pipelining runs them.
"""

from typing import Literal

ScheduleName = Literal["1F1B", "interleaved", "zero-bubble", "ZBV"]

SPLIT_BACKWARD = ("zero-bubble", "ZBV")
"""Schedules that run the backward of inputs and that of weights apart.

torch's split counts on every parameter being used once in a stage's forward (model/gpt.py does so).
"""


def stages_of_rank(
    schedule: ScheduleName, rank: int, pp_size: int, per_rank: int
) -> tuple[int, ...]:
    """Numbers of the stages on pipeline rank `rank`, in the order of the forward pass.

    Stages go round the ranks; under ZBV they go there and back, so the first and the last share a
    rank.
    """
    if schedule == "ZBV":
        return rank, 2 * pp_size - 1 - rank
    return tuple(rank + i * pp_size for i in range(per_rank))


def layers_of_stage(num_layers: int, stage: int, num_stages: int) -> range:
    """Global indices of the layers that `stage` holds; earlier stages take the remainder."""
    base, extra = divmod(num_layers, num_stages)
    start = stage * base + min(stage, extra)
    return range(start, start + base + (stage < extra))


def accepts(schedule: ScheduleName, pp_size: int, num_microbatches: int) -> bool:
    """Can the schedule run a step of so many microbatches?"""
    if num_microbatches < 1:
        return False
    if pp_size == 1 or schedule == "ZBV":
        return True
    if schedule == "1F1B":
        return num_microbatches >= pp_size
    # torch runs them in rounds of about one microbatch per rank, all of the same size.
    return num_microbatches % max(1, num_microbatches // pp_size) == 0


def nearest_counts(schedule: ScheduleName, pp_size: int, num_microbatches: int) -> list[int]:
    """The nearest counts of microbatches, below and above, that the schedule accepts."""
    below = next(
        (n for n in range(num_microbatches - 1, 0, -1) if accepts(schedule, pp_size, n)), None
    )
    above = next(
        n
        for n in range(num_microbatches + 1, num_microbatches + 2 * pp_size + 1)
        if accepts(schedule, pp_size, n)
    )
    return [n for n in (below, above) if n is not None]


def chunks_in_flight(
    schedule: ScheduleName, rank: int, pp_size: int, per_rank: int, num_microbatches: int
) -> int:
    """Most pairs (stage of this rank, microbatch) whose activations are kept at once, as torch's
    schedules order them.

    Under a split backward they are kept until that of the weights.
    """
    if pp_size == 1:
        return 1
    if schedule == "1F1B":
        return min(num_microbatches, pp_size - rank)
    at_once = num_microbatches // max(1, num_microbatches // pp_size)  # microbatches of a round
    if schedule == "interleaved":
        return min(
            per_rank * num_microbatches, (per_rank - 1) * at_once + 2 * (pp_size - 1 - rank) + 1
        )
    return per_rank * min(num_microbatches, pp_size if schedule == "ZBV" else max(pp_size, at_once))


def idle_share(schedule: ScheduleName, pp_size: int, per_rank: int, num_microbatches: int) -> float:
    """Time that a rank waits in a step, over the time that it works: the pipeline's bubble.

    Source: the schedules' papers, with forward, backward of inputs and backward of weights taken as
    equally long.
    """
    if pp_size == 1:
        return 0.0
    idle = (pp_size - 1) / per_rank / num_microbatches
    if (
        schedule == "ZBV"
    ):  # counted in torch's own order: thirds of a stage; few microbatches leave a fixed length
        return max(idle / 3, (13 * pp_size - 7) / (6 * num_microbatches) - 1)
    return idle / 3 if schedule == "zero-bubble" else idle
