"""The benchmark of the optimizers: what it refuses, and how it reads the runs' losses."""

import pytest

from tools.bench.optimizers import (
    Arguments,
    Curve,
    describe_losses,
    describe_steps,
    find_problem,
    time_optimizers,
)


def curve(losses: list[float]) -> Curve:
    return Curve([10 * (step + 1) for step in range(len(losses))], losses)


def test_losses_are_averaged_before_they_are_compared():
    # 40 steps: windows of two.
    adam = curve([8.0 - 0.1 * step for step in range(40)])
    muon = curve([8.0 - 0.2 * step for step in range(40)])
    assert adam.smoothed()[-1] == pytest.approx(4.15)
    # Averaged, Muon's loss is 4.1 after its steps 20 and 21: the first value at most 4.15.
    assert muon.tokens_to(adam.smoothed()[-1]) == 210
    assert adam.tokens_to(0.0) is None
    lines = describe_losses({1: (adam, muon), 2: (muon, adam)})
    assert "in 1 of 2 runs, after 0.53 of its tokens" in lines[-1]
    assert "never" in lines[1]


def test_the_bar_is_the_ratio_of_medians():
    lines = describe_steps({"adam": [1.0, 2.0, 9.0], "muon": [2.2, 2.0, 2.4]}, 8192, "float32")
    assert "1.100, bar 1.15: reached" in lines[-1]


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"repeats": 0}, "--repeats 0: must be at least 1. Fix: give 1 or more."),
        ({"tokens": 1}, "--tokens 1: a document needs 2 tokens."),
        ({"quickstart": "/nowhere"}, "--quickstart /nowhere: has no data/corpus.idx. Fix: "),
    ],
)
def test_bad_options_are_refused(changes, text):
    assert text in (find_problem(Arguments(**changes)) or "")


def test_both_optimizers_are_timed_in_turns():
    found = time_optimizers(tokens=16, dtype="float32", repeats=1)
    assert {name: len(times) for name, times in found.items()} == {"adam": 1, "muon": 1}
