"""Matrix products that torch.nn.functional does not have.

They add to a wider sum, multiply by several weights at once, and take oneDNN on a CPU.

Legend: t tokens, b sequences of which each has one token, D hidden, r rows of one weight, R those
of all.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left @ right` to `total` in place, in the dtype of `total`.

    A GPU multiplies bf16 and adds to fp32 in one kernel, which never rounds the product to bf16. A
    CPU has no such kernel: there the product is rounded to the factors' dtype before it is added.

    Args:
        total: [m, n], of the factors' dtype or wider.
        left: [m, k].
        right: [k, n].
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)


def linear(
    x_tD: torch.Tensor, weight_rD: torch.Tensor, bias_r: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply a weight [r, D] and a bias, as F.linear does: [t, D] -> [t, r].

    On a CPU fp32 goes through oneDNN. torch gives it to MKL, which multiplies a single row on one
    core of an AMD CPU (pytorch/pytorch#96643) and is slower with many rows too; bf16 and fp16 it
    gives to oneDNN itself. Two cores of an EPYC 9004, ms of 36 products with [2048, 768] and
    GFLOP/s of 2,048 tokens:

        tokens         1      2      4      8   [704, 256]   [8192, 256]
        MKL        18.41  32.33  25.59  23.08          194           123
        oneDNN     10.66  13.41  14.31  16.21          204           142
    """
    if not _is_for_onednn(x_tD):
        return F.linear(x_tD, weight_rD, bias_r)
    if torch.is_grad_enabled():
        return _Linear.apply(x_tD, bias_r, weight_rD)
    return _onednn_linear(x_tD, weight_rD, bias_r)


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left [m, k] @ right [k, n], without a gradient; fp32 on a CPU through oneDNN."""
    if not _is_for_onednn(left):
        return left @ right
    return _onednn_linear(left, right.T)


def write_products(out: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Write the sum of the pairs' products, left [m, k] @ right [k, n], into `out` [m, n].

    There is no gradient.
    """
    (left, right), *others = pairs
    if not _is_for_onednn(left):
        torch.mm(left, right, out=out)
        for left, right in others:
            out.addmm_(left, right)
        return
    # oneDNN's operator writes into memory of its own.
    out.copy_(multiply(left, right))
    for left, right in others:
        out.add_(multiply(left, right))


def _is_for_onednn(x: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    )


def _onednn_linear(
    x_tD: torch.Tensor, weight_rD: torch.Tensor, bias_r: torch.Tensor | None = None
) -> torch.Tensor:
    # torch's compiler calls the same operator; it has no gradient.
    return torch.ops.mkldnn._linear_pointwise(x_tD, weight_rD, bias_r, "none", [], None)


def linears_side_by_side(
    x_bD: torch.Tensor, weights: Sequence[torch.Tensor], bias_R: torch.Tensor | None
) -> torch.Tensor:
    """Apply several weights [r, D] to a few tokens: [b, D] -> [b, R].

    It does what `joined_linear` does without copying weights, which takes longer than the products
    of a few tokens: it is one product where the weights are rows of one tensor. There is no
    gradient.
    """
    joined_RD = _as_one(weights)
    if joined_RD is None:
        product_bR = torch.cat([linear(x_bD, weight) for weight in weights], dim=1)
    else:
        product_bR = linear(x_bD, joined_RD)
    return product_bR if bias_R is None else product_bR.add_(bias_R)


def _as_one(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return weights that follow each other in one memory as one, without a copy; else None."""
    first = weights[0]
    memory = first.untyped_storage().data_ptr()
    place = first.storage_offset()
    for weight in weights:
        is_next = weight.storage_offset() == place and weight.is_contiguous()
        if not is_next or weight.untyped_storage().data_ptr() != memory:
            return None
        place += weight.numel()
    rows = sum(weight.shape[0] for weight in weights)
    return first.as_strided((rows, first.shape[1]), first.stride())


def joined_linear(
    x_tD: torch.Tensor, weights: Sequence[torch.Tensor], bias_R: torch.Tensor | None
) -> torch.Tensor:
    """Apply several weights [r, D] to one input by one product: [t, D] -> [t, R].

    Their results stand side by side. The joined weight is made again for backward: kept, it would
    be a second copy of the weights in every layer, which ZeRO-3 could not free.
    """
    if torch.is_grad_enabled():
        return _Linear.apply(x_tD, bias_R, *weights)
    # A model that generates has them joined.
    placed_RD = _as_one(weights)
    return linear(x_tD, torch.cat(list(weights)) if placed_RD is None else placed_RD, bias_R)


class _Linear(torch.autograd.Function):
    """Keeps its input and the weights, none of them joined."""

    @staticmethod
    def forward(ctx, x_tD, bias_R, *weights):
        ctx.has_bias = bias_R is not None
        ctx.save_for_backward(x_tD, *weights)
        return linear(x_tD, _join(weights), bias_R)

    @staticmethod
    def backward(ctx, *grads):
        (grad_tR,) = grads
        x_tD, *weights = ctx.saved_tensors
        grad_x_tD = multiply(grad_tR, _join(weights))
        grad_bias_R = grad_tR.sum(0) if ctx.has_bias else None
        # Not through oneDNN, which is slower with a transposed left factor.
        rows = [weight.shape[0] for weight in weights]
        return grad_x_tD, grad_bias_R, *(grad_tR.T @ x_tD).split(rows)


def _join(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put weights [r, D] below each other: [R, D]; one alone is not copied."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))
