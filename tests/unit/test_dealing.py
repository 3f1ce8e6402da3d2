"""Dealing a step's samples by cost: each once, and the slowest ranks as fast as can be."""

from itertools import combinations, permutations

import numpy as np
import pytest

from data.dealing import Meeting, StepShape, deal, divide, imbalance, rising_and_falling

MEETINGS: list[Meeting] = ["microbatch", "step"]


def shape_of(dp_size: int, microbatches: int, size: int, meeting: Meeting) -> StepShape:
    return StepShape(
        dp_size=dp_size,
        num_microbatches=microbatches,
        micro_batch_size=size,
        meeting=meeting,
    )


def draw(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 1.0, count)


def waited(placed: np.ndarray, cut: tuple[int, int, int], meeting: Meeting) -> float:
    """What a step waits for, counted slot by slot; `placed`: the cost in each slot."""
    ranks, microbatches, size = cut
    slots = iter(placed.tolist())
    work = [
        [sum(next(slots) for _ in range(size)) for _ in range(ranks)] for _ in range(microbatches)
    ]
    if meeting == "microbatch":
        return sum(max(of_microbatch) for of_microbatch in work)
    return max(sum(of_rank) for of_rank in zip(*work, strict=True))


@pytest.mark.parametrize("meeting", MEETINGS)
@pytest.mark.parametrize("cut", [(1, 1, 1), (1, 4, 2), (4, 1, 1), (4, 1, 3), (3, 5, 2), (8, 4, 1)])
def test_each_sample_has_one_slot(cut, meeting):
    shape = shape_of(*cut, meeting)
    slots = deal(draw(shape.samples), shape)
    assert sorted(slots.tolist()) == list(range(shape.samples))


@pytest.mark.parametrize("meeting", MEETINGS)
@pytest.mark.parametrize("cut", [(2, 3, 1), (3, 2, 1), (2, 2, 2)])
def test_no_order_of_few_samples_waits_much_less(cut, meeting):
    shape = shape_of(*cut, meeting)
    for seed in range(4):
        costs = draw(shape.samples, seed)
        orders = permutations(range(shape.samples))
        least = min(waited(costs[list(order)], cut, meeting) for order in orders)
        assert waited(costs[deal(costs, shape)], cut, meeting) <= 1.05 * least


def test_single_samples_that_meet_in_each_microbatch_are_dealt_perfectly():
    cut = (3, 2, 1)
    for seed in range(4):
        costs = draw(6, seed)
        orders = permutations(range(6))
        least = min(waited(costs[list(order)], cut, "microbatch") for order in orders)
        dealt = costs[deal(costs, shape_of(*cut, "microbatch"))]
        assert waited(dealt, cut, "microbatch") == pytest.approx(least, rel=1e-12)


def test_what_a_step_waits_for_is_the_sum_of_the_slowest_where_ranks_meet():
    # Slots: microbatch 0 of ranks 0 and 1, then microbatch 1.
    costs = np.array([4.0, 1.0, 1.0, 2.0])
    assert imbalance(costs, None, shape_of(2, 2, 1, "microbatch")) == (4 + 2) / (8 / 2)
    assert imbalance(costs, None, shape_of(2, 2, 1, "step")) == 5 / 4
    assert imbalance(costs, np.array([0, 3, 1, 2]), shape_of(2, 2, 1, "microbatch")) == 5 / 4


@pytest.mark.parametrize("meeting", MEETINGS)
def test_equal_costs_are_dealt_in_their_order(meeting):
    # Of equal samples the earlier ones come first: two for each of the microbatches 0, 1 and 2, of
    # which the last is the first to run, as the order rises and falls.
    shape = shape_of(2, 3, 1, meeting)
    assert deal(np.ones(6), shape).tolist() == [4, 5, 0, 1, 2, 3]
    assert imbalance(np.ones(6), deal(np.ones(6), shape), shape) == 1.0


@pytest.mark.parametrize("meeting", MEETINGS)
def test_samples_of_equal_cost_wait_no_longer_than_any_order_of_them(meeting):
    cut = (2, 3, 1)
    for count in range(7):
        orders = permutations([2.0] * count + [1.0] * (6 - count))
        least = min(waited(np.array(order), cut, meeting) for order in orders)
        for places in combinations(range(6), count):
            costs = np.ones(6)
            costs[list(places)] = 2.0
            slots = deal(costs, shape_of(*cut, meeting))
            assert waited(costs[slots], cut, meeting) == least, (costs, slots)


def test_ranks_that_meet_once_have_nearly_equal_work():
    shape = shape_of(16, 16, 1, "step")
    costs = draw(shape.samples)
    assert imbalance(costs, deal(costs, shape), shape) < 1.06


@pytest.mark.parametrize("meeting", MEETINGS)
def test_a_pipeline_begins_and_ends_with_its_cheapest_microbatches(meeting):
    shape = shape_of(2, 8, 1, meeting)
    costs = draw(shape.samples)
    longest = costs[deal(costs, shape)].reshape(8, 2).max(1)
    peak = int(longest.argmax())
    assert (np.diff(longest[: peak + 1]) >= 0).all()
    assert (np.diff(longest[peak:]) <= 0).all()
    assert 2 <= peak <= 5


def test_the_order_rises_and_falls():
    assert rising_and_falling(5).tolist() == [4, 2, 0, 1, 3]
    assert rising_and_falling(4).tolist() == [2, 0, 1, 3]
    assert rising_and_falling(1).tolist() == [0]


def test_exchanges_find_what_longest_first_does_not():
    # Longest first: 8 + 5 + 4 beside 7 + 6 + 0, as each part has three items.
    costs = np.array([8.0, 7.0, 6.0, 5.0, 4.0, 0.0])
    assert costs[divide(costs, 1, 2)].sum(2).max() == 15.0
