"""pretrain/logs/slow_ranks.py: a rank that is slower than its equals is named once."""

import pytest
import torch

from parallel.layout import single_process_layout
from pretrain.logs import slow_ranks
from pretrain.logs.slow_ranks import SlowRanks, compare


def test_only_a_clear_difference_to_equals_counts():
    assert compare([1.0, 1.0, 1.19, 1.0], 4) == {}
    assert compare([1.0, 1.0, 1.3, 1.0], 4) == {2: 1.3}
    # Milliseconds are noise, also where they are a large part.
    assert compare([0.001, 0.001, 0.009, 0.001], 4) == {}
    # Stages differ by their layers: a rank is compared with those of its own.
    assert compare([1.0, 1.0, 2.0, 2.0], 2) == {}
    assert compare([1.0, 1.5, 2.0, 2.0], 2) == {1: 1.5}


@pytest.fixture
def said(monkeypatch):
    monkeypatch.setattr(slow_ranks, "warn", lambda text: None)
    return []


def note(ranks: SlowRanks, said: list, busy: list[float], times: int) -> None:
    for _ in range(times):
        ranks.note(busy, lambda kind, text: said.append((kind, text)))


def ranks_of_four() -> SlowRanks:
    ranks = SlowRanks(single_process_layout(torch.device("cpu")))
    ranks.ranks_per_stage = 4
    return ranks


def test_a_slow_rank_is_named_within_twenty_steps_once_and_when_it_is_well_again(said, monkeypatch):
    ranks = ranks_of_four()
    monkeypatch.setattr(ranks, "_hosts", lambda: ["a"] * 4)
    note(ranks, said, [1.0] * 4, 30)
    assert said == []
    note(ranks, said, [1.0, 1.0, 1.0, 2.0], 10)
    assert said == []
    note(ranks, said, [1.0, 1.0, 1.0, 2.0], 10)
    (slow,) = said
    assert slow[0] == "slow rank"
    assert slow[1].startswith("rank 3 (a) is slow: 2.0 x the time of its equals in 11 of the last")
    note(ranks, said, [1.0, 1.0, 1.0, 2.0], 100)
    assert len(said) == 1, "it is said once"
    note(ranks, said, [1.0] * 4, 20)
    assert [kind for kind, _ in said] == ["slow rank", "rank well again"]


def test_a_rank_that_is_slow_now_and_then_is_not_named(said, monkeypatch):
    ranks = ranks_of_four()
    monkeypatch.setattr(ranks, "_hosts", lambda: ["a"] * 4)
    for _ in range(20):
        note(ranks, said, [1.0, 3.0, 1.0, 1.0], 1)
        note(ranks, said, [1.0, 1.0, 1.0, 1.0], 1)
    assert said == []
