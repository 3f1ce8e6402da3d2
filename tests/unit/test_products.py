"""Products of a few tokens while a model generates: which library computes them, and that it does
so with any input that a layer gives it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.products import FEW_TOKENS, joined_linear, linear, linears, linears_side_by_side


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


def goes_through_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    with Operators() as operators:
        linear(x, weight)
        linears(x, [weight, weight])
    found = operators.names & {"mkldnn_linear", "mm"}
    assert len(found) == 1, found
    return found == {"mkldnn_linear"}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_onednn_multiplies_a_few_fp32_tokens_that_nothing_is_trained_on():
    weight = randn(6, 4, seed=0)
    few = randn(FEW_TOKENS, 4, seed=1)
    trained = torch.nn.Parameter(weight)
    with torch.no_grad():
        assert goes_through_onednn(few, weight)
        assert not goes_through_onednn(randn(FEW_TOKENS + 1, 4, seed=1), weight)
        assert not goes_through_onednn(few.double(), weight.double())
        assert not goes_through_onednn(few.to("meta"), weight.to("meta"))
        assert not goes_through_onednn(few, trained)
    assert not goes_through_onednn(few, weight)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, FEW_TOKENS, FEW_TOKENS + 1])
def test_products_of_a_few_tokens_are_right(tokens):
    """Rows cut out of a wider tensor, and a weight cut out of a longer one."""
    x = randn(tokens, 40, seed=2)[:, 3:35]
    weights = [randn(30, 32, seed=3)[4:20], randn(8, 32, seed=4)]
    bias = randn(24, seed=5)
    without_bias = x.double() @ torch.cat(weights).double().T
    assert_close(torch.cat(linears(x, weights), dim=1), without_bias)
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
