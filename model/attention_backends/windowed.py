"""Attention with a sliding window over torch's SDPA, a block of queries at a time.

A block of queries reads the keys of its window only, so that the work grows with tokens x window.
One mask serves all blocks: a smaller one takes its last rows and columns.

Legend: n queries and s keys of a call, m query and k key/value heads, H head size; b queries and c
keys of a block.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import scaled_dot_product_attention

from model.attention_backends.sinks import SinkGradients, put_sinks
from model.windows import Window

BLOCK = 256
"""Queries of a block. A larger block scores more pairs outside the window, W + b - 1 for each query
instead of W; a smaller one makes more calls."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Block:
    """Some queries of a document, and the keys that they see."""

    rows_q: slice
    rows_k: slice


def blocks_of_document(rows_q: slice, rows_k: slice, window: Window) -> list[Block]:
    """Cut a document into blocks; its queries are the last positions of its keys."""
    earlier = (rows_k.stop - rows_k.start) - (rows_q.stop - rows_q.start)
    blocks = []
    for begin in range(rows_q.start, rows_q.stop, BLOCK):
        end = min(begin + BLOCK, rows_q.stop)
        # Positions of the block's queries, counted from the document's first key.
        first = earlier + begin - rows_q.start
        last = earlier + end - rows_q.start
        first_seen = 0 if window is None else max(0, first - window + 1)
        seen = slice(rows_k.start + first_seen, rows_k.start + last)
        blocks.append(Block(slice(begin, end), seen))
    return blocks


@lru_cache(maxsize=4)
def window_mask(window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what is added to a whole block's scores: 0 where a key is seen, else -inf.

    Its last query and its last key are the same token: [BLOCK, window + BLOCK - 1]. In fp32 a
    window of 4,096 tokens takes 4 MiB, one of 131,072 takes 128. Up to four masks stay, those of
    the latest windows and dtypes; a run has one of each size of window, and of its dtype.
    """
    keys = window + BLOCK - 1
    query = torch.arange(keys - BLOCK, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    is_seen = (key <= query) & (key > query - window)
    mask = torch.zeros(BLOCK, keys, dtype=dtype, device=device)
    return mask.masked_fill_(~is_seen, float("-inf"))


def _mask_of(block: Block, window: int, q: torch.Tensor) -> torch.Tensor:
    """Return a block's mask [b, c]: the last rows and columns of that of a whole block."""
    queries = block.rows_q.stop - block.rows_q.start
    keys = block.rows_k.stop - block.rows_k.start
    return window_mask(window, q.dtype, q.device)[-queries:, -keys:]


def _aligned_mask_of(block: Block, window: int, q: torch.Tensor) -> torch.Tensor:
    """Return a block's mask [b, c] with memory of its own, where it is not that of a whole block.

    A GPU's kernel refuses a mask that begins at an odd place. torch copies a mask whose rows are
    not aligned, but does not look at where the first one begins.
    """
    mask_bc = _mask_of(block, window, q)
    if mask_bc.storage_offset() == 0:
        return mask_bc
    # Not `contiguous`, which keeps a single row where it is.
    return mask_bc.clone(memory_format=torch.contiguous_format)


def windowed_attention(
    q_nmH: torch.Tensor,
    k_skH: torch.Tensor,
    v_skH: torch.Tensor,
    rows_q: list[slice],
    rows_k: list[slice],
    window: int,
    scale: float | None = None,
    sinks_m: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the last `window` tokens of each token's document, itself included -> [n, m, H].

    Args:
        rows_q, rows_k: of each document; its queries are its last positions.
        sinks_m: on a CPU only.
    """
    blocks = [
        block
        for of_q, of_k in zip(rows_q, rows_k, strict=True)
        for block in blocks_of_document(of_q, of_k, window)
    ]
    if q_nmH.device.type == "cpu":
        return _BlocksOnCPU.apply(q_nmH, k_skH, v_skH, sinks_m, blocks, window, scale)
    assert sinks_m is None, "other devices have another path"
    return attend_by_blocks(q_nmH, k_skH, v_skH, blocks, window, scale)


def attend_by_blocks(
    q_nmH: torch.Tensor,
    k_skH: torch.Tensor,
    v_skH: torch.Tensor,
    blocks: list[Block],
    window: int,
    scale: float | None,
) -> torch.Tensor:
    """Attend block by block with a kernel that torch chooses, on any device -> [n, m, H]."""
    return _Blocks.apply(q_nmH, k_skH, v_skH, blocks, window, scale)


class _Blocks(torch.autograd.Function):
    """All blocks of a call as one node, whose backward computes each block once more.

    A block's gradients are of its rows, and are added up where they belong: in one graph over
    slices, each slice's gradient would be as large as that of the whole. No block keeps anything:
    of the kernels that torch may choose, one would keep all of its scores.
    """

    @staticmethod
    def forward(ctx, q_nmH, k_skH, v_skH, blocks: list[Block], window: int, scale: float | None):
        out_nmH = q_nmH.new_empty(q_nmH.shape)
        for block in blocks:
            mask_bc = _aligned_mask_of(block, window, q_nmH)
            rows_k = block.rows_k
            out_nmH[block.rows_q] = _one_block(
                q_nmH[block.rows_q], k_skH[rows_k], v_skH[rows_k], mask_bc, scale
            )
        ctx.blocks = blocks
        ctx.window = window
        ctx.scale = scale
        ctx.save_for_backward(q_nmH, k_skH, v_skH)
        return out_nmH

    @staticmethod
    def backward(ctx, *grads):
        (grad_nmH,) = grads
        q_nmH, k_skH, v_skH = ctx.saved_tensors
        grad_q = torch.empty_like(q_nmH)
        # Several blocks add to a key's gradients: in fp32, as sums of bf16 would lose digits.
        wide = torch.promote_types(k_skH.dtype, torch.float32)
        grad_k = torch.zeros_like(k_skH, dtype=wide)
        grad_v = torch.zeros_like(v_skH, dtype=wide)
        for block in ctx.blocks:
            mask_bc = _aligned_mask_of(block, ctx.window, q_nmH)
            q_bmH = q_nmH[block.rows_q].detach().requires_grad_()
            k_ckH = k_skH[block.rows_k].detach().requires_grad_()
            v_ckH = v_skH[block.rows_k].detach().requires_grad_()
            with torch.enable_grad():
                part_bmH = _one_block(q_bmH, k_ckH, v_ckH, mask_bc, ctx.scale)
            leaves = (q_bmH, k_ckH, v_ckH)
            of_q, of_k, of_v = torch.autograd.grad(part_bmH, leaves, grad_nmH[block.rows_q])
            grad_q[block.rows_q] = of_q
            grad_k[block.rows_k] += of_k
            grad_v[block.rows_k] += of_v
        return grad_q, grad_k.to(k_skH.dtype), grad_v.to(v_skH.dtype), None, None, None


def _one_block(
    q_bmH: torch.Tensor,
    k_ckH: torch.Tensor,
    v_ckH: torch.Tensor,
    mask_bc: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Attend with a block's queries to its keys -> [b, m, H]."""
    q, k, v = (heads_first(x) for x in (q_bmH, k_ckH, v_ckH))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask_bc, scale=scale, enable_gqa=grouped)
    return tokens_first(out)


class _BlocksOnCPU(torch.autograd.Function):
    """All blocks of a call as one node, over the kernel under scaled_dot_product_attention.

    Results are written where they belong, and what blocks share of the keys' gradients is added up
    there.
    """

    @staticmethod
    def forward(
        ctx, q_nmH, k_skH, v_skH, sinks_m, blocks: list[Block], window: int, scale: float | None
    ):
        out_nmH = q_nmH.new_empty(q_nmH.shape)
        ctx.log_sums = []
        for block in blocks:
            part, log_sum = _forward(
                heads_first(q_nmH[block.rows_q]),
                heads_first(k_skH[block.rows_k]),
                heads_first(v_skH[block.rows_k]),
                attn_mask=_mask_of(block, window, q_nmH),
                scale=scale,
            )
            if sinks_m is not None:
                log_sum = put_sinks(part, log_sum, sinks_m)
            out_nmH[block.rows_q] = tokens_first(part)
            ctx.log_sums.append(log_sum)
        ctx.blocks = blocks
        ctx.window = window
        ctx.scale = scale
        ctx.save_for_backward(q_nmH, k_skH, v_skH, out_nmH, sinks_m)
        return out_nmH

    @staticmethod
    def backward(ctx, *grads):
        (grad_nmH,) = grads
        q_nmH, k_skH, v_skH, out_nmH, sinks_m = ctx.saved_tensors
        grad_q = torch.empty_like(q_nmH)
        # Several blocks add to a key's gradients: in fp32, as sums of bf16 would lose digits.
        wide = torch.promote_types(k_skH.dtype, torch.float32)
        grad_k = torch.zeros_like(k_skH, dtype=wide)
        grad_v = torch.zeros_like(v_skH, dtype=wide)
        no_dropout = 0.0
        grad_sinks = SinkGradients(sinks_m)
        for block, log_sum in zip(ctx.blocks, ctx.log_sums, strict=True):
            grad = heads_first(grad_nmH[block.rows_q])
            out = heads_first(out_nmH[block.rows_q])
            grad_sinks.add(grad, out, log_sum)
            of_q, of_k, of_v = _backward(
                grad,
                heads_first(q_nmH[block.rows_q]),
                heads_first(k_skH[block.rows_k]),
                heads_first(v_skH[block.rows_k]),
                out,
                log_sum,
                no_dropout,
                False,
                attn_mask=_mask_of(block, ctx.window, q_nmH),
                scale=ctx.scale,
            )
            grad_q[block.rows_q] = tokens_first(of_q)
            grad_k[block.rows_k] += tokens_first(of_k)
            grad_v[block.rows_k] += tokens_first(of_v)
        grads_kv = (grad_k.to(k_skH.dtype), grad_v.to(v_skH.dtype))
        return grad_q, *grads_kv, grad_sinks.total(), None, None, None


def heads_first(x_LmH: torch.Tensor) -> torch.Tensor:
    """View [L, m, H] as the kernels' [1, m, L, H]."""
    return x_LmH.transpose(0, 1)[None]


def tokens_first(x_mLH: torch.Tensor) -> torch.Tensor:
    """View [1, m, L, H] as [L, m, H]."""
    return x_mLH[0].transpose(0, 1)
