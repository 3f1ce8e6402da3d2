"""Attention backends on a GPU: against the definition, for queries that continue a document, and for leaks."""

import pytest
import torch

from model.kernels import BACKENDS, choose_attention, make_segments
from parallel.context import group_pieces
from tests.unit.test_model import masked_attention

pytestmark = pytest.mark.gpu
BOUNDS = [0, 1, 7, 128, 512, 513, 1024]
HEADS, HEAD_SIZE = 8, 64


def backend(name: str):
    """The backend in bf16 on the GPU, or a skip that says what is missing."""
    device = torch.device("cuda")
    missing = BACKENDS[name].missing(device, torch.bfloat16)
    if missing:
        pytest.skip(missing)
    return choose_attention(name, device, torch.bfloat16)[0]


def inputs(kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BOUNDS[-1], heads, HEAD_SIZE, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
            for heads in (HEADS, kv_heads, kv_heads)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_equals_the_definition(name, kv_heads, groups):
    """Output and gradients, also where a document has more keys than queries; bf16 rounds to about 0.4 %."""
    attend, qkv = backend(name), inputs(kv_heads)
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    expected = masked_attention(*exact, cu_seqlens.cuda())
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), exact)
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in qkv]
    for group in range(groups):
        pieces = group_pieces(BOUNDS[-1], group, groups)
        rows = torch.cat([torch.arange(a, b) for a, b in pieces]).cuda()
        q = qkv[0][rows]
        found = torch.cat([attend(q[part.queries], qkv[1][part.keys], qkv[2][part.keys], part)
                           for part in make_segments(cu_seqlens, pieces, qkv[0].device)])
        assert relative(found, expected[rows]) < 0.01
        for total, grad in zip(grads, torch.autograd.grad((found.float() * weight[rows]).sum(), qkv), strict=True):
            total += grad
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert relative(grad, wanted) < 0.02


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_keeps_documents_apart_bit_for_bit(name):
    attend, (q, k, v) = backend(name), inputs(2)
    (segments,) = make_segments(torch.tensor(BOUNDS, dtype=torch.int32), [(0, BOUNDS[-1])], q.device)
    with torch.no_grad():
        before = attend(q, k, v, segments).clone()
        for x in (q, k, v):
            x[200] += 1
        changed = (attend(q, k, v, segments) != before).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert changed and min(changed) >= 200 and max(changed) < 512
