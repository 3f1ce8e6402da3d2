"""Dealing a step's samples by cost: each once, and the slowest ranks as fast as can be."""

from itertools import permutations

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
        least = min(shape.waits(costs[list(order)]) for order in orders)
        assert shape.waits(costs[deal(costs, shape)]) <= 1.05 * least


def test_single_samples_that_meet_in_each_microbatch_are_dealt_perfectly():
    shape = shape_of(3, 2, 1, "microbatch")
    for seed in range(4):
        costs = draw(6, seed)
        least = min(shape.waits(costs[list(order)]) for order in permutations(range(6)))
        assert shape.waits(costs[deal(costs, shape)]) == pytest.approx(least, rel=1e-12)


def test_what_a_step_waits_for_is_the_sum_of_the_slowest_where_ranks_meet():
    # Slots: microbatch 0 of ranks 0 and 1, then microbatch 1.
    costs = np.array([4.0, 1.0, 1.0, 2.0])
    assert imbalance(costs, None, shape_of(2, 2, 1, "microbatch")) == (4 + 2) / (8 / 2)
    assert imbalance(costs, None, shape_of(2, 2, 1, "step")) == 5 / 4
    assert imbalance(costs, np.array([0, 3, 1, 2]), shape_of(2, 2, 1, "microbatch")) == 5 / 4


@pytest.mark.parametrize("meeting", MEETINGS)
def test_equal_costs_are_dealt_alike_every_time(meeting):
    shape = shape_of(4, 4, 2, meeting)
    costs = np.ones(shape.samples)
    assert imbalance(costs, deal(costs, shape), shape) == 1.0
    assert deal(costs, shape).tolist() == deal(costs.copy(), shape).tolist()


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
