"""The attention backend over torch's scaled_dot_product_attention: a call per document.

No mask is made, but for fp64 on a GPU, which has no kernel for it: torch then makes one for a document
that has more keys than queries.

A document that began in another rank's chunk has more keys than queries: its queries see all of the
earlier keys and, causally, their own. torch's causal flag means that only where both counts are equal.
"""

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _ContinuedOnCPU(torch.autograd.Function):
    """Attention to the earlier keys and to the own keys, merged by their log-sum-exp; no mask is made.

    Shapes: q [1, heads, L, H], k and v [1, heads, L + earlier, H]. Source: ring attention's merge of
    blocks (arXiv 2310.01889); backward runs each block with the merged output and log-sum-exp.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        earlier = k.shape[2] - q.shape[2]
        before, before_lse = _forward(q, k[:, :, :earlier], v[:, :, :earlier])
        own, own_lse = _forward(q, k[:, :, earlier:], v[:, :, earlier:], is_causal=True)
        lse = torch.logaddexp(before_lse, own_lse)
        out = before * (before_lse - lse).exp()[..., None] + own * (own_lse - lse).exp()[..., None]
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse = ctx.saved_tensors
        earlier = k.shape[2] - q.shape[2]
        parts = [_backward(grad_out, q, k[:, :, rows], v[:, :, rows], out, lse, 0.0, is_causal)
                 for rows, is_causal in ((slice(0, earlier), False), (slice(earlier, None), True))]
        (before_q, *before_kv), (own_q, *own_kv) = parts
        grad_k, grad_v = (torch.cat(pair, dim=2) for pair in zip(before_kv, own_kv, strict=True))
        return before_q + own_q, grad_k, grad_v


def document_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention inside one document: q [1, heads, L, H] are its last L positions, k and v all of them."""
    if q.shape[2] == k.shape[2]:
        return scaled_dot_product_attention(q, k, v, is_causal=True)
    if q.device.type == "cpu":
        return _ContinuedOnCPU.apply(q, k, v)
    return scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]))
