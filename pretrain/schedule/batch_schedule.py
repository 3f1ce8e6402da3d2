"""How many tokens each step of a phase takes, as a function of the clock.

A phase is a row of stretches of whole steps, each with one global batch. A scheduled batch changes
at the first step that begins at or after its threshold, as in Megatron-LM
(megatron/core/num_microbatches_calculator.py), whose thresholds in samples or tokens become
positions of the clock here.
"""

from collections.abc import Sequence
from typing import NamedTuple

from data.units import parse_tokens


class BatchStretch(NamedTuple):
    """Positions [start, end) of the clock in whole steps of `batch` tokens."""

    start: int
    end: int
    batch: int

    @property
    def steps(self) -> int:
        return (self.end - self.start) // self.batch


class BatchStep(NamedTuple):
    """From the first step at or after `threshold` on, a step takes `batch` tokens."""

    threshold: int
    batch: int


def cut_into_stretches(
    start: int, tokens: int, schedule: Sequence[BatchStep]
) -> tuple[BatchStretch, ...]:
    """The steps that begin within `tokens` positions from `start`; the last one may reach beyond
    them.

    Args:
        schedule: ascending, the first at or before `start`; thresholds on the same clock.
    """
    assert schedule and schedule[0].threshold <= start and tokens > 0
    stretches = []
    clock = start
    goal = start + tokens
    for number, (_, batch) in enumerate(schedule):
        until = min(goal, schedule[number + 1].threshold if number + 1 < len(schedule) else goal)
        if until > clock:
            end = clock + -(-(until - clock) // batch) * batch
            stretches.append(BatchStretch(clock, end, batch))
            clock = end
    return tuple(stretches)


def parse_ramp(
    words: Sequence[int], target: int, begin: int, unit: int, threshold_unit: int
) -> list[BatchStep]:
    """Megatron-LM's `--rampup-batch-size START INCREMENT SAMPLES`: from START samples to `target`
    tokens in equal portions of SAMPLES.

    Args:
        target: tokens of the full batch.
        begin: position from which SAMPLES are counted.
        unit: tokens of a sample, for START and INCREMENT.
        threshold_unit: tokens of a sample, for SAMPLES.

    Raises:
        ValueError: not three numbers, or the increments do not lead from START to the target.
    """
    name = f"rampup_batch_size = {' '.join(map(str, words))}: "
    if len(words) != 3 or words[0] < 1 or words[1] < 1 or words[2] < 0:
        raise ValueError(
            f"{name}must be START INCREMENT SAMPLES, the first two above 0. Fix: for example "
            "32 32 100000."
        )
    first = words[0] * unit
    increment = words[1] * unit
    samples = words[2]
    count, rest = divmod(target - first, increment)
    if target < first or rest:
        raise ValueError(
            f"{name}{first} tokens + n x {increment} tokens must reach the full batch of {target} tokens "
            f"({words[0]} and {words[1]} samples of {unit} tokens). Fix: for example a full batch of "
            f"{max(first, first + round((target - first) / increment) * increment)} tokens."
        )
    portions = (
        [-(-number * samples // count) * threshold_unit for number in range(count + 1)]
        if count
        else [0]
    )
    schedule: dict[int, int] = {}
    for number, portion in enumerate(portions):
        schedule[begin + portion] = (
            first + number * increment
        )  # of portions of no samples the last one counts
    return [BatchStep(*entry) for entry in sorted(schedule.items())]


def parse_steps(text: str, begin: int, unit: int) -> list[BatchStep]:
    """Megatron-LM's `--step-batch-size-schedule "0:768 250B:1536"`: tokens from which a step takes
    so many samples.

    Args:
        begin: position from which the tokens are counted.
        unit: tokens of a sample.

    Raises:
        ValueError: not such pairs, not ascending, or the first does not begin at 0.
    """
    name = f"step_batch_size_schedule = {text}: "
    example = 'Fix: for example "0:768 250B:1536".'
    schedule = []
    for word in text.replace(",", " ").split():
        threshold, colon, batch = word.partition(":")
        try:
            pair = parse_tokens(threshold), int(batch)
        except ValueError:
            pair = None
        if not colon or pair is None or pair[1] < 1:
            raise ValueError(f"{name}{word!r} is not TOKENS:SAMPLES. {example}")
        schedule.append(BatchStep(begin + pair[0], pair[1] * unit))
    if not schedule or schedule[0].threshold != begin:
        raise ValueError(f"{name}must begin at 0. {example}")
    if any(
        after.threshold <= before.threshold
        for before, after in zip(schedule, schedule[1:], strict=False)
    ):
        raise ValueError(f"{name}the token counts must rise. {example}")
    return schedule


def batch_at(stretches: Sequence[BatchStretch], clock: int) -> int:
    """Tokens of the step that begins at `clock`, which a changed batch may have put off the steps'
    own places."""
    return next(
        (stretch.batch for stretch in stretches if clock < stretch.end), stretches[-1].batch
    )


def first_step_from(stretches: Sequence[BatchStretch], position: int) -> int:
    """Where the first step begins that begins at or after `position`; the end of the stretches if
    none does."""
    for stretch in stretches:
        if position < stretch.end:
            steps = max(0, -(-(position - stretch.start) // stretch.batch))
            if stretch.start + steps * stretch.batch < stretch.end:
                return stretch.start + steps * stretch.batch
    return stretches[-1].end


def end_of_steps(stretches: Sequence[BatchStretch], clock: int) -> int:
    """Where the last step ends of those that begin from `clock` on before the end of the
    stretches."""
    for stretch in stretches:
        if clock < stretch.end:
            clock += -(-(stretch.end - clock) // stretch.batch) * stretch.batch
    return clock
