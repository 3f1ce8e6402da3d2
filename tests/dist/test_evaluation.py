"""Evaluations give on any layout what one process gives, in fp64: scores per microbatch, context gain, passkey."""

import dataclasses

import numpy as np
import pytest
import torch

from parallel.layout import Axis
from parallel.tensor import vocab_parallel_first_choices
from tests.dist.parity import TOLERANCE, Case

UNTIED = dict(untie_embeddings_and_output_weights=True)
LAYOUTS = {
    "tp2 dp2": Case(tp=2, dp=2),
    "pp2 cp2": Case(pp=2, cp=2),
    "pp2 ZBV": Case(pp=2, schedule="ZBV", model=dict(num_layers=5)),
    "pp2 ZBV dp2": Case(pp=2, dp=2, schedule="ZBV", model=dict(num_layers=5) | UNTIED),
    "pp2 interleaved": Case(pp=2, schedule="interleaved", model=dict(num_layers=5)),
    "pp2 zero-bubble": Case(pp=2, schedule="zero-bubble"),
    "cp4 two levels": Case(cp=4, context_levels=(2, 2)),
    "tp2 sequence parallel zero3": Case(tp=2, dp=2, sequence_parallel=True, strategy="optim_grads_params"),
}


def score(world, case: Case) -> dict:
    """The scores of the first global batch, the loss that training would see, and in one process a count by hand."""
    layout, stages, _, stepper, loader = case.build(world)
    batches = loader.read(0)
    scores = stepper.score(batches)
    result = {"scores": (scores.loss_sums, scores.num_targets, scores.first_choices),
              "run": stepper.run(batches, train=False)}
    if world.size == 1:
        with torch.no_grad():
            logits = [stages[0].logits(stages[0].hidden(torch.empty(0), batch)) for batch in batches]
        result["by_hand"] = [int((row.argmax(dim=1) == batch.labels).sum())
                             for row, batch in zip(logits, batches, strict=True)]
    return result


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_equal_one_process(pool, name):
    case = dataclasses.replace(LAYOUTS[name], samples=32)  # an untrained model is right about once in 101 targets
    (expected,) = pool.run(score, 1, case.single())
    sums, targets, hits = expected["scores"]
    assert len(sums) == case.samples and hits.tolist() == expected["by_hand"] and 0 < hits.sum() < targets.sum()
    assert abs(sums.sum() / targets.sum() - expected["run"][0]) < TOLERANCE * expected["run"][0]
    for result in pool.run(score, case.world_size, case):
        assert np.abs(result["scores"][0] - sums).max() < TOLERANCE * sums.max()
        assert np.array_equal(result["scores"][1], targets) and np.array_equal(result["scores"][2], hits)


def first_choices(world, logits: np.ndarray) -> list[int]:
    tp = Axis("tp", world.rank, world.size, tuple(range(world.size)), torch.distributed.group.WORLD)
    part = torch.from_numpy(logits).chunk(world.size, dim=1)[world.rank].to(torch.bfloat16)
    return vocab_parallel_first_choices(part, tp).tolist()


def test_of_equal_logits_the_first_id_wins_and_padding_never(pool):
    low = float("-inf")
    logits = np.array([[0, 1, 1, 0, 1, 0, low, low], [3, 0, 0, 0, 0, 0, low, low], [-9, -9, -9, -9, -9, -8, low, low],
                       [-5, -5, -5, -5, -5, -5, low, low]])
    assert pool.run(first_choices, 4, logits) == [[1, 0, 5, 0]] * 4
