"""What documents cost: equal to the model's own count of pairs and floating-point operations."""

import json

import numpy as np
import pytest

from data.document_cost import DocumentCost
from model.config import ModelConfig
from model.windows import mean_pairs_seen
from pretrain.planner.model_size import ModelSize, document_cost_of

LENGTHS = np.array([1, 2, 3, 7, 8, 9, 100, 1000])
WINDOWED = dict(window_size=[7, 0], window_attn_skip_freq=[3])


def small_model(**fields) -> ModelConfig:
    return ModelConfig(
        hidden_size=16, num_layers=6, num_attention_heads=2, ffn_hidden_size=24, **fields
    )


def count_pairs(length: int, window: int | None) -> int:
    """Count one by one how many tokens each token of a document sees."""
    limit = length if window is None else window
    return sum(min(token, limit) for token in range(1, length + 1))


@pytest.mark.parametrize("window", [None, 1, 8, 5000])
def test_pairs_are_those_that_one_counts(window):
    cost = DocumentCost(0.0, 0.0, 1.0, ((window, 1),))
    assert cost.of_documents(LENGTHS).tolist() == [count_pairs(n, window) for n in LENGTHS]


@pytest.mark.parametrize("fields", [{}, WINDOWED])
def test_costs_are_the_flops_of_the_models_own_formula(fields):
    config = small_model(**fields)
    size = ModelSize(config, 64)
    cost = document_cost_of(config, 64)
    flops = [
        size.step_flops(int(n), float(mean_pairs_seen(np.array([n]), config.windows)[0]))
        for n in LENGTHS
    ]
    plain = cost.of_documents(LENGTHS) - cost.per_document
    np.testing.assert_allclose(plain, flops, rtol=1e-14)


def test_a_document_costs_the_tiles_that_kernels_compute_for_it_on_average():
    """Lengths of every kind, in causal tiles of 128 x 128: all that tokens do not explain."""
    lengths = np.arange(1, 100_000)
    share = lengths**2 * np.exp(-lengths / 700)
    share /= share.sum()
    # A row of tiles reaches to its last query, and the last row may have few of them.
    rows = -(-lengths // 128)
    computed = 128**2 * rows * (rows + 1) / 2
    seen = lengths * (lengths + 1) / 2
    # A query computes 63.5 pairs on average that lie beyond it in its tile; the 63.5 queries that
    # the last row lacks on average compute a pair with each token.
    for_tokens = 127 * lengths
    for_document = float((share * (computed - seen - for_tokens)).sum())
    config = small_model()
    cost = document_cost_of(config, 64)
    assert cost.per_document / config.num_layers / cost.per_pair == pytest.approx(
        for_document, rel=0.015
    )


def test_a_sample_costs_the_sum_of_its_documents():
    cost = document_cost_of(small_model(**WINDOWED), 64)
    begins = np.array([0, 3, 3, 8])
    each = cost.of_documents(LENGTHS)
    expected = [each[:3].sum(), 0.0, each[3:].sum()]
    np.testing.assert_allclose(cost.of_samples(LENGTHS, begins), expected, rtol=1e-14)


def test_coefficients_survive_json():
    cost = document_cost_of(small_model(**WINDOWED), 64)
    assert cost.windows == ((8, 4), (None, 2))
    assert DocumentCost.from_json(json.loads(json.dumps(cost.to_json()))) == cost
