"""How many tokens each step of a phase takes, as a function of the clock.

A phase is a row of stretches of whole steps, each with one global batch. A scheduled batch changes
at the first step that begins at or after its threshold, as in Megatron-LM
(megatron/core/num_microbatches_calculator.py), whose thresholds in samples or tokens become
positions of the clock here.
"""

from collections.abc import Sequence
from itertools import pairwise
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


def whole_steps(tokens: int, batch: int) -> int:
    """Round a number of tokens up to whole steps of `batch`; return how many."""
    return -(-tokens // batch)


def cut_into_stretches(
    start: int, tokens: int, schedule: Sequence[BatchStep]
) -> tuple[BatchStretch, ...]:
    """Return the steps that begin within `tokens` positions from `start`.

    The last one may reach beyond them.

    Args:
        schedule: ascending, the first at or before `start`; thresholds on the same clock.
    """
    assert schedule and schedule[0].threshold <= start and tokens > 0
    stretches = []
    clock = start
    goal = start + tokens
    thresholds = [step.threshold for step in schedule[1:]]
    for (_, batch), following in zip(schedule, [*thresholds, goal], strict=True):
        until = min(goal, following)
        # Steps are whole, so a stretch may pass the threshold after next: that batch is skipped.
        if until > clock:
            end = clock + whole_steps(until - clock, batch) * batch
            stretches.append(BatchStretch(clock, end, batch))
            clock = end
    return tuple(stretches)


def parse_ramp(
    words: Sequence[int], target: int, begin: int, unit: int, threshold_unit: int
) -> list[BatchStep]:
    """Read Megatron-LM's `--rampup-batch-size START INCREMENT SAMPLES`.

    It goes from START samples to `target` tokens in equal portions of SAMPLES.

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
        nearest = max(first, first + round((target - first) / increment) * increment)
        raise ValueError(
            f"{name}{first} tokens + n x {increment} tokens must reach the full batch of {target} "
            f"tokens ({words[0]} and {words[1]} samples of {unit} tokens). Fix: for example a full "
            f"batch of {nearest} tokens."
        )
    # START may be the full batch already: then there is one batch, from the beginning on.
    portions = [0]
    if count:
        portions = [whole_steps(number * samples, count) for number in range(count + 1)]
    schedule: dict[int, int] = {}
    for number, portion in enumerate(portions):
        # Of portions of no samples, which begin at the same place, the last one counts.
        schedule[begin + portion * threshold_unit] = first + number * increment
    return [BatchStep(*entry) for entry in sorted(schedule.items())]


def parse_steps(text: str, begin: int, unit: int) -> list[BatchStep]:
    """Read Megatron-LM's `--step-batch-size-schedule "0:768 250B:1536"`.

    It names the tokens from which on a step takes a number of samples.

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
        tokens = 0
        samples = 0
        try:
            tokens = parse_tokens(threshold)
            samples = int(batch)
        except ValueError:
            pass  # said below, as a number of samples below 1 is
        if not colon or samples < 1:
            raise ValueError(f"{name}{word!r} is not TOKENS:SAMPLES. {example}")
        schedule.append(BatchStep(begin + tokens, samples * unit))
    if not schedule or schedule[0].threshold != begin:
        raise ValueError(f"{name}must begin at 0. {example}")
    if any(after.threshold <= before.threshold for before, after in pairwise(schedule)):
        raise ValueError(f"{name}the token counts must rise. {example}")
    return schedule


def batch_at(stretches: Sequence[BatchStretch], clock: int) -> int:
    """Return the tokens of the step that begins at `clock`.

    A batch that was changed on continuing may have moved the clock off the steps' own places.
    """
    # Beyond the end, which such a step may reach, the last batch holds.
    return next(
        (stretch.batch for stretch in stretches if clock < stretch.end), stretches[-1].batch
    )


def first_step_from(stretches: Sequence[BatchStretch], position: int) -> int:
    """Return where the first step at or after `position` begins; the stretches' end if none."""
    for stretch in stretches:
        if position < stretch.end:
            steps = max(0, whole_steps(position - stretch.start, stretch.batch))
            begin = stretch.start + steps * stretch.batch
            if begin < stretch.end:
                return begin
    return stretches[-1].end


def end_of_steps(stretches: Sequence[BatchStretch], clock: int) -> int:
    """Return where the last step ends of those that begin within the stretches, from `clock` on."""
    for stretch in stretches:
        if clock < stretch.end:
            clock += whole_steps(stretch.end - clock, stretch.batch) * stretch.batch
    return clock
