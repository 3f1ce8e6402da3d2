"""The benchmark's counting of every token, on a small corpus: random phases, packings, blends,
layouts, restarts."""

import pytest

from data.packing import best_fit
from data.packing.concat import Concat
from data.packing.place import Place
from tools.bench import exactly_once


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3, 4))]
)
def test_random_phases_draw_each_token_once(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(best_fit, "WINDOW_BINS", 16)
    outcome = exactly_once.run(tmp_path, tokens=200_000, seed=seed, longest=4096)
    assert outcome.problems == []
    assert outcome.drawn > 150_000 and outcome.restarts > 3 and outcome.phases > 10


def test_the_count_can_fail(tmp_path, monkeypatch):
    """A place that is off by a token is noticed."""
    after = Concat.after
    monkeypatch.setattr(
        Concat,
        "after",
        lambda self, samples: Place(after(self, samples).position + 1, after(self, samples).held),
    )
    assert exactly_once.run(tmp_path, tokens=200_000, seed=1, longest=4096).problems
