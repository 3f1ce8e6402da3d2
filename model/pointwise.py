"""Norm, rotation and gate with hand-written gradients: they keep no more than what backward needs.

Legend: t tokens, n heads, H head size, F MLP width.
"""

import torch
from torch.nn import functional as F


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and a number per row; torch's own on a CPU keeps the input widened and the result besides."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        out, wide = torch.empty_like(x), torch.promote_types(x.dtype, torch.float32)
        scale = x.new_empty(*x.shape[:-1], 1, dtype=wide)
        for rows in _blocks(x):
            part = x[rows].to(wide)
            scale[rows] = torch.linalg.vector_norm(part, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(
                epsilon).rsqrt_()
            out[rows] = (part * scale[rows]).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=scale.dtype)
        for rows in _blocks(x):
            normed = x[rows] * scale[rows]  # in the scale's dtype, at least fp32
            wide = grad[rows].to(scale.dtype)
            grad_weight += (wide * normed).flatten(0, -2).sum(0)
            wide = wide * weight
            share = torch.linalg.vecdot(wide, normed).div_(x.shape[-1])[..., None]
            grad_x[rows] = wide.sub_(normed.mul_(share)).mul_(scale[rows])
        return grad_x, grad_weight.to(weight.dtype), None


BLOCK = 2**18
"""Elements that the norm widens at once: they stay in a core's cache, and nothing wide of [t, D] exists."""


def _blocks(x: torch.Tensor) -> list[slice]:
    size = max(1, BLOCK * x.shape[0] // max(1, x.numel()))
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root mean square layer normalization (arXiv 1910.07467) over the last dim, statistics in at least fp32.

    A GPU has torch's fused kernel, which keeps as little.
    """
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    return _RMSNorm.apply(x, weight, epsilon)


class _Rotate(torch.autograd.Function):
    """The turn is orthogonal but for a factor in the tables: its gradient is the turn by the negative angle."""

    @staticmethod
    def forward(ctx, x_tnH, cos_tH, sin_tH):
        ctx.save_for_backward(cos_tH, sin_tH)
        return _turn(x_tnH, cos_tH, sin_tH, 1)

    @staticmethod
    def backward(ctx, grad_tnH):
        return _turn(grad_tnH, *ctx.saved_tensors, -1), None, None


def _turn(x_tnH: torch.Tensor, cos_tH: torch.Tensor, sin_tH: torch.Tensor, sign: int) -> torch.Tensor:
    half = x_tnH.shape[-1] // 2
    out = x_tnH * cos_tH[:, None, :]
    # Both halves of a row of the tables are the same angles.
    sin = sin_tH[:, None, :half]
    # Not addcmul_: transformers rounds the products before it adds them.
    out[..., :half].sub_(x_tnH[..., half:] * sin, alpha=sign)
    out[..., half:].add_(x_tnH[..., :half] * sin, alpha=sign)
    return out


def rotate(x_tnH: torch.Tensor, cos_tH: torch.Tensor, sin_tH: torch.Tensor) -> torch.Tensor:
    """Turn each head's pairs (i, i + H/2) by its token's angles (arXiv 2104.09864)."""
    return _Rotate.apply(x_tnH, cos_tH, sin_tH)


def gated(gate_tF: torch.Tensor, up_tF: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return F.silu(gate_tF).mul_(up_tF)


def gated_gradients(grad_tF: torch.Tensor, gate_tF: torch.Tensor,
                    up_tF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(silu(gate) * up, gradient of gate, gradient of up), for the gradient of the first."""
    activated = F.silu(gate_tF)
    grad_up = grad_tF * activated
    grad_gate = torch.ops.aten.silu_backward(grad_tF.mul_(up_tF), gate_tF)
    return activated.mul_(up_tF), grad_gate, grad_up
