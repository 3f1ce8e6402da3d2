"""Products: which library computes them, and that it does so with any input that a layer gives."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.loss import LossSettings, fused_loss
from model.mlp import gated_mlp
from model.products import (
    joined_linear,
    linear,
    linears_side_by_side,
    multiply,
    write_products,
)
from parallel.layout import Axis


class Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def operators_of(run: Callable[[], object]) -> set[str]:
    with Operators() as operators:
        run()
    return operators.names & {"_linear_pointwise", "mm"}


onednn_only = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"
)


@onednn_only
def test_onednn_multiplies_fp32_on_a_cpu():
    weight = torch.nn.Parameter(randn(6, 4, seed=0))
    x = randn(3, 4, seed=1)
    assert operators_of(lambda: linear(x, weight)) == {"_linear_pointwise"}
    with torch.no_grad():
        assert operators_of(lambda: linear(x, weight)) == {"_linear_pointwise"}
    assert operators_of(lambda: linear(x.double(), weight.double())) == {"mm"}
    assert operators_of(lambda: linear(x.to("meta"), weight.to("meta"))) == {"mm"}


@onednn_only
def test_a_layer_computed_again_for_backward_rounds_as_before():
    """The first pass keeps no graph, the second one does."""
    x = randn(65, 40, seed=2)
    weights = [randn(rows, 40, seed=rows) for rows in (16, 8, 8)]
    with torch.no_grad():
        first = joined_linear(x, weights, None)
        one = linear(x, weights[0])
    for weight in weights:
        weight.requires_grad_()
    assert torch.equal(joined_linear(x, weights, None), first)
    assert torch.equal(linear(x, weights[0]), one)


def one_by_one(x, weights, bias):
    parts = bias.split([len(weight) for weight in weights]) if bias is not None else [None] * 2
    return torch.cat([linear(x, *each) for each in zip(weights, parts, strict=True)], dim=1)


@pytest.mark.parametrize("product", [joined_linear, one_by_one])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_products_are_right(product, with_bias):
    x = randn(65, 40, seed=2).requires_grad_()
    weights = [randn(rows, 40, seed=rows).requires_grad_() for rows in (16, 8)]
    bias = randn(24, seed=5).requires_grad_() if with_bias else None
    inputs = [each for each in (x, *weights, bias) if each is not None]
    found = product(x, weights, bias)
    # By autograd, in fp64.
    wide_x, *wide_weights = wide = [each.detach().double().requires_grad_() for each in inputs]
    expected = wide_x @ torch.cat(wide_weights[:2]).T
    if with_bias:
        expected = expected + wide[-1]
    assert_close(found, expected)
    grad = randn(65, 24, seed=6)
    wanted = torch.autograd.grad(expected, wide, grad.double())
    for one, other in zip(torch.autograd.grad(found, inputs, grad), wanted, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_are_written_where_they_are_asked_for(dtype):
    pairs = [(randn(7, k, seed=k).to(dtype), randn(k, 5, seed=9).to(dtype)) for k in (3, 4)]
    exact = sum(left.double() @ right.double() for left, right in pairs)
    out = torch.full((9, 5), float("nan"), dtype=dtype)
    write_products(out[1:8], *pairs)
    tolerance = dict(rtol=2e-2, atol=5e-2) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(out[1:8], exact.to(dtype), **tolerance)
    assert out[[0, 8]].isnan().all()
    torch.testing.assert_close(
        multiply(*pairs[0]), (pairs[0][0].double() @ pairs[0][1].double()).to(dtype), **tolerance
    )


@onednn_only
def test_functions_with_a_backward_of_their_own_take_it_too():
    x = randn(4, 8, seed=1)
    gate = randn(6, 8, seed=2).requires_grad_()
    down = randn(8, 6, seed=3).requires_grad_()
    for tiles in (1, 2):
        found = operators_of(lambda tiles=tiles: gated_mlp(x, gate, gate, down, tiles))
        assert "_linear_pointwise" in found
    settings = LossSettings(Axis("tp", 0, 1, (0,), None), vocab_size=6, chunk_tokens=4)
    labels = torch.zeros(4, dtype=torch.long)
    assert "_linear_pointwise" in operators_of(lambda: fused_loss(x, gate, labels, 1.0, settings))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [0, 1, 3, 65])
def test_products_are_right(tokens):
    """Rows cut out of a wider tensor, and a weight cut out of a longer one."""
    x = randn(tokens, 40, seed=2)[:, 3:35]
    weights = [randn(30, 32, seed=3)[4:20], randn(8, 32, seed=4)]
    bias = randn(24, seed=5)
    without_bias = x.double() @ torch.cat(weights).double().T
    assert_close(linears_side_by_side(x, weights, bias), without_bias + bias)
    one = linear(x, weights[0], bias[:16])
    other = linear(x, weights[1], bias[16:])
    assert_close(torch.cat([one, other], dim=1), without_bias + bias)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_are_rows_of_one_tensor_take_one_product(dtype):
    joined = randn(40, 32, seed=6).to(dtype)
    weights = joined[3:27].split([16, 2, 6])
    x = randn(5, 32, seed=7).to(dtype)
    expected = x.double() @ joined[3:27].double().T
    for product in (linears_side_by_side, joined_linear):
        with Operators() as operators:
            found = product(x, weights, None)
        assert "cat" not in operators.names
        assert_close(found.float(), expected)
    # Not in their order, with a gap, and of two tensors.
    others = [
        weights[::-1],
        [weights[0], weights[2]],
        [weights[0], randn(40, 32, seed=8).to(dtype)[19:]],
    ]
    for separate in others:
        with Operators() as operators:
            found = linears_side_by_side(x, separate, None)
        assert "cat" in operators.names
        assert_close(found.float(), x.double() @ torch.cat(list(separate)).double().T)
