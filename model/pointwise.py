"""Norm, rotation and gate with hand-written gradients, which keep no more than they need.

The formulas run as written on a CPU and as fused kernels on a GPU (compiled.py).

Legend: t tokens, n heads, N query and K key/value heads of this tp rank, H head size, F MLP width,
R = (N + 2 K) H rows of the weights before the attention.
"""

from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

from model import compiled

BLOCK_ELEMENTS = 2**19
"""Elements that a function over rows widens at once on a CPU.

They stay in the cache, and nothing wide of the whole tensor's size exists. In bf16 the norms of a
step of 8,192 tokens take 4 % longer in blocks of 2**18 and 20 % longer in those of 2**20; of 2,048
tokens 40 % longer in 2**18."""


def row_blocks(x: torch.Tensor, elements: int | None = None) -> list[slice]:
    """Cut the rows of `x` into blocks of about `elements`, by default BLOCK_ELEMENTS.

    A fused kernel needs none, nor do shapes without values.
    """
    if torch.compiler.is_compiling() or compiled.is_fused(x) or x.is_meta:
        return [slice(None)]
    # As many whole rows as a block has elements for, at least one.
    size = max(1, (elements or BLOCK_ELEMENTS) * x.shape[0] // max(1, x.numel()))
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
        # In the place of the widened rows, where those are not x itself.
        normed = part * scale[rows] if part.dtype == x.dtype else part.mul_(scale[rows])
        out[rows] = normed.mul_(weight)
    return out, scale


def _widened_times(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return x * factor in the factor's dtype, with one tensor of that size at most."""
    if x.dtype == factor.dtype:
        return x * factor
    return x.to(factor.dtype).mul_(factor)


def _norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `_norm`'s input and of its weight."""
    grad_x = torch.empty_like(x)
    wide_weight = weight.to(scale.dtype)  # at least fp32, as all that follows
    grad_weight = torch.zeros_like(wide_weight)
    for rows in row_blocks(x):
        normed = _widened_times(x[rows], scale[rows])
        wide = grad[rows].to(scale.dtype)
        product = wide * normed
        grad_weight += product.flatten(0, -2).sum(0)
        # A row's own length depends on x: what the gradient has along the row is taken out.
        share = (product @ wide_weight).div_(x.shape[-1])[..., None]
        # The product's memory is in the cache.
        wide = torch.mul(wide, wide_weight, out=product)
        grad_x[rows] = wide.addcmul_(normed, share, value=-1).mul_(scale[rows])
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
    if not torch.compiler.is_compiling():
        out = torch.empty_like(x_tnH)
        _turn_into([out], x_tnH, cos_tH, sin_tH)
        return out
    half = x_tnH.shape[-1] // 2
    out = x_tnH * cos_tH[:, None, :]
    # Both halves of a row of the tables are the same angles.
    sin = sin_tH[:, None, :half]
    out[..., :half].sub_(x_tnH[..., half:] * sin)
    out[..., half:].add_(x_tnH[..., :half] * sin)
    return out


def _turn_into(
    outs: list[torch.Tensor], x_tnH: torch.Tensor, cos_tH: torch.Tensor, sin_tH: torch.Tensor
) -> None:
    """Write what `_turn` returns into `outs`, which share the heads in order.

    It takes whole heads: half a head of 32 is too short for a CPU's vector instructions, and a bf16
    operator on it takes three times as long.

    Args:
        outs: may be x itself.
    """
    half = x_tnH.shape[-1] // 2
    first, second = x_tnH.split(half, dim=-1)
    # The sign is the table's, which is smaller.
    signed_sin_tH = torch.cat((-sin_tH[:, :half], sin_tH[:, half:]), dim=-1)
    swapped = torch.cat((second, first), dim=-1).mul_(signed_sin_tH[:, None, :])
    counts = [out.shape[1] for out in outs]
    parts = zip(outs, x_tnH.split(counts, dim=1), swapped.split(counts, dim=1), strict=True)
    for out, own, other in parts:
        # Not addcmul_: transformers rounds the products before it adds them.
        torch.mul(own, cos_tH[:, None, :], out=out).add_(other)


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
    if torch.compiler.is_compiling():
        return _turn(q, cos_tH, sin_tH), _turn(k, cos_tH, sin_tH), v.clone()
    outs = [_empty_heads(q), _empty_heads(k)]
    # q and k side by side, with fewer calls.
    qk = qkv_tR.unflatten(1, (-1, heads.size))[:, : heads.queries + heads.keys]
    _turn_into(outs, qk, cos_tH, sin_tH)
    return *outs, _empty_heads(v).copy_(v)


def _empty_heads(like: torch.Tensor) -> torch.Tensor:
    """Make [t, n, H]; on a CPU head after head in memory, as its attention kernel reads it."""
    tokens, heads, size = like.shape
    if like.device.type == "cpu":
        return like.new_empty(heads, tokens, size).transpose(0, 1)
    return like.new_empty(tokens, heads, size)


def _join_turned(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    cos_tH: torch.Tensor,
    sin_tH: torch.Tensor,
) -> torch.Tensor:
    """Backward of `_split_and_turn`."""
    if torch.compiler.is_compiling():
        parts = (_turn_back(grad_q, cos_tH, sin_tH), _turn_back(grad_k, cos_tH, sin_tH), grad_v)
        return torch.cat(parts, dim=1).flatten(1)
    joined = torch.cat((grad_q, grad_k, grad_v), dim=1)
    # In place, q and k side by side.
    turned = joined[:, : grad_q.shape[1] + grad_k.shape[1]]
    _turn_into([turned], turned, cos_tH, -sin_tH)
    return joined.flatten(1)


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
    if torch.compiler.is_compiling():
        return _turn(q, cos_tH, sin_tH), _turn(k, cos_tH, sin_tH), v.clone(), q_scale, k_scale
    outs = [_empty_heads(q), _empty_heads(k)]
    _turn_into(outs[:1], q, cos_tH, sin_tH)
    _turn_into(outs[1:], k, cos_tH, sin_tH)
    return *outs, _empty_heads(v).copy_(v), q_scale, k_scale


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
    # In place: otherwise a third tensor [t, F] would be made.
    return F.silu(gate_tF).mul_(up_tF)


def _gelu_gated(gate_tF: torch.Tensor, up_tF: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate_tF, approximate="tanh").mul_(up_tF)


def gated(gate_tF: torch.Tensor, up_tF: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return activation(gate) * up."""
    function = _silu_gated if activation == "silu" else _gelu_gated
    return compiled.run(function, gate_tF, up_tF)


def _silu_gated_gradients_(
    grad_tF: torch.Tensor, gate_tF: torch.Tensor, up_tF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # In place wherever something has had its last use: five tensors [t, F] exist at most.
    grad_gate = grad_tF * up_tF
    torch.ops.aten.silu_backward(grad_gate, gate_tF, grad_input=grad_gate)
    activated = F.silu(gate_tF)
    grad_tF.mul_(activated)
    return activated.mul_(up_tF), grad_gate


def _gelu_gated_gradients_(
    grad_tF: torch.Tensor, gate_tF: torch.Tensor, up_tF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_gate = grad_tF * up_tF
    torch.ops.aten.gelu_backward(grad_gate, gate_tF, approximate="tanh", grad_input=grad_gate)
    activated = F.gelu(gate_tF, approximate="tanh")
    grad_tF.mul_(activated)
    return activated.mul_(up_tF), grad_gate


def gated_gradients_(
    grad_tF: torch.Tensor, gate_tF: torch.Tensor, up_tF: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward of `gated`: put the gradient of up in the place of `grad_tF`.

    Returns:
        activation(gate) * up again, and the gradient of gate.
    """
    function = _silu_gated_gradients_ if activation == "silu" else _gelu_gated_gradients_
    return compiled.run(function, grad_tF, gate_tF, up_tF)
