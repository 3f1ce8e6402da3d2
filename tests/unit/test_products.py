"""Products: which library computes them, and that it takes whatever a layer gives it."""

from collections import Counter
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

PRODUCTS = ("_linear_pointwise", "mm", "addmm_")


class Operators(TorchDispatchMode):
    """Notes the operators that run, and counts the products among them."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name in PRODUCTS:
            self.counts[name] += 1
        return func(*args, **kwargs or {})


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def operators_of(run: Callable[[], object]) -> set[str]:
    with Operators() as operators:
        run()
    return operators.names & set(PRODUCTS)


onednn_only = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"
)


@onednn_only
def test_onednn_multiplies_fp32_where_there_is_no_gradient_to_keep():
    weight = torch.nn.Parameter(randn(6, 4, seed=0))
    x = randn(3, 4, seed=1)
    assert operators_of(lambda: linear(x, weight)) == {"mm"}
    with torch.no_grad():
        assert operators_of(lambda: linear(x, weight)) == {"_linear_pointwise"}
        assert operators_of(lambda: linear(x.double(), weight.double())) == {"mm"}
        assert operators_of(lambda: linear(x.to("meta"), weight.to("meta"))) == {"mm"}


@onednn_only
@pytest.mark.parametrize("tiles", [1, 2])
def test_the_mlp_takes_it_for_all_but_the_gradients_of_weights(tiles):
    x = randn(4, 8, seed=1).requires_grad_()
    weights = [randn(*shape, seed=2).requires_grad_() for shape in ((6, 8), (6, 8), (8, 6))]
    counted = Operators()
    with counted:
        out = gated_mlp(x, *weights, tiles)
    # Gate, up and down.
    assert counted.counts == {"_linear_pointwise": 3 * tiles}
    counted = Operators()
    with counted:
        torch.autograd.grad(out, [x, *weights], torch.ones_like(out))
    # Of each tile the gradients of the gated and, twice, of x; several compute gate and up again.
    again = 2 if tiles > 1 else 0
    assert counted.counts["_linear_pointwise"] == (3 + again) * tiles
    assert counted.counts["mm"] + counted.counts["addmm_"] == 3 * tiles


@onednn_only
def test_the_loss_takes_it_for_the_logits_and_the_gradient_of_its_input():
    x = randn(4, 8, seed=1).requires_grad_()
    weight = randn(6, 8, seed=2).requires_grad_()
    settings = LossSettings(Axis("tp", 0, 1, (0,), None), vocab_size=6, chunk_tokens=2)
    labels = torch.zeros(4, dtype=torch.long)
    counted = Operators()
    with counted:
        fused_loss(x, weight, labels, 1.0, settings)
    # Two chunks.
    assert counted.counts == {"_linear_pointwise": 4, "addmm_": 2}


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


def test_a_product_is_never_repeated_to_fill_its_place():
    row = randn(1, 3, seed=1)
    with pytest.raises((AssertionError, RuntimeError)):
        write_products(torch.zeros(4, 5), (row, randn(3, 5, seed=2)))
    with pytest.raises((AssertionError, RuntimeError)):
        write_products(torch.zeros(1, 5, dtype=torch.float64), (row, randn(3, 5, seed=2)))


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
