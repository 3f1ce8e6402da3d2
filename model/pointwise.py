"""Norm, rotation and gate with hand-written gradients, which keep no more than they need.

The formulas run as written on a CPU and as fused kernels on a GPU (compiled.py).

Legend: t tokens, n heads, N query and K key/value heads of this tp rank, H head size, F MLP width,
R = (N + 2 K) H rows of the weights before the attention.
"""

from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

from model import compiled

BLOCK = 2**18
"""Elements that the norm widens at once on a CPU.

They stay in a core's cache, and nothing wide of [t, D] exists."""


def row_blocks(x: torch.Tensor, elements: int | None = None) -> list[slice]:
    """Cut the rows of `x` into blocks of about `elements`, by default BLOCK.

    A fused kernel needs none, nor do shapes without values.
    """
    if torch.compiler.is_compiling() or compiled.is_fused(x) or x.is_meta:
        return [slice(None)]
    # As many whole rows as a block has elements for, at least one.
    size = max(1, (elements or BLOCK) * x.shape[0] // max(1, x.numel()))
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]


def _norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm the rows; return them and the number that each was multiplied by, in at least fp32."""
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty_like(x)
    scale = x.new_empty(*x.shape[:-1], 1, dtype=wide_dtype)
    for rows in row_blocks(x):
        # Statistics in the wide dtype; the result is rounded once.
        part = x[rows].to(wide_dtype)
        mean_square = (
            torch.linalg.vector_norm(part, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        )
        scale[rows] = mean_square.add_(epsilon).rsqrt_()
        out[rows] = (part * scale[rows]).mul_(weight)
    return out, scale


def _norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `_norm`'s input and of its weight."""
    grad_x = torch.empty_like(x)
    grad_weight = torch.zeros_like(weight, dtype=scale.dtype)
    for rows in row_blocks(x):
        normed = x[rows] * scale[rows]  # in the scale's dtype, at least fp32
        wide = grad[rows].to(scale.dtype)
        grad_weight += (wide * normed).flatten(0, -2).sum(0)
        # A row's own length depends on x: what the gradient has along the row is taken out.
        wide = wide * weight
        share = torch.linalg.vecdot(wide, normed).div_(x.shape[-1])[..., None]
        grad_x[rows] = wide.sub_(normed.mul_(share)).mul_(scale[rows])
    return grad_x, grad_weight.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and a number per row.

    torch's own F.rms_norm on a CPU keeps the input widened and the result as well.
    """

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        out, scale = compiled.run(_norm, x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        return *compiled.run(_norm_backward, grad, *ctx.saved_tensors), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Apply root mean square layer normalization (arXiv 1910.07467) over the last dim.

    Statistics are in at least fp32.
    """
    # A graph's bookkeeping takes as long as the norm of a single token.
    if not torch.is_grad_enabled():
        return compiled.run(_norm, x, weight, epsilon)[0]
    return _RMSNorm.apply(x, weight, epsilon)


def _turn(x_tnH: torch.Tensor, cos_tH: torch.Tensor, sin_tH: torch.Tensor) -> torch.Tensor:
    """Turn each head's pairs (i, i + H/2) by its token's angles."""
    half = x_tnH.shape[-1] // 2
    out = x_tnH * cos_tH[:, None, :]
    # Not addcmul_: transformers rounds the products before it adds them.
    if torch.compiler.is_compiling():
        # Both halves of a row of the tables are the same angles.
        sin = sin_tH[:, None, :half]
        out[..., :half].sub_(x_tnH[..., half:] * sin)
        out[..., half:].add_(x_tnH[..., :half] * sin)
        return out
    # On a CPU whole heads: half a head of 32 is too short for its vector instructions, and a bf16
    # operator on it takes three times as long.
    first, second = x_tnH.split(half, dim=-1)
    swapped = torch.cat((second.neg(), first), dim=-1)
    return out.add_(swapped.mul_(sin_tH[:, None, :]))


def _turn_back(x_tnH: torch.Tensor, cos_tH: torch.Tensor, sin_tH: torch.Tensor) -> torch.Tensor:
    """Backward of `_turn`: turn by the negative angles.

    It is the gradient also where the tables hold a factor, since a rotation is orthogonal.
    """
    return _turn(x_tnH, cos_tH, -sin_tH)


class _Rotate(torch.autograd.Function):
    """Keeps nothing but the tables."""

    @staticmethod
    def forward(ctx, x_tnH, cos_tH, sin_tH):
        ctx.save_for_backward(cos_tH, sin_tH)
        return compiled.run(_turn, x_tnH, cos_tH, sin_tH)

    @staticmethod
    def backward(ctx, *grads):
        (grad_tnH,) = grads
        return compiled.run(_turn_back, grad_tnH, *ctx.saved_tensors), None, None


def rotate(x_tnH: torch.Tensor, cos_tH: torch.Tensor, sin_tH: torch.Tensor) -> torch.Tensor:
    """Turn each head's pairs (i, i + H/2) by its token's angles (arXiv 2104.09864)."""
    return _Rotate.apply(x_tnH, cos_tH, sin_tH)


class HeadSizes(NamedTuple):
    """How many columns of q, k and v stand side by side."""

    queries: int
    """N"""
    keys: int
    """K"""
    size: int
    """H"""

    def split(self, qkv_tR: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return views of q [t, N, H], k [t, K, H] and v [t, K, H]."""
        heads = qkv_tR.unflatten(1, (-1, self.size))
        return heads.split([self.queries, self.keys, self.keys], dim=1)


def _split_and_turn(
    qkv_tR: torch.Tensor, heads: HeadSizes, cos_tH: torch.Tensor, sin_tH: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Cut q, k and v out, each with memory of its own, and turn q and k."""
    q, k, v = heads.split(qkv_tR)
    return _turn(q, cos_tH, sin_tH), _turn(k, cos_tH, sin_tH), v.clone()


def _join_turned(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    cos_tH: torch.Tensor,
    sin_tH: torch.Tensor,
) -> torch.Tensor:
    """Backward of `_split_and_turn`."""
    parts = (_turn_back(grad_q, cos_tH, sin_tH), _turn_back(grad_k, cos_tH, sin_tH), grad_v)
    return torch.cat(parts, dim=1).flatten(1)


def _split_norm_and_turn(
    qkv_tR: torch.Tensor,
    heads: HeadSizes,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    epsilon: float,
    cos_tH: torch.Tensor,
    sin_tH: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Do what `_split_and_turn` does, after a norm over each head of q and k.

    The norms' scales are returned as well.
    """
    q, k, v = heads.split(qkv_tR)
    q, q_scale = _norm(q, q_norm, epsilon)
    k, k_scale = _norm(k, k_norm, epsilon)
    return _turn(q, cos_tH, sin_tH), _turn(k, cos_tH, sin_tH), v.clone(), q_scale, k_scale


def _join_turned_and_normed(
    qkv_tR: torch.Tensor,
    heads: HeadSizes,
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    cos_tH: torch.Tensor,
    sin_tH: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Backward of `_split_norm_and_turn`: the gradients of qkv and of the two norms."""
    q, k, _ = heads.split(qkv_tR)
    grad_q, grad_q_norm = _norm_backward(_turn_back(grad_q, cos_tH, sin_tH), q, q_norm, q_scale)
    grad_k, grad_k_norm = _norm_backward(_turn_back(grad_k, cos_tH, sin_tH), k, k_norm, k_scale)
    return torch.cat([grad_q, grad_k, grad_v], dim=1).flatten(1), grad_q_norm, grad_k_norm


class _SplitHeads(torch.autograd.Function):
    """Keeps nothing but the tables; with norms also its whole input, v included."""

    @staticmethod
    def forward(ctx, qkv_tR, heads, q_norm, k_norm, epsilon, cos_tH, sin_tH):
        ctx.heads = heads
        q, k, v, *scales = _split_heads(qkv_tR, heads, q_norm, k_norm, epsilon, cos_tH, sin_tH)
        kept = (qkv_tR, q_norm, k_norm, *scales) if scales else ()
        ctx.save_for_backward(cos_tH, sin_tH, *kept)
        return q, k, v

    @staticmethod
    def backward(ctx, *grads):
        cos_tH, sin_tH, *kept = ctx.saved_tensors
        # Without norms, only the rotation is undone.
        if not kept:
            grad_qkv = compiled.run(_join_turned, *grads, cos_tH, sin_tH)
            return grad_qkv, None, None, None, None, None, None
        qkv_tR, *norms_and_scales = kept
        grad_qkv, grad_q_norm, grad_k_norm = compiled.run(
            _join_turned_and_normed, qkv_tR, ctx.heads, *grads, *norms_and_scales, cos_tH, sin_tH
        )
        return grad_qkv, None, grad_q_norm, grad_k_norm, None, None, None


def _split_heads(
    qkv_tR, heads, q_norm, k_norm, epsilon, cos_tH, sin_tH
) -> tuple[torch.Tensor, ...]:
    """Return what `split_heads` does, and with norms what their backward needs."""
    if q_norm is None:
        return compiled.run(_split_and_turn, qkv_tR, heads, cos_tH, sin_tH)
    return compiled.run(
        _split_norm_and_turn, qkv_tR, heads, q_norm, k_norm, epsilon, cos_tH, sin_tH
    )


def split_heads(
    qkv_tR: torch.Tensor,
    heads: HeadSizes,
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
    epsilon: float,
    cos_tH: torch.Tensor,
    sin_tH: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut one product into q, k and v; norm q and k per head, where norms are given, and rotate.

    Args:
        qkv_tR: [t, (N + 2 K) H], the heads of q, then of k, then of v.
        norms: weights [H] of the norms over q's and k's heads, or None twice.
    Returns:
        q [t, N, H], k [t, K, H] and v [t, K, H], each with memory of its own.
    """
    q_norm, k_norm = norms
    if not torch.is_grad_enabled():
        q, k, v, *_ = _split_heads(qkv_tR, heads, q_norm, k_norm, epsilon, cos_tH, sin_tH)
        return q, k, v
    return _SplitHeads.apply(qkv_tR, heads, q_norm, k_norm, epsilon, cos_tH, sin_tH)


Activation = Literal["silu", "gelu_tanh"]
"""What is applied to the gate of an MLP."""


def _silu_gated(gate_tF: torch.Tensor, up_tF: torch.Tensor) -> torch.Tensor:
    # In place: a third of [t, F] would be made else.
    return F.silu(gate_tF).mul_(up_tF)


def _gelu_gated(gate_tF: torch.Tensor, up_tF: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate_tF, approximate="tanh").mul_(up_tF)


def gated(gate_tF: torch.Tensor, up_tF: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return activation(gate) * up."""
    function = _silu_gated if activation == "silu" else _gelu_gated
    return compiled.run(function, gate_tF, up_tF)


def _silu_gated_gradients(
    grad_tF: torch.Tensor, gate_tF: torch.Tensor, up_tF: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    # In this order no more than six of [t, F] exist at once.
    grad_gate = torch.ops.aten.silu_backward(grad_tF * up_tF, gate_tF)
    activated = F.silu(gate_tF)
    grad_up = grad_tF * activated
    return activated.mul_(up_tF), grad_gate, grad_up


def _gelu_gated_gradients(
    grad_tF: torch.Tensor, gate_tF: torch.Tensor, up_tF: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    grad_gate = torch.ops.aten.gelu_backward(grad_tF * up_tF, gate_tF, approximate="tanh")
    activated = F.gelu(gate_tF, approximate="tanh")
    grad_up = grad_tF * activated
    return activated.mul_(up_tF), grad_gate, grad_up


def gated_gradients(
    grad_tF: torch.Tensor, gate_tF: torch.Tensor, up_tF: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, ...]:
    """Backward of `gated`: return activation(gate) * up again, and gradients of gate and of up."""
    function = _silu_gated_gradients if activation == "silu" else _gelu_gated_gradients
    return compiled.run(function, grad_tF, gate_tF, up_tF)
