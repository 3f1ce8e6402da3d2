"""Matrix products that torch.nn.functional does not have.

One adds to a wider sum, the other multiplies by several weights at once.

Legend: t tokens, D hidden, r rows of one weight, R those of all.
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


def linears_side_by_side(
    x_bD: torch.Tensor, weights: Sequence[torch.Tensor], bias_R: torch.Tensor | None
) -> torch.Tensor:
    """Apply several weights [r, D] to a few tokens, one after the other: [b, D] -> [b, R].

    It does what `joined_linear` does, which copies the weights: that takes longer than the products
    of a few tokens. There is no gradient.
    """
    product_bR = torch.cat([F.linear(x_bD, weight) for weight in weights], dim=1)
    return product_bR if bias_R is None else product_bR.add_(bias_R)


def joined_linear(
    x_tD: torch.Tensor, weights: Sequence[torch.Tensor], bias_R: torch.Tensor | None
) -> torch.Tensor:
    """Apply several weights [r, D] to one input by one product: [t, D] -> [t, R].

    Their results stand side by side. The joined weight is made again for backward: kept, it would
    be a second copy of the weights in every layer, which ZeRO-3 could not free.
    """
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
