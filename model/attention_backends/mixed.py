"""The attention backend `mixed`: cuDNN for long documents, torch's varlen op for all others.

On Hopper, torch's varlen op is FlashAttention 2, which was not written for it: on an H100 at head
size 128 it reached 326 and 325 TFLOP/s forward and backward, cuDNN 542 and 544 (one document of
262,144 tokens; tools/bench/RESULTS.md).
cuDNN takes one document per call (or several of one length), so that short documents are faster
together in the varlen op. That op also takes documents that continue another rank's tokens, whose
queries are their last positions.

Long documents are padded at their end (kernel_calls.py). Rows at the end change nothing before
them, since attention is causal, and the gradient of their output is zero. The rows that follow the
document serve as padding, whatever they are, so that q, k and v are copied only where the call ends
before the padding does.

Nothing but q, k, v, the output and the log-sum-exps is kept for backward, so that q, k and v may be
freed and filled again in between (activation_memory/saved_attention.py). Padded copies are made
again in backward.

Legend: m query and k key/value heads, H head size, n documents of one length L, s tokens of a
kernel call.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.attention_backends.backend import Attend, Backend, HeadShape, is_hopper_or_later
from model.attention_backends.documents import KernelCall
from model.attention_backends.kernel_calls import GRANULE_TOKENS, NEVER, split_documents
from model.attention_backends.sinks import SinkGradients, put_sinks
from model.scoring import PLAIN, Scoring, ScoringNeeds

Kept = tuple[torch.Tensor | None, ...]
"""What a kernel's backward needs beside q, k, v and the output: log-sum-exps, unused seeds."""
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Gradients of q, k and v."""


@dataclass(frozen=True)
class Kernels:
    """The two kernels under the backend. Tests put others in their place."""

    long_forward: Callable[..., tuple[torch.Tensor, Kept]]
    """(q [n, m, L, H], k [n, k, L, H], v, scoring) -> the output [n, m, L, H], and what is kept."""
    long_backward: Callable[..., Gradients]
    """(gradient of the output, q, k, v, output, what was kept, scoring) -> those of q, k and v."""
    short_forward: Callable[..., tuple[torch.Tensor, Kept]]
    """The same of packed documents [s, m, H]; the call with their bounds comes before scoring."""
    short_backward: Callable[..., Gradients]
    """The same of packed documents; the kernel call and the scoring are its last arguments."""


def mixed_attention(crossover: int, kernels: Kernels | None = None) -> Attend:
    """Make the attend function whose documents of at least `crossover` tokens go to cuDNN.

    In a layer with a window all go to the varlen op, unless none is longer than the window.
    """
    kernels = kernels or GPU_KERNELS

    def attend(q_smH, k_skH, v_skH, documents, scoring=PLAIN, sinks=None, /):
        assert scoring.softcap is None, "Backend.missing was asked before"
        # cuDNN takes no window through torch. Where no document is longer, it changes nothing.
        window = scoring.window
        is_cut = window is not None and documents.max_k > window
        calls = split_documents(documents, NEVER if is_cut else crossover)
        return _Mixed.apply(q_smH, k_skH, v_skH, sinks, calls, kernels, scoring)

    return attend


class _Mixed(torch.autograd.Function):
    """Computes all documents of a call as one node; each part's result is written in its place."""

    @staticmethod
    def forward(
        ctx,
        q_smH,
        k_skH,
        v_skH,
        sinks_m,
        calls: list[KernelCall],
        kernels: Kernels,
        scoring: Scoring,
    ):
        out_smH = None if _is_whole(calls) else q_smH.new_empty(q_smH.shape)
        kept = []
        for call in calls:
            result, kept_of_call = _forward(q_smH, k_skH, v_skH, sinks_m, call, kernels, scoring)
            kept.append(kept_of_call)
            if out_smH is None:
                out_smH = result
            else:
                # Written where it belongs, so that no result is kept twice.
                out_smH[call.rows_q] = result
            del result  # not beside the next call's
        ctx.calls = calls
        ctx.kernels = kernels
        ctx.scoring = scoring
        # Kept flat, as autograd wants it, with the number of each call's tensors.
        ctx.kept_counts = [len(each) for each in kept]
        ctx.save_for_backward(
            q_smH, k_skH, v_skH, sinks_m, out_smH, *(x for each in kept for x in each)
        )
        return out_smH

    @staticmethod
    def backward(ctx, *grads):
        (grad_smH,) = grads
        q_smH, k_skH, v_skH, sinks_m, out_smH, *kept = ctx.saved_tensors
        grad_sinks = SinkGradients(sinks_m)
        # torch finds cuDNN's plans by the layout of q, k and v alone: the gradient needs one
        # layout.
        grad_smH = grad_smH.contiguous()
        is_whole = _is_whole(ctx.calls)
        wholes = [] if is_whole else [x.new_empty(x.shape) for x in (q_smH, k_skH, v_skH)]
        for call, count in zip(ctx.calls, ctx.kept_counts, strict=True):
            kept_of_call = tuple(kept[:count])
            kept = kept[count:]
            found = _backward(
                (grad_smH, q_smH, k_skH, v_skH, out_smH),
                kept_of_call,
                call,
                ctx.kernels,
                ctx.scoring,
                grad_sinks,
            )
            if is_whole:
                return *found, grad_sinks.total(), None, None, None
            # Write each gradient in its place, then free it before the next call.
            rows_of_qkv = (call.rows_q, call.rows_k, call.rows_k)
            for whole, rows, gradient in zip(wholes, rows_of_qkv, found, strict=True):
                whole[rows] = gradient
            del found, gradient
        return *wholes, grad_sinks.total(), None, None, None


def _is_whole(calls: list[KernelCall]) -> bool:
    """Tell whether the kernel's result is that of the whole attention call."""
    return len(calls) == 1 and not calls[0].is_padded


def _forward(
    q, k, v, sinks_m: torch.Tensor | None, call: KernelCall, kernels: Kernels, scoring: Scoring
) -> tuple[torch.Tensor, Kept]:
    """Compute a kernel call's output [s, m, H] from the whole attention call's q, k and v."""
    if not call.is_long:
        out, kept = kernels.short_forward(
            q[call.rows_q], k[call.rows_k], v[call.rows_k], call, scoring
        )
        kept = _with_sinks(out.transpose(0, 1), kept, sinks_m)
        return out, kept
    out, kept = kernels.long_forward(
        _long_rows(q, call.rows_q, call),
        _long_rows(k, call.rows_k, call),
        _long_rows(v, call.rows_k, call),
        scoring,
    )
    # Before the change of layout, which may copy.
    kept = _with_sinks(out, kept, sinks_m)
    return _to_tokens_first(out, call), kept


def _with_sinks(out_mLH: torch.Tensor, kept: Kept, sinks_m: torch.Tensor | None) -> Kept:
    """Put sinks into a kernel's output; return what is kept with its log-sum-exps so, too."""
    log_sums, *rest = kept
    if sinks_m is None or log_sums is None:
        return kept
    # cuDNN's have one more dim, of size 1.
    with_sinks = put_sinks(out_mLH, log_sums.view(out_mLH.shape[:-1]), sinks_m)
    return with_sinks.view(log_sums.shape), *rest


def _backward(
    tensors: tuple[torch.Tensor, ...],
    kept: Kept,
    call: KernelCall,
    kernels: Kernels,
    scoring: Scoring,
    grad_sinks: SinkGradients,
) -> tuple[torch.Tensor, ...]:
    """Compute the gradients of a kernel call's q, k and v, and add that of its sinks.

    Args:
        tensors: the output's gradient, q, k, v and the output of the whole attention call.
    """
    grad, q, k, v, out = tensors
    rows_q = call.rows_q
    rows_k = call.rows_k
    # The varlen op takes packed rows, cuDNN documents of one length.
    if not call.is_long:
        grad_sinks.add(grad[rows_q].transpose(0, 1), out[rows_q].transpose(0, 1), kept[0])
        return kernels.short_backward(
            grad[rows_q], q[rows_q], k[rows_k], v[rows_k], out[rows_q], kept, call, scoring
        )
    grad_long = _long_rows(grad, rows_q, call, is_gradient=True)
    out_long = _long_rows(out, rows_q, call)
    grad_sinks.add(grad_long, out_long, kept[0])
    found = kernels.long_backward(
        grad_long,
        _long_rows(q, rows_q, call),
        _long_rows(k, rows_k, call),
        _long_rows(v, rows_k, call),
        out_long,
        kept,
        scoring,
    )
    return tuple(_to_tokens_first(x, call) for x in found)


def _long_rows(
    x_smH: torch.Tensor, rows: slice, call: KernelCall, *, is_gradient: bool = False
) -> torch.Tensor:
    """Cut out the documents' rows with their padding as [n, m, L, H], a view where possible."""
    end = rows.start + call.documents * call.padded
    if call.is_padded and (is_gradient or end > len(x_smH)):
        padded = x_smH.new_empty(call.padded, *x_smH.shape[1:])
        padded[: call.length] = x_smH[rows]
        # Not whatever the memory holds: an infinity times zero is not zero.
        padded[call.length :] = 0
    else:
        padded = x_smH[rows.start : end]
    return padded.unflatten(0, (call.documents, call.padded)).transpose(1, 2)


def _to_tokens_first(x_nmLH: torch.Tensor, call: KernelCall) -> torch.Tensor:
    """Turn [n, m, L, H] into [s, m, H], without the padding."""
    return x_nmLH.transpose(1, 2).flatten(0, 1)[: call.documents * call.length]


# -- the kernels of a GPU

# They are called below autograd and by position: the operators have these arguments in torch 2.11
# and 2.13.
_NO_DROPOUT = 0.0
_IS_CAUSAL = True


def _window_of(scoring: Scoring) -> dict[str, int]:
    """Spell a window as the varlen op does: how many tokens are seen on the left and right.

    With one, the op is not told that it is causal, as torch's varlen_attn calls it.
    """
    left = -1 if scoring.window is None else scoring.window - 1
    return {"window_size_left": left, "window_size_right": 0}


def _cudnn_forward(q, k, v, scoring: Scoring) -> tuple[torch.Tensor, Kept]:
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, _NO_DROPOUT, _IS_CAUSAL, False, scale=scoring.scale
    )
    out, log_sums, _, _, _, _, seed, offset, _ = found
    return out, (log_sums, seed, offset)


def _cudnn_backward(grad, q, k, v, out, kept: Kept, scoring: Scoring) -> Gradients:
    log_sums, seed, offset = kept
    no_bias = no_bounds = None
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        log_sums,
        seed,
        offset,
        no_bias,
        no_bounds,
        no_bounds,
        q.shape[2],
        k.shape[2],
        _NO_DROPOUT,
        _IS_CAUSAL,
        scale=scoring.scale,
    )


def _varlen_forward(q, k, v, call: KernelCall, scoring: Scoring) -> tuple[torch.Tensor, Kept]:
    out, log_sums, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        call.cu_q,
        call.cu_k,
        call.max_q,
        call.max_k,
        _NO_DROPOUT,
        scoring.window is None,
        False,
        scale=scoring.scale,
        **_window_of(scoring),
    )
    return out, (log_sums, seed, offset)


def _varlen_backward(
    grad, q, k, v, out, kept: Kept, call: KernelCall, scoring: Scoring
) -> Gradients:
    log_sums, seed, offset = kept
    return torch.ops.aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        log_sums,
        call.cu_q,
        call.cu_k,
        call.max_q,
        call.max_k,
        _NO_DROPOUT,
        scoring.window is None,
        seed,
        offset,
        scale=scoring.scale,
        **_window_of(scoring),
    )


GPU_KERNELS = Kernels(_cudnn_forward, _cudnn_backward, _varlen_forward, _varlen_backward)


def why_mixed_cannot_run(device: torch.device, dtype: torch.dtype, heads: HeadShape) -> str | None:
    """Run both kernels on a few tokens; return the first error in one line, or None."""
    query_heads, kv_heads, size = heads
    q = torch.zeros(GRANULE_TOKENS, query_heads, size, device=device, dtype=dtype)
    k = torch.zeros(GRANULE_TOKENS, kv_heads, size, device=device, dtype=dtype)
    cu = torch.arange(0, GRANULE_TOKENS + 1, GRANULE_TOKENS, device=device, dtype=torch.int32)
    rows = slice(0, GRANULE_TOKENS)
    for name, length in (("cuDNN", GRANULE_TOKENS), ("torch's varlen op", 0)):
        call = KernelCall(rows, rows, 1, length, length, cu, cu, GRANULE_TOKENS, GRANULE_TOKENS)
        try:
            out, kept = _forward(q, k, k, None, call, GPU_KERNELS, PLAIN)
            _backward((out, q, k, k, out), kept, call, GPU_KERNELS, PLAIN, SinkGradients(None))
        except RuntimeError as error:
            shape = f"{query_heads} query and {kv_heads} key/value heads of size {size}"
            return f"{name} does not run here with {shape}: {str(error).splitlines()[0]}"
    return None


def _not_scored(needs: ScoringNeeds, _device: torch.device) -> str | None:
    """Say why neither kernel can compute what is needed, or None."""
    return "cuDNN and torch's varlen op cap no scores" if needs.softcap else None


def _behind_flash_attention(device: torch.device) -> str | None:
    if not is_hopper_or_later(device):
        return "cuDNN is ahead of FlashAttention 2 on Hopper and later only"
    return None


BACKEND = Backend(
    name="mixed",
    make=mixed_attention,
    obstacle=why_mixed_cannot_run,
    why_behind=_behind_flash_attention,
    why_not_scored=_not_scored,
)
