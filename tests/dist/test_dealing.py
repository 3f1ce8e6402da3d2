"""Samples dealt by their cost give the step that they give in their order, on every layout."""

import dataclasses

import numpy as np
import pytest

from data.dealing import Dealt
from parallel.config import LayoutConfig
from parallel.layout import build_layout
from pretrain.processes.agreement import Refused
from tests.dist.parity import Case, relative_error, run_built
from tests.marks import cases
from tests.measuring import measured

CASES = {
    "dp2 pp2 zero1": Case(dp=2, pp=2, strategy="optim", meeting="step", samples=16),
    "dp4 micro2": Case(dp=4, micro_batch_size=2, meeting="microbatch", samples=16),
    "dp4 zero3": Case(dp=4, strategy="optim_grads_params", meeting="microbatch", samples=16),
    "dp2 pp2 cp2": Case(dp=2, pp=2, cp=2, meeting="step", samples=16),
    "dp2 pp2 cp2 zero3": Case(
        dp=2, pp=2, cp=2, strategy="optim_grads_params", meeting="microbatch", samples=16
    ),
}
ALWAYS = ("dp2 pp2 zero1", "dp4 micro2")
TOLERANCE = 1e-12
"""Only the order of sums differs."""


def run_dealt(world, case: Case) -> dict:
    built = case.build(world)
    loader = built[-1]
    digests = sum(batch.digest for batch in loader.read(0))
    return run_built(case, built) | {"slots": loader.dealt.slots.tolist(), "digest": digests}


def compare_deals(world, differs: bool) -> str:
    """What the exchange after a step says where the last rank found samples dealt otherwise."""
    layout = build_layout(LayoutConfig(), world)
    slots = np.arange(8)
    if differs and world.rank == world.size - 1:
        slots[[0, 1]] = slots[[1, 0]]
    try:
        measured([], layout, deal_hash=Dealt(slots).hash)
    except Refused as refused:
        return str(refused)
    return ""


def test_a_rank_that_deals_otherwise_ends_the_run_on_all_ranks(pool):
    assert pool.run(compare_deals, 2, False) == ["", ""]
    for text in pool.run(compare_deals, 2, True):
        assert text.startswith("balance = deal: ranks gave the samples") and "Fix: " in text


@pytest.mark.parametrize("name", cases(CASES, lambda name: name not in ALWAYS))
def test_dealing_changes_no_loss_no_gradient_and_no_weight(pool, name):
    case = CASES[name]
    dealt = pool.run(run_dealt, case.world_size, case)
    in_order = pool.run(run_dealt, case.world_size, dataclasses.replace(case, meeting=None))
    slots = dealt[0]["slots"]
    assert slots != sorted(slots) == in_order[0]["slots"], "samples did change places"
    assert all(result["slots"] == slots for result in dealt), "every rank deals alike"
    # The sum of all slices' digests says what the step held.
    first, second = (sum(result["digest"] for result in run) for run in (dealt, in_order))
    assert first % 2**40 == second % 2**40
    for one, other in zip(dealt, in_order, strict=True):
        assert one["num_targets"] == other["num_targets"]
        for key in ("loss", "grad_norm", "valid"):
            assert abs(one[key] - other[key]) <= TOLERANCE * abs(other[key]), key
        for kind in ("gradients", "weights"):
            for weight, expected in other[kind].items():
                assert relative_error(np.asarray(one[kind][weight]), expected) <= TOLERANCE, weight
