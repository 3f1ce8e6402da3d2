"""Matrix products that torch.nn.functional does not have.

They add to a wider sum, multiply by several weights at once, and take oneDNN on a CPU.

Legend: t tokens, b sequences of which each has one token, D hidden, r rows of one weight, R those
of all.
"""

from collections.abc import Sequence

import torch
from torch.autograd.graph import saved_tensors_hooks
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

    On a CPU fp32 goes through oneDNN where there is no gradient to keep: while a model generates
    or is evaluated, and inside functions that write their own backward. torch gives fp32 to MKL,
    which multiplies a single row on one core of an AMD CPU (pytorch/pytorch#96643) and is slower
    with many rows too; bf16 and fp16 it gives to oneDNN itself. Two cores of an EPYC 9004, ms of 36
    products with [2048, 768] and GFLOP/s of 2,048 tokens:

        tokens         1      2      4      8   [704, 256]   [8192, 256]
        MKL        18.41  32.33  25.59  23.08          194           123
        oneDNN     10.66  13.41  14.31  16.21          204           142
    """
    if torch.is_grad_enabled() or not _is_for_onednn(x_tD):
        return F.linear(x_tD, weight_rD, bias_r)
    # torch's compiler calls the same operator; it has no gradient.
    return torch.ops.mkldnn._linear_pointwise(x_tD, weight_rD, bias_r, "none", [], None)


@torch.no_grad()
def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left [m, k] @ right [k, n], as a backward needs it: there is no gradient.

    On a CPU fp32 goes through oneDNN, as in `linear`. GFLOP/s of [2048, k] @ [k, 256] on the same
    cores:

        k           256    704    768   8192
        MKL         202    202    200    194
        oneDNN      220    222    221    206

    The gradient of a weight is not for it: [768, 2048] @ [2048, 256], the left one transposed in
    memory, reaches 198 with MKL and 151 with oneDNN.
    """
    if not _is_for_onednn(left):
        return left @ right
    return linear(left, right.T)


@torch.no_grad()
def write_products(out: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Write the sum of the pairs' products, left [m, k] @ right [k, n], into `out` [m, n].

    There is no gradient. On a CPU fp32 goes through oneDNN, which takes another [m, n] of memory.

    Args:
        out: of the factors' dtype, and none of them.
    """
    (left, right), *others = pairs
    if not _is_for_onednn(left):
        torch.mm(left, right, out=out)
        for left, right in others:
            out.addmm_(left, right)
        return
    # `copy_` and `add_` would also take another dtype, and repeat a single row.
    assert out.dtype == left.dtype and out.shape == (left.shape[0], right.shape[1])
    out.copy_(multiply(left, right))
    for left, right in others:
        out.add_(multiply(left, right))


def _is_for_onednn(x: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    )


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
    # A model that generates has them joined.
    if not torch.is_grad_enabled() and (placed_RD := _as_one(weights)) is not None:
        return linear(x_tD, placed_RD, bias_R)
    joined_RD = torch.cat(list(weights))
    parts = [weight.detach() for weight in weights]
    # Autograd keeps the joined weight, or a view of it: the hooks know it by its memory.
    memory = joined_RD.untyped_storage()._cdata
    strides = joined_RD.stride()

    def pack(kept: torch.Tensor) -> torch.Tensor | bool:
        if kept.untyped_storage()._cdata != memory:
            return kept
        # What stands for the joined weight: is it transposed?
        return kept.stride() != strides

    def unpack(packed: torch.Tensor | bool) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        again_RD = torch.cat(parts)
        return again_RD.T if packed else again_RD

    with saved_tensors_hooks(pack, unpack):
        return F.linear(x_tD, joined_RD, bias_R)
