"""Ulysses context parallelism: all tokens of some heads instead of some tokens of all heads.

    q_tnH -> (seq_to_heads) -> q_TmH -> attention -> o_TmH -> (heads_to_seq) -> o_tnH

Legend: T tokens of the microbatch, t this rank's slice of them, N query heads and K key/value heads
of this tensor-parallel rank, m and k those of this rank after the exchange, H head size.

Rank r attends with a contiguous range of query heads and receives exactly the key/value heads that
they read. q, k and v travel in one all-to-all, the output in another; per rank and layer the forward
sends (cp - 1) / cp * t * H * (2 N + 2 kv_sent) elements, where kv_sent counts a key/value head once per
rank that needs it (on average over the ranks where heads split unevenly), and the backward as much
again. Head counts that cp does not divide are split unevenly. With two levels of context parallelism
(parallel/context.py) cp and T mean those of one group here.

Source: DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from dataclasses import dataclass

import torch

from parallel.collectives import all_to_all
from parallel.layout import Axis


@dataclass(frozen=True)
class HeadSplit:
    """Which heads each context-parallel rank attends with.

    query[r] and kv[r] are half-open ranges of this tensor-parallel rank's heads.
    """

    query: tuple[tuple[int, int], ...]
    kv: tuple[tuple[int, int], ...]
    group: int
    """Query heads per key/value head."""

    @staticmethod
    def make(num_query_heads: int, num_kv_heads: int, cp_size: int) -> "HeadSplit":
        assert num_query_heads % num_kv_heads == 0, (num_query_heads, num_kv_heads)
        assert num_query_heads >= cp_size, "validate() refuses a cp size beyond the heads"
        group = num_query_heads // num_kv_heads
        base, extra = divmod(num_query_heads, cp_size)
        query, start = [], 0
        for rank in range(cp_size):
            stop = start + base + (rank < extra)
            query.append((start, stop))
            start = stop
        kv = tuple((start // group, (stop - 1) // group + 1) for start, stop in query)
        return HeadSplit(tuple(query), kv, group)

    def rows(self, rank: int) -> int:
        """Heads that rank receives in the exchange of q, k and v together."""
        (q0, q1), (k0, k1) = self.query[rank], self.kv[rank]
        return (q1 - q0) + 2 * (k1 - k0)

    def kv_of_query(self, rank: int) -> list[int]:
        """For each query head of `rank`, the index of its key/value head among those it received."""
        (q0, q1), (k0, _) = self.query[rank], self.kv[rank]
        return [head // self.group - k0 for head in range(q0, q1)]


def _heads_first(x_TmH: torch.Tensor, cp_size: int) -> torch.Tensor:
    """[T, m, H] -> [cp * m, t, H]: block r holds the tokens of rank r."""
    T, m, H = x_TmH.shape
    return x_TmH.view(cp_size, T // cp_size, m, H).transpose(1, 2).reshape(cp_size * m, T // cp_size, H)


def _tokens_first(x_RtH: torch.Tensor, cp_size: int) -> torch.Tensor:
    """[cp * m, t, H] -> [T, m, H]: the inverse of `_heads_first`."""
    R, t, H = x_RtH.shape
    return x_RtH.view(cp_size, R // cp_size, t, H).transpose(1, 2).reshape(cp_size * t, R // cp_size, H)


class _SeqToHeads(torch.autograd.Function):
    """The exchange of q, k and v and, in backward, of their gradients."""

    @staticmethod
    def forward(ctx, q_tNH, k_tKH, v_tKH, split: HeadSplit, axis: Axis):
        ctx.split, ctx.axis, ctx.shapes = split, axis, (q_tNH.shape, k_tKH.shape)
        q, k, v = (x.transpose(0, 1) for x in (q_tNH, k_tKH, v_tKH))
        blocks = []
        for (q0, q1), (k0, k1) in zip(split.query, split.kv, strict=True):
            blocks += [q[q0:q1], k[k0:k1], v[k0:k1]]
        mine = split.rows(axis.rank)
        received = all_to_all(torch.cat(blocks), [split.rows(r) for r in range(axis.size)], [mine] * axis.size, axis)
        qkv_TmH = _tokens_first(received, axis.size)
        m, k_heads = (stop - start for start, stop in (split.query[axis.rank], split.kv[axis.rank]))
        return qkv_TmH.split([m, k_heads, k_heads], dim=1)

    @staticmethod
    def backward(ctx, grad_q_TmH, grad_k_TkH, grad_v_TkH):
        split, axis = ctx.split, ctx.axis
        q_shape, k_shape = ctx.shapes
        grads = _heads_first(torch.cat([grad_q_TmH, grad_k_TkH, grad_v_TkH], dim=1), axis.size)
        mine = split.rows(axis.rank)
        received = all_to_all(grads, [mine] * axis.size, [split.rows(r) for r in range(axis.size)], axis)
        grad_q = received.new_empty(q_shape[1], q_shape[0], q_shape[2])
        grad_kv = received.new_zeros(2, k_shape[1], k_shape[0], k_shape[2])
        row = 0
        for (q0, q1), (k0, k1) in zip(split.query, split.kv, strict=True):
            q_rows, k_rows = q1 - q0, k1 - k0
            grad_q[q0:q1] = received[row:row + q_rows]
            # A key/value head that several ranks read collects the gradient of each of them.
            grad_kv[:, k0:k1] += received[row + q_rows:row + q_rows + 2 * k_rows].view(2, k_rows, *grad_kv.shape[2:])
            row += q_rows + 2 * k_rows
        return grad_q.transpose(0, 1), grad_kv[0].transpose(0, 1), grad_kv[1].transpose(0, 1), None, None


class _HeadsToSeq(torch.autograd.Function):
    """The exchange of the attention output and, in backward, of its gradient."""

    @staticmethod
    def forward(ctx, o_TmH, split: HeadSplit, axis: Axis):
        ctx.split, ctx.axis = split, axis
        m = o_TmH.shape[1]
        received = all_to_all(_heads_first(o_TmH, axis.size), [m] * axis.size, _query_rows(split), axis)
        return received.transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx, grad_tNH):
        axis, rows = ctx.axis, _query_rows(ctx.split)
        received = all_to_all(grad_tNH.transpose(0, 1).contiguous(), rows, [rows[axis.rank]] * axis.size, axis)
        return _tokens_first(received, axis.size), None, None


def _query_rows(split: HeadSplit) -> list[int]:
    return [stop - start for start, stop in split.query]


def seq_to_heads(q_tNH: torch.Tensor, k_tKH: torch.Tensor, v_tKH: torch.Tensor, split: HeadSplit,
                 axis: Axis) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From this rank's tokens of all heads to all tokens of this rank's heads.

    Shapes: q [t, N, H], k and v [t, K, H] -> q [T, m, H], k and v [T, k, H].
    """
    if axis.size == 1:
        return q_tNH, k_tKH, v_tKH
    return _SeqToHeads.apply(q_tNH, k_tKH, v_tKH, split, axis)


def heads_to_seq(o_TmH: torch.Tensor, split: HeadSplit, axis: Axis) -> torch.Tensor:
    """The way back for the attention output: [T, m, H] -> [t, N, H]."""
    return o_TmH if axis.size == 1 else _HeadsToSeq.apply(o_TmH, split, axis)
