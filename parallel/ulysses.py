"""Ulysses context parallelism: all tokens of some heads instead of some tokens of all heads.

    q_tnH -> (seq_to_heads) -> q_TmH -> attention -> o_TmH -> (heads_to_seq) -> o_tnH

Legend: T tokens of the microbatch, t this rank's slice of them, N query heads and K key/value heads
of this tensor-parallel rank, m and k those of this rank after the exchange, H head size.

Rank r attends with a contiguous range of query heads and receives exactly the key/value heads that
they read. q, k and v travel in one all-to-all, the output in another; per rank and layer the
forward sends (cp - 1) / cp * t * H * (2 N + 2 kv_sent) elements, where kv_sent counts a key/value
head once per rank that needs it (on average over the ranks where heads split unevenly), and the
backward as much again. Head counts that cp does not divide are split unevenly. With two levels of
context parallelism (parallel/context.py) cp and T mean those of one group here.

Source: DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from parallel.collectives import all_reduce, all_to_all, start_all_to_all
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
        """Split the query heads as evenly as possible, and give each rank what they read."""
        assert num_query_heads % num_kv_heads == 0, (num_query_heads, num_kv_heads)
        assert num_query_heads >= cp_size, "validate() refuses a cp size beyond the heads"
        group = num_query_heads // num_kv_heads
        # The first ranks take one head more where cp does not divide them.
        base, extra = divmod(num_query_heads, cp_size)
        query = []
        start = 0
        for rank in range(cp_size):
            stop = start + base + (rank < extra)
            query.append((start, stop))
            start = stop
        kv = tuple((start // group, (stop - 1) // group + 1) for start, stop in query)
        return HeadSplit(tuple(query), kv, group)

    def rows(self, rank: int) -> int:
        """Count the heads that `rank` receives in the exchange of q, k and v together."""
        q0, q1 = self.query[rank]
        k0, k1 = self.kv[rank]
        return (q1 - q0) + 2 * (k1 - k0)

    def query_padding(self, rank: int) -> tuple[int, int]:
        """Count the query heads before and after those of `rank` that read its key/value heads.

        They belong to other ranks.
        """
        q0, q1 = self.query[rank]
        k0, k1 = self.kv[rank]
        return q0 - k0 * self.group, k1 * self.group - q1

    def kv_of_query(self, rank: int) -> list[int]:
        """List, for each query head of `rank`, its key/value head among those it received."""
        q0, q1 = self.query[rank]
        k0, _ = self.kv[rank]
        return [head // self.group - k0 for head in range(q0, q1)]


@dataclass(frozen=True)
class HeadRound:
    """Some key/value heads, and in chunks the query heads that read them, by their numbers.

    Heads stand in the order of the ranks that get them; the splits count within that order.
    """

    kv_heads: tuple[int, ...]
    kv_split: HeadSplit
    query_chunks: list[tuple[int, ...]]
    query_split: HeadSplit
    """Which of a chunk's query heads each rank gets; the same for each chunk."""


def head_rounds(split: HeadSplit, chunks: int) -> list[HeadRound]:
    """Cut each rank's query heads into `chunks` groups, so that no key/value head travels twice.

    A rank attends with the same heads as without chunks, and gets in each round the key/value heads
    that its next query heads read; where several chunks read the same, one round holds them all.
    Source: Untied Ulysses' schedule for grouped heads (arXiv 2602.21196).
    """
    assert chunks in chunk_counts(split), (chunks, split)
    ranks = range(len(split.query))
    per_chunk = (split.query[0][1] - split.query[0][0]) // chunks
    rounds: list[HeadRound] = []
    for chunk in range(chunks):
        # Each rank's query heads of this chunk, and the key/value heads that they read.
        queries = [
            range(q0 + chunk * per_chunk, q0 + (chunk + 1) * per_chunk) for q0, _ in split.query
        ]
        kv_of_rank = [sorted({head // split.group for head in heads}) for heads in queries]
        kv_heads = tuple(dict.fromkeys(head for heads in kv_of_rank for head in heads))
        flat = tuple(head for heads in queries for head in heads)
        # The same keys and values as the chunk before: they stay for this one.
        if rounds and rounds[-1].kv_heads == kv_heads:
            rounds[-1].query_chunks.append(flat)
            continue
        places = tuple(
            (kv_heads.index(heads[0]), kv_heads.index(heads[-1]) + 1) for heads in kv_of_rank
        )
        nothing = tuple((0, 0) for _ in ranks)
        query = tuple((rank * per_chunk, (rank + 1) * per_chunk) for rank in ranks)
        kv_split = HeadSplit(nothing, places, split.group)
        query_split = HeadSplit(query, nothing, split.group)
        rounds.append(HeadRound(kv_heads, kv_split, [flat], query_split))
    return rounds


def chunk_counts(split: HeadSplit) -> list[int]:
    """List the numbers of chunks that `head_rounds` can make.

    Every rank's chunk must read the key/value heads of whole groups, or be a part of one group.
    """

    def is_whole(query_heads: int) -> bool:
        return query_heads % split.group == 0 or split.group % query_heads == 0

    counts = {stop - start for start, stop in split.query}
    m = min(counts)
    if len(counts) > 1 or not is_whole(m):
        return [1]
    return [n for n in range(1, m + 1) if m % n == 0 and is_whole(m // n)]


class _SeqToHeads(torch.autograd.Function):
    """The exchange of q, k and v and, in backward, of their gradients.

    A block [t, rows, H] goes to each rank, rows = its query, key and value heads. What arrives is
    [T, rows, H] without a copy, so each direction copies once before it sends and the backward once
    more.
    """

    @staticmethod
    def forward(ctx, q_tNH, k_tKH, v_tKH, split: HeadSplit, axis: Axis):
        ctx.split = split
        ctx.axis = axis
        ctx.shapes = (q_tNH.shape, k_tKH.shape)
        ctx.sizes = _block_sizes(q_tNH, split)
        return start_seq_to_heads(q_tNH, k_tKH, v_tKH, split, axis)()

    @staticmethod
    def backward(ctx, *grads_TmH):
        split = ctx.split
        axis = ctx.axis
        sizes = ctx.sizes
        q_shape, k_shape = ctx.shapes
        # The exchange of the forward, with what was sent and received the other way round.
        to_send = torch.cat(grads_TmH, dim=1).view(-1)
        received = all_to_all(to_send, [sizes[axis.rank]] * axis.size, sizes, axis)
        grad_q = received.new_empty(q_shape)
        grad_k = received.new_empty(k_shape)
        grad_v = received.new_empty(k_shape)
        # Each rank's block goes to its heads; neighbouring ranks may have read the same key.
        written = 0
        blocks = received.split(sizes)
        for block, (q0, q1), (k0, k1) in zip(blocks, split.query, split.kv, strict=True):
            block_q, block_k, block_v = block.view(q_shape[0], -1, q_shape[2]).split(
                [q1 - q0, k1 - k0, k1 - k0], dim=1
            )
            grad_q[:, q0:q1] = block_q
            _store(grad_k, block_k, k0, k1, written)
            _store(grad_v, block_v, k0, k1, written)
            written = k1
        return grad_q, grad_k, grad_v, None, None


def _store(
    grad_tKH: torch.Tensor, block: torch.Tensor, start: int, stop: int, written: int
) -> None:
    """Put the gradient of heads [start, stop) in place.

    The heads below `written` have one from another rank: they are added to.
    """
    shared = max(0, written - start)
    grad_tKH[:, start : start + shared] += block[:, :shared]
    grad_tKH[:, start + shared : stop] = block[:, shared:]


class _HeadsToSeq(torch.autograd.Function):
    """The exchange of the attention output and, in backward, of its gradient."""

    @staticmethod
    def forward(ctx, o_TmH, split: HeadSplit, axis: Axis):
        T, m, H = o_TmH.shape
        t = T // axis.size
        ctx.split = split
        ctx.axis = axis
        # Every rank gets its tokens of these heads, and sends its heads of all tokens.
        sizes = [t * (stop - start) * H for start, stop in split.query]
        received = all_to_all(o_TmH.reshape(-1), [t * m * H] * axis.size, sizes, axis)
        return torch.cat([block.view(t, -1, H) for block in received.split(sizes)], dim=1)

    @staticmethod
    def backward(ctx, *grads):
        (grad_tNH,) = grads
        return gradient_of_heads(grad_tNH, ctx.split, ctx.axis), None, None


def _block_sizes(q_tNH: torch.Tensor, split: HeadSplit) -> list[int]:
    """Count the elements that go to each rank."""
    return [q_tNH.shape[0] * split.rows(rank) * q_tNH.shape[2] for rank in range(len(split.query))]


def start_seq_to_heads(
    q_tNH: torch.Tensor, k_tKH: torch.Tensor, v_tKH: torch.Tensor, split: HeadSplit, axis: Axis
) -> Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Start the exchange of `seq_to_heads`; return a function that waits for its results.

    There is no gradient.
    """
    if axis.size == 1:
        return lambda: (q_tNH, k_tKH, v_tKH)
    t = q_tNH.shape[0]
    H = q_tNH.shape[2]
    sizes = _block_sizes(q_tNH, split)
    # One block for each rank: its query, key and value heads side by side.
    send = q_tNH.new_empty(sum(sizes))
    for block, (q0, q1), (k0, k1) in zip(send.split(sizes), split.query, split.kv, strict=True):
        parts = [q_tNH[:, q0:q1], k_tKH[:, k0:k1], v_tKH[:, k0:k1]]
        torch.cat(parts, dim=1, out=block.view(t, -1, H))
    exchanged = start_all_to_all(send, sizes, [sizes[axis.rank]] * axis.size, axis)
    q0, q1 = split.query[axis.rank]
    k0, k1 = split.kv[axis.rank]

    def finish() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = exchanged().view(axis.size * t, -1, H)
        q_TmH, k_TkH, v_TkH = heads.split([q1 - q0, k1 - k0, k1 - k0], dim=1)
        return q_TmH, k_TkH, v_TkH

    return finish


def seq_to_heads(
    q_tNH: torch.Tensor, k_tKH: torch.Tensor, v_tKH: torch.Tensor, split: HeadSplit, axis: Axis
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Trade this rank's tokens of all heads for all tokens of this rank's heads.

    Shapes: q [t, N, H], k and v [t, K, H] -> q [T, m, H], k and v [T, k, H].
    """
    if axis.size == 1:
        return q_tNH, k_tKH, v_tKH
    return _SeqToHeads.apply(q_tNH, k_tKH, v_tKH, split, axis)


def heads_to_seq(o_TmH: torch.Tensor, split: HeadSplit, axis: Axis) -> torch.Tensor:
    """Bring the attention's output back to this rank's tokens: [T, m, H] -> [t, N, H]."""
    return o_TmH if axis.size == 1 else _HeadsToSeq.apply(o_TmH, split, axis)


def gradient_of_heads(grad_tNH: torch.Tensor, split: HeadSplit, axis: Axis) -> torch.Tensor:
    """Backward of `heads_to_seq`: [t, N, H] -> [T, m, H]."""
    if axis.size == 1:
        return grad_tNH
    t, _, H = grad_tNH.shape
    sizes = [t * (stop - start) * H for start, stop in split.query]
    # The forward's exchange the other way round: each rank gets the gradient of its heads.
    send = grad_tNH.new_empty(sum(sizes))
    for block, (start, stop) in zip(send.split(sizes), split.query, strict=True):
        block.view(t, -1, H).copy_(grad_tNH[:, start:stop])
    received = all_to_all(send, sizes, [sizes[axis.rank]] * axis.size, axis)
    return received.view(axis.size * t, -1, H)


def gather_heads(o_bmH: torch.Tensor, split: HeadSplit, axis: Axis) -> torch.Tensor:
    """Join the heads of all ranks, for tokens that each of them has: [b, m, H] -> [b, N, H].

    There is no gradient.
    """
    if axis.size == 1:
        return o_bmH
    b, _, H = o_bmH.shape
    q0, q1 = split.query[axis.rank]
    # A sum with zeros is exact, whatever the numbers of heads.
    o_bNH = o_bmH.new_zeros(b, split.query[-1][1], H)
    o_bNH[:, q0:q1] = o_bmH
    return all_reduce(o_bNH, axis)
