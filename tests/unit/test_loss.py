"""The fused loss beside torch's cross entropy: in chunks of tokens and blocks of rows."""

import pytest
import torch
from torch.nn import functional as F

from data.batch import IGNORE
from model import loss
from model.loss import LossSettings, fused_loss, score
from tests.unit.test_memory_savers import LAYOUT, assert_same, leaves


@pytest.mark.parametrize("block", [1, 3 * 17, 2**21])
@pytest.mark.parametrize("chunk", [1, 7, 30, 2048])
@pytest.mark.parametrize("vocabulary", [17, 13])
def test_the_fused_loss_is_cross_entropy_over_the_real_tokens(
    chunk, vocabulary, block, monkeypatch
):
    monkeypatch.setattr(loss, "BLOCK_LOGITS", block)
    x, weight = leaves((30, 8), (17, 8))
    labels = torch.arange(30) % vocabulary
    labels[::4] = IGNORE
    settings = LossSettings(LAYOUT.tp, vocabulary, chunk)
    found = fused_loss(x, weight, labels, 0.25, settings)
    logits = x @ weight[:vocabulary].T
    assert_same(
        found,
        0.25 * F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"),
        [x, weight],
    )
    with torch.no_grad():
        total, hits = score(x, weight, labels, settings)
    assert torch.allclose(total, 4 * found) and hits == (logits.argmax(1) == labels).sum() > 0


@pytest.mark.parametrize("block", [1, 3 * 17, 2**21])
def test_a_soft_cap_is_taken_by_rows(block, monkeypatch):
    monkeypatch.setattr(loss, "BLOCK_LOGITS", block)
    x, weight = leaves((30, 8), (17, 8))
    labels = torch.arange(30) % 17
    found = fused_loss(x, weight, labels, 1.0, LossSettings(LAYOUT.tp, 17, 7, softcap=0.9))
    logits = 0.9 * torch.tanh(x @ weight.T / 0.9)
    assert_same(found, F.cross_entropy(logits, labels, reduction="sum"), [x, weight])


def test_several_chunks_of_a_bf16_loss_are_summed_up_in_fp32():
    """The sum of 64 parts in bf16 would lose more than the rounding of a single product."""
    x, weight = (a.detach().bfloat16().requires_grad_() for a in leaves((2048, 16), (32, 16)))
    labels = torch.arange(2048) % 32
    at_once, in_parts = (
        torch.autograd.grad(
            fused_loss(x, weight, labels, 1.0, LossSettings(LAYOUT.tp, 32, chunk)), weight
        )[0].double()
        for chunk in (2048, 32)
    )
    logits = x.detach().double() @ weight.detach().double().T
    targets = F.one_hot(labels, 32)
    exact = (logits.softmax(1) - targets).T @ x.detach().double()
    for found in (at_once, in_parts):
        assert (found - exact).abs().max() < 2**-7 * exact.abs().max()


def test_a_loss_without_targets_is_zero_with_gradients_of_zero():
    x, weight = leaves((6, 8), (17, 8))
    found = fused_loss(x, weight, torch.full((6,), IGNORE), 1.0, LossSettings(LAYOUT.tp, 17, 4))
    assert found == 0 and all((grad == 0).all() for grad in torch.autograd.grad(found, [x, weight]))


def test_the_loss_may_be_asked_twice_for_its_gradient():
    """A schedule that splits the backward does."""
    x, weight = leaves((6, 8), (17, 8))
    found = fused_loss(x, weight, torch.arange(6), 1.0, LossSettings(LAYOUT.tp, 17, 4))
    first, second = (
        torch.autograd.grad(found, [x, weight], torch.tensor(3.0).double(), retain_graph=True)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
