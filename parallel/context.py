"""Which tokens a context-parallel rank holds, and how groups of ranks gather keys and values.

With one level (Ulysses alone) a rank holds a contiguous slice of the microbatch. With two levels,
cp = a2a x gather: the a2a ranks of a group trade tokens for heads (parallel/ulysses.py), and each
group then gathers the keys and values of the other groups. A causal query late in the sample reads
more keys than an early one, so each group holds two chunks, one from each end: with G groups the
tokens are cut into 2 G chunks and group g holds chunks g and 2 G - 1 - g. The ranks of a group
split those in order.

The gathered keys and values are all tokens', for the heads of this rank: without recompute a layer
keeps them for its backward, G times what one level of the same a2a size would keep.

Source of the gathered form: Llama 3 (arXiv 2407.21783, section 3.3.2), which cuts the same chunks.

Legend: T tokens of the microbatch, s those of a group (T / gather), k key/value heads of this rank
after the exchange, H head size.
"""

import torch

from parallel.collectives import gather_sequence
from parallel.layout import Axis, Layout


def group_pieces(total: int, group: int, num_groups: int) -> list[tuple[int, int]]:
    """List the half-open ranges of the `total` tokens that a group holds, in order.

    There is one, or with several groups two.
    """
    if num_groups == 1:
        return [(0, total)]
    assert total % (2 * num_groups) == 0, (total, num_groups)
    chunk = total // (2 * num_groups)
    # An early and a late chunk, so that the queries of all groups read equally many keys.
    numbers = (group, 2 * num_groups - 1 - group)
    return [(number * chunk, (number + 1) * chunk) for number in numbers]


def token_pieces(total: int, layout: Layout) -> list[tuple[int, int]]:
    """List the half-open ranges of a microbatch's `total` tokens that this rank holds, in order."""
    a2a = layout.cp_a2a
    gather = layout.cp_gather
    return rank_pieces(total, a2a.rank, a2a.size, gather.rank, gather.size)


def rank_pieces(
    total: int, a2a_rank: int, a2a_size: int, group: int, num_groups: int
) -> list[tuple[int, int]]:
    """List the `token_pieces` of rank number `a2a_rank` of the `a2a_size` ranks of a group."""
    # All ranks hold equally many tokens.
    share = total // (a2a_size * num_groups)
    assert share * a2a_size * num_groups == total, (total, a2a_size, num_groups)
    # The rank holds tokens [first, first + share) of its group's, counted over the group's ranges.
    first = a2a_rank * share
    pieces = []
    place = 0
    for start, stop in group_pieces(total, group, num_groups):
        low = max(first, place)
        high = min(first + share, place + stop - start)
        if low < high:
            pieces.append((start + low - place, start + high - place))
        place += stop - start
    return pieces


def gather_keys(
    k_skH: torch.Tensor, v_skH: torch.Tensor, axis: Axis
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather keys and values of all tokens, in their order: [s, k, H] -> [T, k, H].

    Both travel in one all-gather over the gather axis of size G; per rank the forward receives 2 (G
    - 1) / G * T * k * H elements, and the backward (a reduce-scatter: every group that read a key
    adds to its gradient) sends as much.
    """
    if axis.size == 1:
        return k_skH, v_skH
    s, k, H = k_skH.shape
    kv_s2kH = torch.cat([k_skH, v_skH], dim=1)
    gathered = gather_sequence(kv_s2kH, axis).view(axis.size, 2, s // 2, 2 * k, H)
    # Group g's first half is chunk g, its second half is chunk 2 G - 1 - g.
    in_order = torch.cat([gathered[:, 0], gathered[:, 1].flip(0)]).view(-1, 2 * k, H)
    k_TkH, v_TkH = in_order.split(k, dim=1)
    return k_TkH, v_TkH
