"""Which sample of a step goes to which data rank and microbatch, so that nobody waits long.

A step takes as long as its slowest rank, and packed samples of the same length differ in their
attention. The loss is one sum over the step's samples, so that any permutation of them is the same
update. The permutation is a function of the samples' costs alone: every rank computes it by itself,
and all compute the same.

Slots of a step are counted as data/loader.py does: sample i of microbatch j of data rank d has slot
(j x dp_size + d) x micro_batch_size + i.
"""

from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np
import xxhash

from data.document_cost import DocumentCost

Meeting = Literal["microbatch", "step"]
"""How often data ranks wait for each other: in each microbatch (weights gathered or gradients
reduced there: ZeRO-2 and 3), or once a step (ZeRO-1, and gradients kept by a pipeline)."""
ROUNDS_PER_PART = 4
"""Limit of the rounds of exchanges, for each part of a group; usually a few are enough."""
LEAST_GAIN = 1e-6
"""Smallest gain for which items are exchanged, as a share of the largest part's sum."""


@dataclass(frozen=True)
class Dealing:
    """Describes what a step's samples are dealt by."""

    cost: DocumentCost
    meeting: Meeting


@dataclass(frozen=True)
class Dealt:
    """Holds how a step's samples were dealt."""

    slots: np.ndarray
    """int64 [samples]: the sample of each slot, counted from the step's first."""
    imbalance: float | None = None
    """What the step waits for over the mean of its ranks (`imbalance`); None = not known, or there
    is one rank."""
    imbalance_in_order: float | None = None
    """The same, had the samples been dealt in their order."""

    @property
    def hash(self) -> int:
        """A number below 2^40 that differs, but for chance, where the slots do."""
        return xxhash.xxh3_64_intdigest(self.slots.tobytes()) >> 24


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Describes how a step's samples are cut, and who waits for whom."""

    dp_size: int
    num_microbatches: int
    """Microbatches of each data rank."""
    micro_batch_size: int
    meeting: Meeting

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return self.num_microbatches * self.dp_size * self.micro_batch_size

    def waits(self, costs: np.ndarray) -> float:
        """Compute what the slowest ranks of a step cost, microbatches one after another.

        Args:
            costs: of the sample in each slot, float64 [samples].
        """
        cells = costs.reshape(self.num_microbatches, self.dp_size, self.micro_batch_size).sum(2)
        if self.meeting == "microbatch":
            return float(cells.max(1).sum())
        return float(cells.sum(0).max())


def deal(costs: np.ndarray, shape: StepShape) -> np.ndarray:
    """Deal a step's samples by their costs -> the sample of each slot, int64 [samples].

    Args:
        costs: of the step's samples in their order, float64 [samples].
    """
    assert costs.shape == (shape.samples,), (costs.shape, shape)
    # The most expensive first; of equal ones the earlier, so that nothing is left to chance.
    falling = np.argsort(-costs, kind="stable")
    if shape.meeting == "microbatch":
        cells = _deal_per_microbatch(costs, falling, shape)
    else:
        cells = _deal_per_step(costs, falling, shape)
    return cells[rising_and_falling(shape.num_microbatches)].reshape(-1)


def imbalance(costs: np.ndarray, slots: np.ndarray | None, shape: StepShape) -> float:
    """Compare what a step waits for with the mean over its ranks: 1.0 = nobody waits.

    Args:
        costs: of the step's samples in their order, float64 [samples].
        slots: what `deal` returned; None = the samples in their order.
    """
    total = float(costs.sum())
    placed = costs if slots is None else costs[slots]
    return shape.waits(placed) * shape.dp_size / total if total else 1.0


def rising_and_falling(count: int) -> np.ndarray:
    """List numbers of falling costs so that the costs rise and then fall: 4 2 0 1 3.

    A pipeline fills and drains with its cheapest microbatches, and neighbours in it are alike: with
    lognormal costs, 4 stages and 32 microbatches its time is 0.6 of that in a random order.
    """
    numbers = np.arange(count)
    return np.concatenate([numbers[::2][::-1], numbers[1::2]])


def _deal_per_microbatch(costs: np.ndarray, falling: np.ndarray, shape: StepShape) -> np.ndarray:
    """Deal so that the sum over microbatches of the slowest rank is least.

    Returns:
        Samples, int64 [microbatches, ranks, samples of a microbatch], by falling cost of the
        slowest rank.
    """
    # Neighbours in the order share a microbatch, which for single samples is the best there is.
    cells = falling[divide(costs[falling], shape.num_microbatches, shape.dp_size)]
    sums = costs[cells].sum(2)
    cells = cells[np.argsort(-sums.max(1), kind="stable")]
    totals = np.zeros(shape.dp_size)
    for number, of_microbatch in enumerate(cells):
        # The rank with the least work so far takes the most expensive part.
        sums = costs[of_microbatch].sum(1)
        ranks = np.argsort(totals, kind="stable")
        cells[number, ranks] = of_microbatch[np.argsort(-sums, kind="stable")]
        totals = totals + costs[cells[number]].sum(1)
    return cells


def _deal_per_step(costs: np.ndarray, falling: np.ndarray, shape: StepShape) -> np.ndarray:
    """Deal so that the slowest rank's sum is least -> as `_deal_per_microbatch`."""
    dealt = np.empty(
        (shape.num_microbatches, shape.dp_size, shape.micro_batch_size), dtype=np.int64
    )
    (by_rank,) = divide(costs[falling], 1, shape.dp_size)
    for rank, own in enumerate(by_rank):
        # A rank's samples by falling cost; then they are divided into nearly equal microbatches.
        samples = falling[np.sort(own)]
        (cells,) = samples[divide(costs[samples], 1, shape.num_microbatches)]
        sums = costs[cells].sum(1)
        dealt[:, rank] = cells[np.argsort(-sums, kind="stable")]
    return dealt


# ---------------------------------------------------------------- dividing numbers evenly


def divide(costs: np.ndarray, groups: int, parts: int) -> np.ndarray:
    """Divide items so that the sum over groups of the largest part's sum is small.

    Each group takes neighbours and divides them by longest processing time first; then items are
    exchanged as long as that helps.

    Args:
        costs: float64 [items], falling.
    Returns:
        Numbers of the items, int64 [groups, parts of a group, items of a part].
    """
    per_part = len(costs) // (groups * parts)
    assert per_part * groups * parts == len(costs), (len(costs), groups, parts)
    if per_part == 1 or parts == 1 == groups:
        return np.arange(len(costs)).reshape(groups, parts, per_part)
    return _divide(np.ascontiguousarray(costs, dtype=np.float64), groups, parts, per_part)


@numba.njit(nogil=True, cache=True)
def _divide(costs, groups, parts, per_part):
    """Divide items as `divide` describes."""
    members = np.empty((groups, parts, per_part), dtype=np.int64)
    used = np.zeros((groups, parts), dtype=np.int64)
    sums = np.zeros((groups, parts))
    for item in range(len(costs)):
        group = item // (parts * per_part)
        # The part with the least sum among those that have room; of equal ones the first.
        target = -1
        for part in range(parts):
            has_room = used[group, part] < per_part
            if has_room and (target < 0 or sums[group, part] < sums[group, target]):
                target = part
        members[group, target, used[group, target]] = item
        used[group, target] += 1
        sums[group, target] += costs[item]
    # One exchange for each group in turn, until a round finds none.
    for _ in range(ROUNDS_PER_PART * parts):
        found = False
        for group in range(groups):
            found = _exchange(costs, members, sums, group) or found
        if not found:
            break
    return members


@numba.njit(nogil=True, cache=True)
def _exchange(costs, members, sums, group):
    """Exchange an item of a group's largest part for a cheaper one of any part of any group.

    Of all exchanges the one with the largest gain is made; of equal ones the first.

    Returns:
        Was there an exchange with a gain?
    """
    groups, parts, per_part = members.shape
    first, second, third = _largest_three(sums[group])
    largest = sums[group, first]
    # A gain must be larger than this: with rounding errors alone exchanges would never end.
    best = LEAST_GAIN * abs(largest)
    best_group = -1
    best_part = -1
    best_own = -1
    best_other = -1
    for other_group in range(groups):
        top = sums[other_group].max()
        for part in range(parts):
            if other_group == group and part == first:
                continue
            # The largest part that takes no part in the exchange: the group's largest sum stays
            # at least as large.
            untouched = third if other_group == group and part == second else second
            rest = sums[group, untouched] if untouched >= 0 else 0.0
            if largest - rest <= best:
                continue
            for own in range(per_part):
                for other in range(per_part):
                    item = members[group, first, own]
                    moved = costs[item] - costs[members[other_group, part, other]]
                    if moved <= 0.0:
                        continue
                    raised = sums[other_group, part] + moved
                    after = max(largest - moved, rest)
                    if other_group == group:
                        gain = largest - max(after, raised)
                    else:
                        gain = largest - after - max(0.0, raised - top)
                    if gain > best:
                        best = gain
                        best_group = other_group
                        best_part = part
                        best_own = own
                        best_other = other
    if best_part < 0:
        return False
    item = members[group, first, best_own]
    other_item = members[best_group, best_part, best_other]
    members[group, first, best_own] = other_item
    members[best_group, best_part, best_other] = item
    # Summed again from the items: adding differences would add up rounding errors.
    sums[group, first] = _sum_of(costs, members[group, first])
    sums[best_group, best_part] = _sum_of(costs, members[best_group, best_part])
    return True


@numba.njit(nogil=True, cache=True)
def _largest_three(numbers):
    """Find where the largest three numbers are; -1 where there are fewer."""
    first = -1
    second = -1
    third = -1
    for i in range(len(numbers)):
        if first < 0 or numbers[i] > numbers[first]:
            third = second
            second = first
            first = i
        elif second < 0 or numbers[i] > numbers[second]:
            third = second
            second = i
        elif third < 0 or numbers[i] > numbers[third]:
            third = i
    return first, second, third


@numba.njit(nogil=True, cache=True)
def _sum_of(costs, items):
    total = 0.0
    for item in items:
        total += costs[item]
    return total
