"""RMSNorm over rows of which each tp rank has a part: all heads of q or k of a token (OLMo 2, 3).

The mean square of a row is the mean of the ranks' own mean squares, since each rank has as many
columns; so it is also where a key/value head is on several ranks, which then all have as many
copies. In backward the same holds for what the gradient has along the row.

Legend: t tokens, r columns of this tp rank.
"""

import torch

from model import compiled
from model.pointwise import rms_norm
from parallel.collectives import all_reduce
from parallel.layout import Axis


def norm_over_heads(
    x_tr: torch.Tensor, weight_r: torch.Tensor, epsilon: float, tp: Axis
) -> torch.Tensor:
    """Apply RMSNorm over the columns of all ranks: [t, r] -> [t, r].

    The gradient of a column that is on several ranks is the sum of theirs.
    """
    if tp.size == 1:
        return rms_norm(x_tr, weight_r, epsilon)
    return _NormOverHeads.apply(x_tr, weight_r, epsilon, tp)


class _NormOverHeads(torch.autograd.Function):
    """Keeps its input and a number per row."""

    @staticmethod
    def forward(ctx, x_tr, weight_r, epsilon, tp):
        mean_square_t1 = _mean_over(compiled.run(_mean_square, x_tr), tp)
        out_tr, scale_t1 = compiled.run(_scaled, x_tr, weight_r, mean_square_t1, epsilon)
        ctx.tp = tp
        ctx.save_for_backward(x_tr, weight_r, scale_t1)
        return out_tr

    @staticmethod
    def backward(ctx, *grads):
        (grad_tr,) = grads
        share_t1 = _mean_over(compiled.run(_own_share, grad_tr, *ctx.saved_tensors), ctx.tp)
        found = compiled.run(_scaled_backward, grad_tr, *ctx.saved_tensors, share_t1)
        return *found, None, None


def _mean_over(own_t1: torch.Tensor, tp: Axis) -> torch.Tensor:
    """Average a number per row over the ranks, in the place of this rank's own."""
    return all_reduce(own_t1, tp).div_(tp.size)


def _mean_square(x_tr: torch.Tensor) -> torch.Tensor:
    """Return the rows' mean squares in at least fp32 [t, 1]."""
    wide_tr = x_tr.to(torch.promote_types(x_tr.dtype, torch.float32))
    return torch.linalg.vector_norm(wide_tr, dim=-1, keepdim=True).square().div(x_tr.shape[-1])


def _scaled(
    x_tr: torch.Tensor, weight_r: torch.Tensor, mean_square_t1: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm the rows; return them and the number that each was multiplied by."""
    scale_t1 = (mean_square_t1 + epsilon).rsqrt()
    # In the scale's dtype; the result is rounded once.
    return (x_tr * scale_t1 * weight_r).to(x_tr.dtype), scale_t1


def _own_share(
    grad_tr: torch.Tensor, x_tr: torch.Tensor, weight_r: torch.Tensor, scale_t1: torch.Tensor
) -> torch.Tensor:
    """Return what the gradient has along the row, as a mean of this rank's columns [t, 1]."""
    normed_tr = x_tr * scale_t1
    wide_tr = grad_tr.to(scale_t1.dtype) * weight_r
    return torch.linalg.vecdot(wide_tr, normed_tr)[:, None].div(x_tr.shape[-1])


def _scaled_backward(
    grad_tr: torch.Tensor,
    x_tr: torch.Tensor,
    weight_r: torch.Tensor,
    scale_t1: torch.Tensor,
    share_t1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the norm's input and of its weight."""
    normed_tr = x_tr * scale_t1
    wide_tr = grad_tr.to(scale_t1.dtype)
    grad_weight_r = (wide_tr * normed_tr).sum(0).to(weight_r.dtype)
    # A row's length depends on x: what the gradient has along the row is taken out.
    grad_x_tr = (wide_tr * weight_r - normed_tr * share_t1) * scale_t1
    return grad_x_tr.to(x_tr.dtype), grad_weight_r
