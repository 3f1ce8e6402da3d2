"""The attention backend over torch's scaled_dot_product_attention: a call per document.

A document that began in another rank's chunk has more keys than queries: its queries see all of the
earlier keys and, causally, their own. torch's causal flag means that only where both counts are
equal.

A CPU and a GPU take two paths, since a measurement says so: 8,192 tokens in 16 documents, 8 query
and 2 key/value heads of size 64, on a CPU, in units of the output (LiveMemory of the tests):

    path                                kept for backward   peak of forward and backward
    one by one, autograd's graph        2.02                4.50
    all documents in one function       1.02                3.70

The function calls the kernel of a CPU by name, and makes no mask where keys came before the
queries. A GPU has one of several kernels, which torch chooses. No mask is made there either, but
for fp64, which has no kernel: torch then makes one for a document that has more keys than queries.

Legend: n queries and s keys of a call, L and S those of one document, m query and k key/value
heads, H head size.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from model.attention_backends.backend import Attend, Backend
from model.attention_backends.sinks import SinkGradients, put_sinks
from model.attention_backends.tiled import tiled_attention
from model.attention_backends.windowed import heads_first, tokens_first, windowed_attention
from model.scoring import PLAIN, Scoring

SPREAD_TOKENS = 512
"""Tokens of a document from which heads that are spread over its memory are copied together first.

They are spread after an exchange and in groups of heads. The copies pay for themselves: attention
to 2,048 tokens and more takes 1 to 7 % less, forward and backward. To 512 it takes as long, and to
128 up to 10 % longer.
"""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def sdpa_attention(
    q_nmH: torch.Tensor,
    k_skH: torch.Tensor,
    v_skH: torch.Tensor,
    rows_q: list[slice],
    rows_k: list[slice],
    scoring: Scoring = PLAIN,
    sinks_m: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally inside each document -> [n, m, H].

    Args:
        rows_q, rows_k: of each document; its queries are its last positions.
        scoring: how pairs are scored.
        sinks_m: of the query heads.
    """
    window = scoring.window
    scale = scoring.scale
    is_on_cpu = q_nmH.device.type == "cpu"
    # torch has no kernel for caps, and gives no log-sum-exps of its kernels for a GPU.
    if scoring.softcap is not None or (sinks_m is not None and not is_on_cpu):
        return tiled_attention(q_nmH, k_skH, v_skH, rows_q, rows_k, scoring, sinks_m)
    # Where no document is longer, the window changes nothing.
    if window is not None and any(rows.stop - rows.start > window for rows in rows_k):
        return windowed_attention(q_nmH, k_skH, v_skH, rows_q, rows_k, window, scale, sinks_m)
    if is_on_cpu:
        return _DocumentsOnCPU.apply(q_nmH, k_skH, v_skH, sinks_m, rows_q, rows_k, scale)
    return _one_by_one(q_nmH, k_skH, v_skH, rows_q, rows_k, scale)


def _one_by_one(
    q_nmH: torch.Tensor,
    k_skH: torch.Tensor,
    v_skH: torch.Tensor,
    rows_q: list[slice],
    rows_k: list[slice],
    scale: float | None = None,
) -> torch.Tensor:
    """Attend document by document, each with autograd's own graph, and join the outputs."""
    # Split, not sliced: the gradient of each slice would be as large as that of the whole.
    lengths_q = [rows.stop - rows.start for rows in rows_q]
    lengths_k = [rows.stop - rows.start for rows in rows_k]
    documents = zip(
        q_nmH.split(lengths_q), k_skH.split(lengths_k), v_skH.split(lengths_k), strict=True
    )
    outputs = []
    for document in documents:
        # torch's causal flag is for as many keys as queries.
        q, k, v = (heads_first(x) for x in document)
        grouped = q.shape[1] != k.shape[1]
        if q.shape[2] == k.shape[2]:
            out = scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
            )
        else:
            # It takes a second to import, and most runs never come here.
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(q.shape[2], k.shape[2])
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped
            )
        outputs.append(tokens_first(out))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _DocumentsOnCPU(torch.autograd.Function):
    """All documents of a call as one node, over the kernel under scaled_dot_product_attention.

    Results are written where they belong, so that no document's result is kept twice.
    """

    @staticmethod
    def forward(ctx, q_nmH, k_skH, v_skH, sinks_m, rows_q, rows_k, scale):
        out_nmH = None
        ctx.log_sums = []
        for of_q, of_k in zip(rows_q, rows_k, strict=True):
            part, log_sum = _document(
                _to_read(q_nmH[of_q]), _to_read(k_skH[of_k]), _to_read(v_skH[of_k]), scale
            )
            if sinks_m is not None:
                log_sum = put_sinks(part, log_sum, sinks_m)
            # A single document's output is the whole; several are written in their places. Either
            # way it is contiguous, whatever the strides of q: it is kept as plain bytes at times.
            if len(rows_q) == 1:
                out_nmH = tokens_first(part).contiguous()
            else:
                out_nmH = q_nmH.new_empty(q_nmH.shape) if out_nmH is None else out_nmH
                out_nmH[of_q] = tokens_first(part)
            ctx.log_sums.append(log_sum)
        ctx.rows_q = rows_q
        ctx.rows_k = rows_k
        ctx.scale = scale
        ctx.save_for_backward(q_nmH, k_skH, v_skH, out_nmH, sinks_m)
        return out_nmH

    @staticmethod
    def backward(ctx, *grads):
        (grad_nmH,) = grads
        q_nmH, k_skH, v_skH, out_nmH, sinks_m = ctx.saved_tensors
        grad_sinks = SinkGradients(sinks_m)
        wholes = None
        for of_q, of_k, log_sum in zip(ctx.rows_q, ctx.rows_k, ctx.log_sums, strict=True):
            grad = heads_first(grad_nmH[of_q])
            out = heads_first(out_nmH[of_q])
            grad_sinks.add(grad, out, log_sum)
            parts = _document_gradients(
                grad,
                _to_read(q_nmH[of_q]),
                _to_read(k_skH[of_k]),
                _to_read(v_skH[of_k]),
                out,
                log_sum,
                ctx.scale,
            )
            # A single document's gradients are the whole; several are written in their places.
            if len(ctx.rows_q) == 1:
                wholes = [tokens_first(part) for part in parts]
            else:
                wholes = wholes or [x.new_empty(x.shape) for x in (q_nmH, k_skH, v_skH)]
                for whole, rows, part in zip(wholes, (of_q, of_k, of_k), parts, strict=True):
                    whole[rows] = tokens_first(part)
        assert wholes is not None, "a call has at least one document"
        return *wholes, grad_sinks.total(), None, None, None


def _to_read(x_LmH: torch.Tensor) -> torch.Tensor:
    """Return a document's [1, m, L, H], a head's tokens together in memory if that is faster."""
    x_mLH = heads_first(x_LmH)
    tokens, _, size = x_LmH.shape
    is_spread = x_LmH.stride(0) > size
    return x_mLH.contiguous() if is_spread and tokens >= SPREAD_TOKENS else x_mLH


def _document(q, k, v, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute one document's output and log-sum-exp.

    Where keys came before the queries: attention to the earlier and to the own keys, merged by
    their log-sum-exp. Source: ring attention's merge of blocks (arXiv 2310.01889); the gradients
    then follow from the merged ones.

    Shapes: q [1, m, L, H], k and v [1, k, S, H] -> [1, m, L, H], [1, m, L].
    """
    earlier = k.shape[2] - q.shape[2]
    if earlier == 0:
        return _forward(q, k, v, is_causal=True, scale=scale)
    # All of the earlier keys, then causally the own ones.
    before, before_sum = _forward(q, k[:, :, :earlier], v[:, :, :earlier], scale=scale)
    own, own_sum = _forward(q, k[:, :, earlier:], v[:, :, earlier:], is_causal=True, scale=scale)
    # Each share of the softmax's sum weighs its part of the output.
    log_sum = torch.logaddexp(before_sum, own_sum)
    before_share = (before_sum - log_sum).exp()[..., None]
    own_share = (own_sum - log_sum).exp()[..., None]
    out = before * before_share + own * own_share
    return out.to(q.dtype), log_sum


def _document_gradients(
    grad, q, k, v, out, log_sum, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of `_document`'s q, k and v."""

    def gradients(rows: slice, *, is_causal: bool):
        no_dropout = 0.0
        return _backward(
            grad,
            q,
            k[:, :, rows],
            v[:, :, rows],
            out,
            log_sum,
            no_dropout,
            is_causal,
            scale=scale,
        )

    earlier = k.shape[2] - q.shape[2]
    if earlier == 0:
        return gradients(slice(None), is_causal=True)
    # The merged log-sum-exp makes the gradients of both parts those of the whole.
    before_q, before_k, before_v = gradients(slice(0, earlier), is_causal=False)
    own_q, own_k, own_v = gradients(slice(earlier, None), is_causal=True)
    return (
        before_q + own_q,
        torch.cat([before_k, own_k], dim=2),
        torch.cat([before_v, own_v], dim=2),
    )


def make_sdpa(_crossover: int) -> Attend:
    """Make the attend function."""

    def rows_between(bounds: list[int]) -> list[slice]:
        return [slice(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]

    def attend(q, k, v, documents, scoring=PLAIN, sinks=None, /):
        rows_q = rows_between(documents.bounds_q)
        rows_k = rows_between(documents.bounds_k)
        return sdpa_attention(q, k, v, rows_q, rows_k, scoring, sinks)

    return attend


BACKEND = Backend(name="sdpa", make=make_sdpa, needs_gpu=False)
