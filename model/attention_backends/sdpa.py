"""The attention backend over torch's scaled_dot_product_attention: a call per document.

No mask is made, but for fp64 on a GPU, which has no kernel for it: torch then makes one for a
document that has more keys than queries.

A document that began in another rank's chunk has more keys than queries: its queries see all of the
earlier keys and, causally, their own. torch's causal flag means that only where both counts are
equal.

Legend: n queries and s keys of a call, L and S those of one document, m query and k key/value
heads, H head size.
"""

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def sdpa_attention(
    q_nmH: torch.Tensor,
    k_skH: torch.Tensor,
    v_skH: torch.Tensor,
    rows_q: list[slice],
    rows_k: list[slice],
) -> torch.Tensor:
    """Causal attention inside each document -> [n, m, H].

    Args:
        rows_q, rows_k: of each document; its queries are its last positions.
    """
    if q_nmH.device.type == "cpu":
        return _DocumentsOnCPU.apply(q_nmH, k_skH, v_skH, rows_q, rows_k)
    return _one_by_one(q_nmH, k_skH, v_skH, rows_q, rows_k)


def _one_by_one(q_nmH, k_skH, v_skH, rows_q: list[slice], rows_k: list[slice]) -> torch.Tensor:
    # Split, not sliced: the gradient of each slice would be as large as that of the whole.
    lengths_q, lengths_k = ([part.stop - part.start for part in rows] for rows in (rows_q, rows_k))
    parts = []
    for document in zip(
        q_nmH.split(lengths_q), k_skH.split(lengths_k), v_skH.split(lengths_k), strict=True
    ):
        q, k, v = (_heads_first(x) for x in document)
        how = (
            {"is_causal": True}
            if q.shape[2] == k.shape[2]
            else {"attn_mask": causal_lower_right(q.shape[2], k.shape[2])}
        )
        parts.append(
            _tokens_first(
                scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **how)
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _DocumentsOnCPU(torch.autograd.Function):
    """All documents of a call as one node, over the kernel under scaled_dot_product_attention.

    Results are written where they belong, so that no document's result is kept twice.
    """

    @staticmethod
    def forward(ctx, q_nmH, k_skH, v_skH, rows_q, rows_k):
        out_nmH = None
        ctx.log_sums = []
        for of_q, of_k in zip(rows_q, rows_k, strict=True):
            part, log_sum = _document(
                _heads_first(q_nmH[of_q]), _heads_first(k_skH[of_k]), _heads_first(v_skH[of_k])
            )
            if len(rows_q) == 1:
                out_nmH = _tokens_first(part)
            else:
                out_nmH = torch.empty_like(q_nmH) if out_nmH is None else out_nmH
                out_nmH[of_q] = _tokens_first(part)
            ctx.log_sums.append(log_sum)
        ctx.rows = rows_q, rows_k
        ctx.save_for_backward(q_nmH, k_skH, v_skH, out_nmH)
        return out_nmH

    @staticmethod
    def backward(ctx, grad_nmH):
        q_nmH, k_skH, v_skH, out_nmH = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q_nmH, k_skH, v_skH)]
        for of_q, of_k, log_sum in zip(*ctx.rows, ctx.log_sums, strict=True):
            parts = _document_gradients(
                *(
                    _heads_first(x)
                    for x in (grad_nmH[of_q], q_nmH[of_q], k_skH[of_k], v_skH[of_k], out_nmH[of_q])
                ),
                log_sum,
            )
            for whole, rows, part in zip(grads, (of_q, of_k, of_k), parts, strict=True):
                whole[rows] = _tokens_first(part)
        return *grads, None, None


def _heads_first(x_LmH: torch.Tensor) -> torch.Tensor:
    return x_LmH.transpose(0, 1)[None]


def _tokens_first(x_mLH: torch.Tensor) -> torch.Tensor:
    return x_mLH[0].transpose(0, 1)


def _document(q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """One document's output and log-sum-exp: q [1, m, L, H], k and v [1, k, S, H] -> [1, m, L, H],
    [1, m, L].

    Where keys came before the queries: attention to the earlier and to the own keys, merged by
    their log-sum-exp. Source: ring attention's merge of blocks (arXiv 2310.01889); the gradients
    then follow from the merged ones.
    """
    earlier = k.shape[2] - q.shape[2]
    if earlier == 0:
        return _forward(q, k, v, is_causal=True)
    before, before_sum = _forward(q, k[:, :, :earlier], v[:, :, :earlier])
    own, own_sum = _forward(q, k[:, :, earlier:], v[:, :, earlier:], is_causal=True)
    log_sum = torch.logaddexp(before_sum, own_sum)
    out = (
        before * (before_sum - log_sum).exp()[..., None]
        + own * (own_sum - log_sum).exp()[..., None]
    )
    return out.to(q.dtype), log_sum


def _document_gradients(
    grad, q, k, v, out, log_sum
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) of `_document`."""
    earlier = k.shape[2] - q.shape[2]
    if earlier == 0:
        return _backward(grad, q, k, v, out, log_sum, 0.0, True)
    (before_q, *before_kv), (own_q, *own_kv) = (
        _backward(grad, q, k[:, :, rows], v[:, :, rows], out, log_sum, 0.0, is_causal)
        for rows, is_causal in ((slice(0, earlier), False), (slice(earlier, None), True))
    )
    return before_q + own_q, *(
        torch.cat(pair, dim=2) for pair in zip(before_kv, own_kv, strict=True)
    )
