"""The balance benchmark at toy size: what it draws, bounds, times and judges."""

import itertools

import numpy as np
import pytest

from data.dealing import StepShape
from data.document_cost import DocumentCost
from model.config import ModelConfig
from model.presets import PRESETS
from pretrain.planner.model_size import document_cost_of
from tools.bench.balance import PACKINGS, Arguments, find_problem, job_of
from tools.bench.balance_documents import LONG_FROM, draw_long, make_stream
from tools.bench.balance_estimate import (
    Documents,
    DrawnSamples,
    draw,
    least_of_any_dealing,
    time_dealing,
    waits_of,
)
from tools.bench.balance_report import TimedJob, describe
from tools.bench.balance_step import DEALT, IN_ORDER, MODELS, run_processes


def test_the_stream_has_the_asked_share_of_its_tokens_in_long_documents():
    lengths = make_stream(50_000_000, 0.34, seed=1).lengths
    long = draw_long(17_000_000, 256 * 1024, seed=1)
    assert lengths.sum() == pytest.approx(50e6, rel=0.05)
    assert long.sum() == pytest.approx(17e6, rel=0.02)
    assert long.min() >= LONG_FROM and long.max() <= 256 * 1024
    # Beside them there are the longest of the lognormal ones.
    assert 0.32 < lengths[lengths >= LONG_FROM].sum() / lengths.sum() < 0.42


@pytest.mark.parametrize("seed", range(5))
def test_no_dealing_of_a_small_step_waits_for_less_than_the_bound(seed):
    costs = np.random.default_rng(seed).lognormal(size=6)
    shape = StepShape(dp_size=2, num_microbatches=3, micro_batch_size=1, meeting="microbatch")
    least = min(shape.waits(costs[list(order)]) for order in itertools.permutations(range(6)))
    assert least_of_any_dealing(costs, shape) == pytest.approx(least)


def test_waits_are_those_of_a_count_by_hand():
    """Two steps of two microbatches on two ranks; dealt, the costly two share a microbatch."""
    costs = np.array([5.0, 1, 1, 5, 1, 1, 1, 1])
    drawn = DrawnSamples(Documents(1024, 0.0), costs, np.full(8, 2.0))
    found = waits_of(drawn, 2, 2)
    assert found.steps == 2
    # In order 5 + 5 and 1 + 1, dealt 5 + 1 and 1 + 1; of means 6 and 2.
    assert found.in_order == pytest.approx(12 / 8)
    assert found.dealt == found.least_dealt == found.met_once == pytest.approx(8 / 8)
    assert found.even == 1.0


def test_samples_are_drawn_as_they_are_packed():
    drawn = draw(Documents(64 * 1024), 1024, 16, seed=1)
    assert drawn.packed.shape == drawn.even.shape == (1024,)
    # Steps whose samples cost alike, though the samples of different steps do not.
    spread, spread_of_steps = (
        np.ptp(costs.reshape(-1, 16), axis=1).mean() for costs in (drawn.packed, drawn.even)
    )
    assert spread_of_steps < 0.1 * spread


def test_the_timed_models_have_the_attention_that_they_stand_for():
    from tools.bench.balance_estimate import cost_of_8b

    def share_of(cost: DocumentCost, length: int) -> float:
        return float(cost.of_documents(np.array([length]))[0]) / (cost.per_token * length)

    length = 32 * 1024
    tiny = document_cost_of(ModelConfig(**PRESETS["tiny"]), 8192)
    expected = {
        "32K": share_of(cost_of_8b(), length),
        "128K": share_of(cost_of_8b(), 4 * length),
        "tiny": share_of(tiny, length),
    }
    found = {name: share_of(model.cost, length) for name, model in MODELS.items()}
    assert found == pytest.approx(expected, rel=0.02)


def test_dealing_is_timed_on_the_loaders_own_parts():
    for packing in PACKINGS:
        found = time_dealing(packing, samples=64, seq_length=8192, repeats=3, seed=1)
        assert 200 < found["documents"] < 2000
        assert len(found["seconds"]) == 3 and min(found["seconds"]) <= found["median"]


@pytest.mark.long
def test_both_dealings_are_timed_and_described():
    """`time_steps` itself refuses losses that differ."""
    arguments = Arguments(processes=(2,), seq_length=512, steps=2)
    job = job_of(arguments, "128K", 2)
    times = run_processes(job)
    assert set(times) == {IN_ORDER, DEALT}
    for found in times.values():
        assert len(found.seconds) == len(found.cpu_seconds) == len(found.imbalance) == 2
        assert min(found.seconds) > 0 and min(found.cpu_seconds) > 0
    pairs = zip(times[DEALT].imbalance, times[IN_ORDER].imbalance, strict=True)
    assert all(1 <= dealt <= in_order for dealt, in_order in pairs)
    waits = [waits_of(draw(Documents(8192), 32, 2 * count, seed=1), 2, count) for count in (1, 4)]
    dealing = {"concat": {"documents": 7, "seconds": [0.06, 0.04, 0.03], "median": 0.04}}
    text = describe("a machine", [TimedJob("128K", job, times)], waits, dealing)
    assert "attention as 8B at 128K, 2 data ranks: dealt / in order" in text
    assert "concat: s of dealing a step: 0.040, bar 0.05: reached" in text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps = 0: must be at least 1"),
        ({"models": ("8B",)}, "models = 8B: is not known. Fix: 32K, 128K, tiny."),
        ({"processes": (0,)}, "processes = (0,): must be at least 1 each"),
        ({"dp_sizes": ()}, "dp_sizes = (): must be at least 1 each. Fix: 16 64."),
        ({"dealt_samples": 1000}, "dealt_samples = 1000: the step that is dealt has 16 samples"),
        ({"samples": 512}, "samples = 512: a step has 16 microbatches on 64 ranks. Fix: at least"),
    ],
)
def test_what_cannot_be_measured_is_said(changes, message):
    assert str(find_problem(Arguments(**changes))).startswith(message)
    assert find_problem(Arguments()) is None
