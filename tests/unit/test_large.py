"""More than 2^31 elements in one tensor: what every part gives for the last rows is what it gives
for them alone.

A wrong 32-bit index wraps around silently (mamba#1015, Megatron-LM#1056). bf16, about 18 GB of
memory.
"""

import pytest
import torch

from data.batch import IGNORE
from model.loss import LossSettings, fused_loss
from model.mlp import gated_mlp
from model.pointwise import rms_norm, rotate
from parallel.layout import single_process_layout
from parallel.tensor import vocab_parallel_embedding

pytestmark = pytest.mark.long
WIDTH = 256
ROWS = 2**31 // WIDTH + 8
LAST = slice(ROWS - 8, ROWS)
DTYPE = torch.bfloat16


def large(columns: int = WIDTH) -> torch.Tensor:
    """[ROWS, columns]; the last rows are random, the others repeat a few."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(1024, columns, generator=generator).to(DTYPE)
    x = few.repeat(-(-ROWS // 1024), 1)[:ROWS]
    x[LAST] = torch.randn(8, columns, generator=generator).to(DTYPE)
    return x


def weights(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) / shape[-1] ** 0.5).to(
        DTYPE
    )


def assert_last_rows_as_alone(function, x: torch.Tensor) -> None:
    """Result and input gradient of the last rows, in the large tensor and by themselves."""
    assert x.numel() > 2**31
    alone = x[LAST].clone().requires_grad_()
    expected = function(alone)
    (expected_grad,) = torch.autograd.grad(expected, alone, torch.ones_like(expected))
    expected = expected.detach()
    x.requires_grad_()
    found = function(x)
    assert torch.equal(found[LAST].detach(), expected)
    (grad,) = torch.autograd.grad(found, x, torch.ones_like(found))
    assert torch.equal(grad[LAST], expected_grad)


def test_norm():
    weight = weights(WIDTH) + 1
    assert_last_rows_as_alone(lambda x: rms_norm(x, weight, 1e-5), large())


def test_rotation():
    angles = torch.arange(ROWS)[:, None] % 1000 * torch.linspace(0, 1, 16)
    cos, sin = (
        torch.cat([table, table], dim=1).to(DTYPE) for table in (angles.cos(), angles.sin())
    )

    def function(x):
        rows = LAST if len(x) == 8 else slice(None)
        return rotate(x.view(len(x), -1, 32), cos[rows], sin[rows])

    assert_last_rows_as_alone(function, large())


def test_mlp_in_tiles():
    gate = weights(8, WIDTH)
    up = weights(8, WIDTH)
    down = weights(WIDTH, 8)
    assert_last_rows_as_alone(
        lambda x: gated_mlp(x, gate, up, down, 64 if len(x) > 8 else 1), large()
    )


def test_embedding():
    """The table's rows times its width are beyond 2^31, too."""
    table = large()
    tp = single_process_layout(torch.device("cpu")).tp
    ids = torch.tensor([0, ROWS - 1, ROWS - 8])
    assert torch.equal(vocab_parallel_embedding(ids, table, tp), table[ids])


def test_loss_of_a_sequence_whose_logits_would_be_larger_still():
    x = large()
    weight = weights(64, WIDTH)
    labels = torch.full((ROWS,), IGNORE)
    labels[LAST] = torch.arange(8)
    settings = LossSettings(single_process_layout(torch.device("cpu")).tp, 64, 65536)
    alone = x[LAST].clone().requires_grad_()
    expected = fused_loss(alone, weight, labels[LAST], 1.0, settings)
    (expected_grad,) = torch.autograd.grad(expected, alone)
    found = fused_loss(x.requires_grad_(), weight, labels, 1.0, settings)
    (grad,) = torch.autograd.grad(found, x)
    assert torch.allclose(found, expected) and torch.equal(grad[LAST], expected_grad)
    assert not grad[:-8].any()
