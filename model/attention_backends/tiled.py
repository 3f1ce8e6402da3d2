"""Attention by tiles of scores in plain matrix products, for what torch has no kernel for.

It computes capped scores, windows and sinks on any device: scores of some queries and some keys at
a time, once in the forward and again in the backward, and only where the window has keys, so that
the work grows with tokens x window. Nothing of [queries, keys] exists as a whole.

Sources: the running sums of FlashAttention (arXiv 2205.14135); capped scores of Gemma 2 (arXiv
2408.00118).

Legend: n queries and s keys of a call, m query and k key/value heads, g = m / k query heads of a
key/value head, H head size; b queries of a block and c keys of a tile.
"""

from collections.abc import Iterator

import torch

from model.attention_backends.sinks import SinkGradients, put_sinks
from model.attention_backends.windowed import BLOCK, Block, blocks_of_document
from model.scoring import Scoring

TILE_KEYS = 1024
"""Keys of a tile. With the 256 queries of a block, scores of a head take 1 MiB in fp32."""


def tiled_attention(
    q_nmH: torch.Tensor,
    k_skH: torch.Tensor,
    v_skH: torch.Tensor,
    rows_q: list[slice],
    rows_k: list[slice],
    scoring: Scoring,
    sinks_m: torch.Tensor | None,
) -> torch.Tensor:
    """Attend causally inside each document -> [n, m, H].

    Args:
        rows_q, rows_k: of each document; its queries are its last positions.
    """
    blocks = [
        block
        for of_q, of_k in zip(rows_q, rows_k, strict=True)
        for block in blocks_of_document(of_q, of_k, scoring.window)
    ]
    return _Tiles.apply(q_nmH, k_skH, v_skH, sinks_m, blocks, scoring)


def bytes_at_work(heads: int, queries: int, keys: int, element: int) -> int:
    """Return what a backward holds of a tile: scores, the cap's slopes, the scores' gradients."""
    return 3 * element * heads * min(BLOCK, queries) * min(TILE_KEYS, keys)


class _Tiles(torch.autograd.Function):
    """All blocks of a call as one node, which keeps q, k, v, the output and its log-sum-exps."""

    @staticmethod
    def forward(ctx, q_nmH, k_skH, v_skH, sinks_m, blocks: list[Block], scoring: Scoring):
        out_nmH = q_nmH.new_empty(q_nmH.shape)
        wide = torch.promote_types(q_nmH.dtype, torch.float32)
        log_sums_nm = q_nmH.new_empty(q_nmH.shape[:2], dtype=wide)
        for block in blocks:
            out_kgbH, log_sums_kgb = _block(q_nmH, k_skH, v_skH, block, scoring)
            out_mbH = out_kgbH.flatten(0, 1)
            log_sums_mb = log_sums_kgb.flatten(0, 1)
            if sinks_m is not None:
                log_sums_mb = put_sinks(out_mbH, log_sums_mb, sinks_m)
            out_nmH[block.rows_q] = out_mbH.transpose(0, 1)
            log_sums_nm[block.rows_q] = log_sums_mb.T
        ctx.blocks = blocks
        ctx.scoring = scoring
        ctx.save_for_backward(q_nmH, k_skH, v_skH, out_nmH, log_sums_nm, sinks_m)
        return out_nmH

    @staticmethod
    def backward(ctx, *grads):
        (grad_nmH,) = grads
        q_nmH, k_skH, v_skH, out_nmH, log_sums_nm, sinks_m = ctx.saved_tensors
        grad_q = torch.empty_like(q_nmH)
        # Several blocks add to a key's gradients.
        grad_k = torch.zeros_like(k_skH, dtype=log_sums_nm.dtype)
        grad_v = torch.zeros_like(v_skH, dtype=log_sums_nm.dtype)
        for block in ctx.blocks:
            _block_gradients(
                (grad_nmH, q_nmH, k_skH, v_skH, out_nmH, log_sums_nm),
                (grad_q, grad_k, grad_v),
                block,
                ctx.scoring,
            )
        grad_sinks = SinkGradients(sinks_m)
        grad_sinks.add(grad_nmH.transpose(0, 1), out_nmH.transpose(0, 1), log_sums_nm.T)
        grads_kv = (grad_k.to(k_skH.dtype), grad_v.to(v_skH.dtype))
        return grad_q, *grads_kv, grad_sinks.total(), None, None


def _block(
    q_nmH: torch.Tensor, k_skH: torch.Tensor, v_skH: torch.Tensor, block: Block, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a block's output [k, g, b, H] and log-sum-exps [k, g, b], both in at least fp32."""
    q_kgbH = _grouped(q_nmH[block.rows_q], k_skH.shape[1])
    wide = torch.promote_types(q_nmH.dtype, torch.float32)
    # Finite, so that the difference of two of them is a number.
    tops_kgb = q_kgbH.new_full(q_kgbH.shape[:-1], torch.finfo(wide).min, dtype=wide)
    sums_kgb = torch.zeros_like(tops_kgb)
    out_kgbH = torch.zeros_like(q_kgbH, dtype=wide)
    for rows, is_hidden_bc in _tiles(block, scoring, q_nmH.device):
        scores_kgbc, _ = _scores(q_kgbH, k_skH[rows], is_hidden_bc, scoring, with_slopes=False)
        # What was added up relative to the old maximum is made relative to the new one.
        new_tops_kgb = torch.maximum(tops_kgb, scores_kgbc.amax(-1))
        fading_kgb = (tops_kgb - new_tops_kgb).exp_()
        shares_kgbc = scores_kgbc.sub_(new_tops_kgb[..., None]).exp_()
        sums_kgb.mul_(fading_kgb).add_(shares_kgbc.sum(-1))
        out_kgbH.mul_(fading_kgb[..., None]).add_(_product(shares_kgbc, _heads(v_skH[rows])))
        tops_kgb = new_tops_kgb
    return out_kgbH.div_(sums_kgb[..., None]), sums_kgb.log_().add_(tops_kgb)


def _block_gradients(
    tensors: tuple[torch.Tensor, ...],
    wholes: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    block: Block,
    scoring: Scoring,
) -> None:
    """Write a block's gradient of q, and add its gradients of keys and values.

    Args:
        tensors: the output's gradient, q, k, v, the output and its log-sum-exps.
        wholes: the gradients of q, k and v.
    """
    grad_nmH, q_nmH, k_skH, v_skH, out_nmH, log_sums_nm = tensors
    whole_q, whole_k, whole_v = wholes
    wide = log_sums_nm.dtype
    kv_heads = k_skH.shape[1]
    rows_q = block.rows_q
    grad_kgbH = _grouped(grad_nmH[rows_q], kv_heads)
    q_kgbH = _grouped(q_nmH[rows_q], kv_heads)
    log_sums_kgb1 = _grouped(log_sums_nm[rows_q][..., None], kv_heads)
    # What the softmax takes from each score's gradient: the sum of shares x their gradients.
    out_kgbH = _grouped(out_nmH[rows_q], kv_heads)
    taken_kgb1 = torch.linalg.vecdot(grad_kgbH.to(wide), out_kgbH.to(wide))[..., None]
    grad_q_kgbH = torch.zeros_like(q_kgbH, dtype=wide)
    for rows, is_hidden_bc in _tiles(block, scoring, q_nmH.device):
        k_kcH = _heads(k_skH[rows])
        v_kcH = _heads(v_skH[rows])
        scores_kgbc, slopes_kgbc = _scores(
            q_kgbH, k_skH[rows], is_hidden_bc, scoring, with_slopes=True
        )
        shares_kgbc = scores_kgbc.sub_(log_sums_kgb1).exp_()
        whole_v[rows] += _sum_of_queries(shares_kgbc, grad_kgbH).transpose(0, 1)
        # Through the softmax, the cap and the scale.
        grads_kgbc = _product(grad_kgbH, v_kcH.transpose(1, 2))
        grads_kgbc.sub_(taken_kgb1).mul_(shares_kgbc).mul_(scoring.factor(q_nmH.shape[-1]))
        if slopes_kgbc is not None:
            grads_kgbc.mul_(slopes_kgbc)
        grad_q_kgbH += _product(grads_kgbc, k_kcH)
        whole_k[rows] += _sum_of_queries(grads_kgbc, q_kgbH).transpose(0, 1)
    whole_q[rows_q] = grad_q_kgbH.flatten(0, 1).transpose(0, 1)


def _tiles(
    block: Block, scoring: Scoring, device: torch.device
) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Yield the keys of each tile, and which of [b, c] a query does not see; None = it sees all."""
    queries = block.rows_q.stop - block.rows_q.start
    # The last query and the last key are the same token.
    first_query = block.rows_k.stop - queries
    position_b1 = torch.arange(first_query, block.rows_k.stop, device=device)[:, None]
    for begin in range(block.rows_k.start, block.rows_k.stop, TILE_KEYS):
        end = min(begin + TILE_KEYS, block.rows_k.stop)
        oldest_seen = -1 if scoring.window is None else block.rows_k.stop - scoring.window
        if end <= first_query + 1 and begin >= oldest_seen:
            yield slice(begin, end), None
            continue
        position_c = torch.arange(begin, end, device=device)
        is_hidden_bc = position_c > position_b1
        if scoring.window is not None:
            is_hidden_bc |= position_c <= position_b1 - scoring.window
        yield slice(begin, end), is_hidden_bc


def _scores(
    q_kgbH: torch.Tensor,
    k_ckH: torch.Tensor,
    is_hidden_bc: torch.Tensor | None,
    scoring: Scoring,
    *,
    with_slopes: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a tile's scores [k, g, b, c], and the slope of the cap at each if asked for."""
    scores_kgbc = _product(q_kgbH, _heads(k_ckH).transpose(1, 2))
    scores_kgbc.mul_(scoring.factor(q_kgbH.shape[-1]))
    slopes_kgbc = None
    if scoring.softcap is not None:
        scores_kgbc.div_(scoring.softcap).tanh_()
        if with_slopes:
            slopes_kgbc = 1 - scores_kgbc.square()
        scores_kgbc.mul_(scoring.softcap)
    if is_hidden_bc is not None:
        scores_kgbc.masked_fill_(is_hidden_bc, float("-inf"))
    return scores_kgbc, slopes_kgbc


def _grouped(x_bmH: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Turn [b, m, H] into [k, g, b, H]: query heads by the key/value head that they read."""
    return x_bmH.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _heads(x_ckH: torch.Tensor) -> torch.Tensor:
    """View [c, k, H] as [k, c, H]."""
    return x_ckH.transpose(0, 1)


def _product(left_kgbx: torch.Tensor, right_kxy: torch.Tensor) -> torch.Tensor:
    """Multiply all query heads of each key/value head by its matrix, in at least fp32."""
    k, g, b, _ = left_kgbx.shape
    return wide_bmm(left_kgbx.reshape(k, g * b, -1), right_kxy).view(k, g, b, -1)


def _sum_of_queries(left_kgbc: torch.Tensor, right_kgbH: torch.Tensor) -> torch.Tensor:
    """Sum left^T right over a key/value head's queries and query heads -> [k, c, H]."""
    return wide_bmm(left_kgbc.flatten(1, 2).transpose(1, 2), right_kgbH.flatten(1, 2))


def wide_bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply batches of matrices; the result is in at least fp32.

    A GPU multiplies bf16 and gives fp32 in one kernel; one factor may be wide already, and is
    rounded for it as kernels of attention round their shares. A CPU widens both.
    """
    narrow = left.dtype if left.itemsize < right.itemsize else right.dtype
    if left.is_cuda and narrow in (torch.bfloat16, torch.float16):
        return torch.bmm(left.to(narrow), right.to(narrow), out_dtype=torch.float32)
    wide = torch.promote_types(narrow, torch.float32)
    return torch.bmm(left.to(wide), right.to(wide))
