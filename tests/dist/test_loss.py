"""The loss over a vocabulary split over tp, in blocks of rows: each block has its exchanges."""

from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from model import loss
from model.loss import LossSettings, fused_loss, score_each
from parallel.config import LayoutConfig
from parallel.layout import World, build_layout

VOCABULARY = 21
"""The weight has 24 rows: the last rank of two has three of padding."""
CAP = 0.9


def inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(24, 8, generator=generator, dtype=torch.float64)
    labels = torch.arange(30) % VOCABULARY
    labels[::7] = loss.IGNORED_LABEL
    return x, weight, labels


def loss_of_rank(world: World, block: int, cap: float | None) -> dict:
    tp = build_layout(LayoutConfig(tensor_model_parallel_size=world.size), world).tp
    x, weight, labels = inputs()
    own = weight.chunk(tp.size)[tp.rank].clone().requires_grad_()
    x.requires_grad_()
    settings = LossSettings(tp, VOCABULARY, 13, cap)
    with mock.patch.object(loss, "BLOCK_LOGITS", block):
        found = fused_loss(x, own, labels, 1.0, settings)
        grad_x, grad_weight = torch.autograd.grad(found, (x, own))
        with torch.no_grad():
            losses, hits = score_each(x, own, labels, settings)
    return {
        "loss": found.detach(),
        "x": grad_x,
        "weight": grad_weight,
        "losses": losses,
        "hits": hits,
    }


@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("block", [1, 5 * 12, 2**21])
def test_blocks_of_rows_are_the_cross_entropy_on_every_tp_rank(pool, block, cap):
    ranks = pool.run(loss_of_rank, 2, block, cap)
    x, weight, labels = (a.requires_grad_(a.is_floating_point()) for a in inputs())
    logits = (x @ weight.T)[:, :VOCABULARY]
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    losses = F.cross_entropy(logits, labels, ignore_index=loss.IGNORED_LABEL, reduction="none")
    grad_x, grad_weight = torch.autograd.grad(losses.sum(), (x, weight))
    tolerance = dict(rtol=1e-12, atol=1e-13)
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], losses.sum().detach(), **tolerance)
        torch.testing.assert_close(rank["losses"], losses.detach(), **tolerance)
        assert torch.equal(rank["hits"], logits.argmax(1) == labels)
    # Each rank has its part of the gradient of x, and its rows of the weight's.
    torch.testing.assert_close(sum(rank["x"] for rank in ranks), grad_x, **tolerance)
    torch.testing.assert_close(torch.cat([rank["weight"] for rank in ranks]), grad_weight, **tolerance)
