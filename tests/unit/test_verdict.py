"""launch/verdict.py: who is at fault, by what all ranks do; a table of situations."""

import math
from dataclasses import replace

import pytest

from launch.rank_view import Collective, RankView, Wait
from launch.verdict import WAITING_FOR_DEVICE, judge, who_waits_for_whom
from launch.watchdog import describe_slow, describe_wait_of_all, is_standing, silence_limit

WORLD = [0, 1, 2, 3]
GROUPS = {
    "world": lambda rank: WORLD,
    "tp": lambda rank: [rank // 2 * 2, rank // 2 * 2 + 1],
    "dp_cp": lambda rank: [rank % 2, rank % 2 + 2],
}
"""Axis -> the ranks of a rank's group, of tp 2 x dp 2."""


def rank_view(rank: int, **values) -> RankView:
    """A rank in its backward, 20 s after its last sign of life."""
    usual = dict(
        rank=rank,
        host=f"host{rank // 2}",
        pid=1000 + rank,
        node=rank // 2,
        process_state="S",
        stopped_seconds=0.0,
        step=57,
        activity="backward",
        activity_seconds=21.0,
        patience=0.0,
        silence=20.0,
        longest_gap=0.5,
        watchdog_seconds=30.0,
        slow_seconds=540.0,
        device="cpu",
        wait=None,
        collectives=[],
    )
    return RankView(**usual | values)


def at(rank: int, ended: bool = True, num_bytes: int = 64, **numbers: int) -> list[Collective]:
    """The last collectives of a rank: axis -> number."""
    return [
        Collective(axis, "all_reduce", number, num_bytes, ended, 20.0, -1, True, GROUPS[axis](rank))
        for axis, number in numbers.items()
    ]


def waits(rank: int, axis: str, number: int, op: str = "all_reduce", **numbers: int) -> RankView:
    """A rank that waits in a collective."""
    collectives = at(rank, False, **{axis: number}) + at(rank, **numbers)
    return rank_view(rank, wait=Wait(axis, op, number, -1, 20.0), collectives=collectives)


def busy(rank: int, activity: str = "reading data", **numbers: int) -> RankView:
    return rank_view(rank, activity=activity, collectives=at(rank, **numbers))


def pairs(rank: int, op: str, peer: int) -> RankView:
    """A rank that waits for a message of a pipeline."""
    slot = Collective("pp pairs", op, 9, 64, False, 20.0, peer, False, WORLD)
    return rank_view(rank, wait=Wait("pp pairs", op, 9, peer, 20.0), collectives=[slot])


STUCK_READER = [
    waits(0, "world", 8, tp=3),
    waits(1, "world", 8, tp=3),
    waits(2, "tp", 4, world=7),
    busy(3, world=7, tp=3),
]
STOPPED = [
    waits(0, "dp_cp", 1204),
    waits(1, "dp_cp", 1204),
    waits(2, "dp_cp", 1204),
    replace(rank_view(3, process_state="T", stopped_seconds=31.0), collectives=at(3, dp_cp=1203)),
]
OTHER_KINDS = [
    waits(0, "world", 8),
    waits(1, "world", 8),
    waits(2, "world", 8),
    waits(3, "world", 8, op="broadcast"),
]
OTHER_ORDER = [
    waits(0, "tp", 4, dp_cp=2),
    waits(1, "dp_cp", 3, tp=3),
    waits(2, "dp_cp", 3, tp=4),
    waits(3, "tp", 5, dp_cp=2),
]
ON_DEVICES = [
    *(
        rank_view(rank, activity=WAITING_FOR_DEVICE, device="cuda", collectives=at(rank, world=9))
        for rank in (0, 1, 2)
    ),
    rank_view(3, activity="forward", device="cuda", collectives=at(3, world=8)),
]
PIPELINE = [pairs(0, "recv", 1), pairs(1, "recv", 2), pairs(2, "recv", 3), busy(3, "forward")]
ALL_THERE = [waits(rank, "world", 8) for rank in WORLD]
LOST_ANSWER = [*(waits(rank, "world", 9) for rank in (0, 1, 2)), waits(3, "world", 8)]

SITUATIONS = {
    "a rank reads data for ever": (STUCK_READER, (3,), "rank 3 (host1, process 1003) has been"),
    "a rank is stopped": (STOPPED, (3,), "is stopped by a signal for 31 s, backward"),
    "a rank calls another collective": (OTHER_KINDS, (3,), "do not agree on collective 8 of world"),
    "a rank of one host hands out less": (ON_DEVICES, (3,), "has been forward for 21 s"),
    "the last stage computes": (PIPELINE, (3,), "has been forward for 21 s"),
    "all wait, nobody is missing": (ALL_THERE, (), "the network of host0, host1 stands"),
    "an answer is lost": (LOST_ANSWER, (), "1 rank waits in all_reduce 8 on world, and nobody"),
    "all read data": ([busy(rank) for rank in WORLD], (0, 1, 2, 3), "has been reading data"),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_rank_at_fault_is_named(situation):
    views, guilty, words = SITUATIONS[situation]
    verdict = judge(views)
    assert verdict.ranks == guilty, verdict.lines
    assert words in "\n".join(verdict.lines), verdict.lines


def test_the_verdict_counts_who_waits_also_by_way_of_others():
    assert "3 ranks wait for it" in judge(STUCK_READER).lines[0]
    assert "3 ranks wait for it" in judge(PIPELINE).lines[0]


def test_ranks_wait_for_a_stopped_one_that_has_begun_their_collective():
    # It began the collective, and was stopped before its bytes were sent.
    views = [waits(0, "dp_cp", 1204), waits(1, "dp_cp", 1204), waits(2, "dp_cp", 1204)]
    stopped = replace(waits(3, "dp_cp", 1204), process_state="T", stopped_seconds=31.0)
    (line,) = judge([*views, stopped]).lines
    # Rank 1 is of its group on dp_cp; 0 and 2 are of the other.
    assert line.startswith("rank 3 ") and line.endswith("; 1 rank waits for it"), line
    stopped = replace(pairs(3, "send", 2), process_state="T", stopped_seconds=31.0)
    (line,) = judge([pairs(0, "recv", 1), pairs(1, "recv", 2), pairs(2, "recv", 3), stopped]).lines
    assert line.endswith("; 3 ranks wait for it"), line


def test_ranks_that_take_two_collectives_in_another_order_are_named_as_a_circle():
    # 0 waits for 1 on tp, 1 for 3 on dp_cp, 3 for 2 on tp, 2 for 0 on dp_cp.
    assert who_waits_for_whom(OTHER_ORDER) == {0: {1}, 1: {3}, 3: {2}, 2: {0}}
    verdict = judge(OTHER_ORDER)
    assert verdict.ranks == (0, 1, 2, 3)
    assert verdict.lines[0] == "ranks wait for each other:"
    assert "rank 1 (host0, process 1001) waits in all_reduce 3 on dp_cp for 20 s" in "\n".join(
        verdict.lines
    )


def test_collectives_of_other_sizes_are_named():
    short = waits(3, "world", 8)
    short = replace(short, collectives=at(3, False, num_bytes=32, world=8))
    verdict = judge([*ALL_THERE[:3], short])
    assert verdict.ranks == (3,), verdict.lines
    assert "all_reduce of 32 bytes: rank 3" in verdict.lines[1]


def test_a_node_that_does_not_answer_comes_first():
    assert judge(ALL_THERE[:2], ["node 1"]).lines == ("node 1 does not answer",)


def test_a_message_that_both_sides_wait_for_blames_nobody():
    verdict = judge([pairs(0, "send", 1), pairs(1, "recv", 0)])
    assert verdict.ranks == (), verdict.lines
    assert "nobody is missing" in verdict.lines[0]


# ---------------------------------------------------------------- when it is one


def silent(seconds: float, **values) -> list[RankView]:
    return [replace(view, silence=seconds, **values) for view in STUCK_READER]


def test_silence_ends_the_run_after_the_limit():
    assert not is_standing(silent(29), 30)
    assert is_standing(silent(30), 30)


def test_one_rank_that_lives_keeps_the_run():
    views = silent(300)
    views[2] = replace(views[2], silence=1.0)
    assert not is_standing(views, 30)


def test_three_times_the_usual_silence_is_waited_for():
    assert not is_standing(silent(59, longest_gap=20.0), 30)
    assert is_standing(silent(60, longest_gap=20.0), 30)


def test_a_slow_activity_of_one_rank_has_its_time():
    views = silent(200)
    views[0] = replace(views[0], patience=540.0, activity="saving")
    assert not is_standing(views, 30)
    assert is_standing([replace(view, silence=541.0) for view in views], 30)


def test_a_stopped_rank_is_found_also_in_a_slow_activity():
    views = silent(5, patience=540.0)
    views[1] = replace(views[1], stopped_seconds=30.0)
    assert is_standing(views, 30)


def test_a_network_that_stands_has_the_time_of_what_is_slow():
    """It may come back, and no rank is at fault; a device that stands does not come back."""
    views = [replace(view, silence=60.0) for view in ALL_THERE]
    assert not is_standing(views, 30)
    assert is_standing([replace(view, silence=541.0) for view in views], 30)
    on_devices = [replace(ON_DEVICES[0], rank=rank, silence=31.0) for rank in WORLD]
    assert is_standing(on_devices, 30)


def test_a_negative_limit_which_the_plan_refuses_ends_nothing_before():
    views = [replace(view, watchdog_seconds=-1.0) for view in silent(0)]
    assert silence_limit(views) == 0  # as where the watchdog is off


def test_ranks_that_start_are_not_silent():
    views = silent(500)
    views[1] = replace(views[1], watchdog_seconds=None)
    assert not is_standing(views, 30)


def test_a_line_says_what_takes_long_but_not_of_a_step():
    views = [replace(view, activity="making the plan", patience=math.inf) for view in silent(500)]
    (line,) = describe_slow(views)
    assert line == f"this takes long: {len(views)} ranks making the plan for 21 s"
    assert not is_standing(views, 30), "an index takes as long as it takes"
    assert describe_slow(silent(500)) == []


def test_a_line_says_for_whom_ranks_wait():
    (line,) = describe_wait_of_all(STUCK_READER, [])
    assert line.startswith("ranks wait in all_reduce 8 on world for 20 s: rank 3 (host1, process")
    assert describe_wait_of_all([busy(rank) for rank in WORLD], []) == []
