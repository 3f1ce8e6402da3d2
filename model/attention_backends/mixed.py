"""The attention backend `mixed`: cuDNN for long documents, torch's varlen op for all others.

On Hopper, torch's varlen op is FlashAttention 2, which was not written for it: published H100 rates
at head size 128 are 370 and 322 TFLOP/s forward and backward, those of cuDNN about 590 and 520.
cuDNN takes one document per call (or several of one length), so that short documents are faster
together in the varlen op. That op also takes documents that continue another rank's tokens, whose
queries are their last positions.

A cuDNN execution plan is made for each new shape and takes tens to hundreds of milliseconds. A
document is therefore padded at its end to one of a bounded set of lengths. Rows at the end change
nothing before them, since attention is causal, and the gradient of their output is zero. The rows
that follow the document serve as padding, whatever they are, so that q, k and v are copied only
where the call ends before the padding does.

Nothing but q, k, v, the output and the log-sum-exps is kept for backward, so that q, k and v may be
emptied and filled again in between (activation_memory/saved_attention.py). Padded copies are made again in backward.

Legend: m query and k key/value heads, H head size, n documents of one length L, s tokens of a part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from model.attention_backends.choice import Attend, Segments

ASSUMED_CROSSOVER_TOKENS = 2048
"""Tokens from which on a document goes to cuDNN where that is not measured. ASSUMED, not measured.

Forward and backward of a document of L tokens are 7 L^2 m H operations. At the published rates
(above) FlashAttention 2 takes 20.9 fs for each L^2 m H and cuDNN 13.0 fs. Padding to GRANULE_TOKENS
makes the latter 1 + GRANULE_TOKENS / L times as much on average. The output, its gradient and the
gradients of q, k and v are copied, (12 m + 8 k) H bytes a token: at 3 TB/s and k = m / 4, 4,700 fs
for each L m H. Both take the same time at L = 1,000. A document's ten operations take some 60 us to
launch, which is what a 2,048-token document with m = 32 and H = 128 saves.
"""
NEVER = 2**40
"""A crossover that no document reaches."""
GRANULE_TOKENS = 256
"""Least step between padded lengths; from 8,192 tokens on 1/16 of the power of two is more."""

Kept = tuple[torch.Tensor | None, ...]
"""What a kernel's backward needs beside q, k, v and the output: log-sum-exps, unused seeds."""


@dataclass(frozen=True)
class Part:
    """Neighbouring documents of a call that one kernel computes."""

    rows_q: slice
    rows_k: slice
    documents: int
    length: int
    """Tokens of each document for cuDNN; 0 where the documents go to the varlen op."""
    padded: int
    """The length with padding. More than `length` for one document only."""
    cu_q: torch.Tensor
    """Where each document's queries begin, and the end, from 0: int32 on the device."""
    cu_k: torch.Tensor
    max_q: int
    max_k: int

    @property
    def is_long(self) -> bool:
        return self.length > 0

    @property
    def is_padded(self) -> bool:
        return self.padded > self.length


@dataclass(frozen=True)
class Kernels:
    """The two kernels under the backend. Tests put others in their place."""

    long_forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Kept]]
    """(q [n, m, L, H], k [n, k, L, H], v) -> the output [n, m, L, H], and what is kept."""
    long_backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """(the output's gradient, q, k, v, the output, what was kept) -> those of q, k and v."""
    short_forward: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, Part], tuple[torch.Tensor, Kept]
    ]
    """The same of packed documents [s, m, H], whose bounds the part has."""
    short_backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def padded_length(tokens: int) -> int:
    """The length to which a document is padded for cuDNN.

    It is a multiple of 1/16 of the largest power of two that the document reaches, and of
    GRANULE_TOKENS: at most 16 lengths between a power of two and the next, 144 from 1 token to a
    million. From 4,096 tokens on this adds at most 6.3 % to the length, 2.2 % on average (and twice
    that to the operations); from 2,048 to 4,096 twice as much, and below 2,048 up to 255 tokens.
    """
    power = 1 << (tokens.bit_length() - 1)
    granule = max(GRANULE_TOKENS, power // 16)
    return -(-tokens // granule) * granule


def split_parts(segments: "Segments", crossover: int) -> list[Part]:
    """The parts of a call, in order; made by the first layer that asks, then looked up."""
    if crossover not in segments.parts:
        segments.parts[crossover] = _make_parts(segments, crossover)
    return segments.parts[crossover]


def _make_parts(segments: "Segments", crossover: int) -> list[Part]:
    bounds_q = segments.bounds_q
    bounds_k = segments.bounds_k
    lengths_q = [end - begin for begin, end in zip(bounds_q, bounds_q[1:], strict=False)]
    lengths_k = [end - begin for begin, end in zip(bounds_k, bounds_k[1:], strict=False)]

    def group_of(number: int) -> tuple:
        """Documents with the same answer that are neighbours make one part."""
        length = lengths_q[number]
        if length != lengths_k[number] or length < crossover:
            return ("short",)
        return ("long", length) if padded_length(length) == length else ("long", length, number)

    parts = []
    end = 0
    for group, numbers in groupby(range(len(lengths_q)), group_of):
        first = end
        end += len(list(numbers))
        if bounds_q[end] == bounds_q[first]:
            continue  # no query: a kernel would be launched for nothing
        length = group[1] if group[0] == "long" else 0
        parts.append(
            Part(
                rows_q=slice(bounds_q[first], bounds_q[end]),
                rows_k=slice(bounds_k[first], bounds_k[end]),
                documents=end - first,
                length=length,
                padded=padded_length(length) if length else 0,
                cu_q=_from_zero(segments.cu_q, bounds_q, first, end),
                cu_k=_from_zero(segments.cu_k, bounds_k, first, end),
                max_q=max(lengths_q[first:end]),
                max_k=max(lengths_k[first:end]),
            )
        )
    return parts


def _from_zero(cu: torch.Tensor, bounds: list[int], first: int, end: int) -> torch.Tensor:
    """Bounds of some documents, computed on the device: no transfer and nothing to wait for."""
    some = cu[first : end + 1]
    return some - bounds[first] if bounds[first] else some


def mixed_attention(crossover: int, kernels: Kernels | None = None) -> "Attend":
    """The attend function whose documents of at least `crossover` tokens go to cuDNN."""
    kernels = kernels or GPU_KERNELS

    def attend(q_smH, k_skH, v_skH, segments):
        return _Mixed.apply(q_smH, k_skH, v_skH, split_parts(segments, crossover), kernels)

    return attend


class _Mixed(torch.autograd.Function):
    """Computes all documents of a call as one node; each part's result is written in its place."""

    @staticmethod
    def forward(ctx, q_smH, k_skH, v_skH, parts: list[Part], kernels: Kernels):
        out_smH = None if _is_whole(parts) else q_smH.new_empty(q_smH.shape)
        kept = []
        for part in parts:
            result, kept_of_part = _forward(q_smH, k_skH, v_skH, part, kernels)
            kept.append(kept_of_part)
            if out_smH is None:
                out_smH = result
            else:
                out_smH[part.rows_q] = result
            del result  # not beside the next part's
        ctx.parts = parts
        ctx.kernels = kernels
        ctx.kept_counts = [len(each) for each in kept]
        ctx.save_for_backward(q_smH, k_skH, v_skH, out_smH, *(x for each in kept for x in each))
        return out_smH

    @staticmethod
    def backward(ctx, grad_smH):
        q_smH, k_skH, v_skH, out_smH, *kept = ctx.saved_tensors
        # torch finds cuDNN's plans by the layout of q, k and v alone: the gradient needs one
        # layout.
        grad_smH = grad_smH.contiguous()
        grads = (
            None if _is_whole(ctx.parts) else [x.new_empty(x.shape) for x in (q_smH, k_skH, v_skH)]
        )
        for part, count in zip(ctx.parts, ctx.kept_counts, strict=True):
            kept_of_part = tuple(kept[:count])
            kept = kept[count:]
            found = _backward(
                grad_smH, q_smH, k_skH, v_skH, out_smH, kept_of_part, part, ctx.kernels
            )
            if grads is None:
                return *found, None, None
            for whole, rows, gradient in zip(
                grads, (part.rows_q, part.rows_k, part.rows_k), found, strict=True
            ):
                whole[rows] = gradient
            del found, gradient
        return *grads, None, None


def _is_whole(parts: list[Part]) -> bool:
    """Is the kernel's result that of the call?"""
    return len(parts) == 1 and not parts[0].is_padded


def _forward(q, k, v, part: Part, kernels: Kernels) -> tuple[torch.Tensor, Kept]:
    """A part's output [s, m, H], of the whole call's q, k and v."""
    if not part.is_long:
        return kernels.short_forward(q[part.rows_q], k[part.rows_k], v[part.rows_k], part)
    out, kept = kernels.long_forward(
        _long_rows(q, part.rows_q, part),
        _long_rows(k, part.rows_k, part),
        _long_rows(v, part.rows_k, part),
    )
    return _to_tokens_first(out, part), kept


def _backward(
    grad, q, k, v, out, kept: Kept, part: Part, kernels: Kernels
) -> tuple[torch.Tensor, ...]:
    """The gradients of a part's q, k and v."""
    rows_q = part.rows_q
    rows_k = part.rows_k
    if not part.is_long:
        return kernels.short_backward(
            grad[rows_q], q[rows_q], k[rows_k], v[rows_k], out[rows_q], kept, part
        )
    of_long = (
        _long_rows(x, rows, part)
        for x, rows in ((q, rows_q), (k, rows_k), (v, rows_k), (out, rows_q))
    )
    found = kernels.long_backward(_long_rows(grad, rows_q, part, is_gradient=True), *of_long, kept)
    return tuple(_to_tokens_first(x, part) for x in found)


def _long_rows(
    x_smH: torch.Tensor, rows: slice, part: Part, *, is_gradient: bool = False
) -> torch.Tensor:
    """The documents' rows with their padding as [n, m, L, H], a view where that is possible."""
    end = rows.start + part.documents * part.padded
    if part.is_padded and (is_gradient or end > len(x_smH)):
        padded = x_smH.new_empty(part.padded, *x_smH.shape[1:])
        padded[: part.length] = x_smH[rows]
        # Not what lies there: an infinity times zero is not zero.
        padded[part.length :] = 0
    else:
        padded = x_smH[rows.start : end]
    return padded.unflatten(0, (part.documents, part.padded)).transpose(1, 2)


def _to_tokens_first(x_nmLH: torch.Tensor, part: Part) -> torch.Tensor:
    """-> [s, m, H], without the padding."""
    return x_nmLH.transpose(1, 2).flatten(0, 1)[: part.documents * part.length]


# ---------------------------------------------------------------- the kernels of a GPU

# Called below autograd and by position: the operators have these arguments in torch 2.11 and 2.13.
_NO_DROPOUT = 0.0
_IS_CAUSAL = True
_WINDOW: dict[str, Any] = {"window_size_left": -1, "window_size_right": 0}


def _cudnn_forward(q, k, v) -> tuple[torch.Tensor, Kept]:
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, _NO_DROPOUT, _IS_CAUSAL, False
    )
    out, log_sums, _, _, _, _, seed, offset, _ = found
    return out, (log_sums, seed, offset)


def _cudnn_backward(grad, q, k, v, out, kept: Kept):
    log_sums, seed, offset = kept
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        log_sums,
        seed,
        offset,
        None,
        None,
        None,
        q.shape[2],
        k.shape[2],
        _NO_DROPOUT,
        _IS_CAUSAL,
    )


def _varlen_forward(q, k, v, part: Part) -> tuple[torch.Tensor, Kept]:
    out, log_sums, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        part.cu_q,
        part.cu_k,
        part.max_q,
        part.max_k,
        _NO_DROPOUT,
        _IS_CAUSAL,
        False,
        **_WINDOW,
    )
    return out, (log_sums, seed, offset)


def _varlen_backward(grad, q, k, v, out, kept: Kept, part: Part):
    log_sums, seed, offset = kept
    return torch.ops.aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        log_sums,
        part.cu_q,
        part.cu_k,
        part.max_q,
        part.max_k,
        _NO_DROPOUT,
        _IS_CAUSAL,
        seed,
        offset,
        **_WINDOW,
    )


GPU_KERNELS = Kernels(_cudnn_forward, _cudnn_backward, _varlen_forward, _varlen_backward)


def why_mixed_cannot_run(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int]
) -> str | None:
    """Run both kernels on a few tokens -> what the first that fails says, in one line, or None.

    Args:
        heads: query heads, key/value heads, head size.
    """
    query, kv, size = heads
    q = torch.zeros(GRANULE_TOKENS, query, size, device=device, dtype=dtype)
    k = torch.zeros(GRANULE_TOKENS, kv, size, device=device, dtype=dtype)
    cu = torch.arange(0, GRANULE_TOKENS + 1, GRANULE_TOKENS, device=device, dtype=torch.int32)
    rows = slice(0, GRANULE_TOKENS)
    for name, length in (("cuDNN", GRANULE_TOKENS), ("torch's varlen op", 0)):
        part = Part(rows, rows, 1, length, length, cu, cu, GRANULE_TOKENS, GRANULE_TOKENS)
        try:
            out, kept = _forward(q, k, k, part, GPU_KERNELS)
            _backward(out, q, k, k, out, kept, part, GPU_KERNELS)
        except RuntimeError as error:
            shape = f"{query} query and {kv} key/value heads of size {size}"
            return f"{name} does not run here with {shape}: {str(error).splitlines()[0]}"
    return None
