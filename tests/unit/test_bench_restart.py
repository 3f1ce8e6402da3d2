"""bench restart: the parts of a way back, and the arithmetic for many GPUs."""

import pytest

from tools.bench.restart import AtScale, estimate, middle_of, read_parts


def test_the_parts_of_a_way_back_are_read():
    text = "back at step 1,121 after 9.5 s: 0.1 s to notice, 2.0 s to end, 7.4 s first step"
    assert read_parts(text) == {"to notice": 0.1, "to end": 2.0, "first step": 7.4}


def test_the_middle_of_each_part_counts():
    ways = [{"plan": 1.0}, {"plan": 9.0, "groups": 2.0}, {"plan": 3.0}]
    assert middle_of(ways) == {"plan": 3.0, "groups": 2.0}


def test_the_share_of_the_time_that_trains_is_that_of_the_arithmetic_by_hand():
    assumed = AtScale(
        mean_hours_to_failure=10,
        notice_seconds=30,
        groups_seconds=20,
        read_gigabytes_per_second=2,
        state_gigabytes_per_node=100,
        save_minutes=10,
        stall_seconds=0.6,
    )
    # Away 30 + 10 + 20 + 50 = 110 s, trained again 300 s, in 36,000 s; 0.6 s in each 600 s.
    share, lines = estimate({"to notice": 3, "imports": 10, "groups": 7, "state": 5}, assumed)
    assert share == pytest.approx(1 - 410 / 36_000 - 0.001)
    assert lines[-1] == "effective training time: 98.76 %"
