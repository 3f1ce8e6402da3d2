"""Texts of token ids as one packed microbatch, and this rank's slice of it."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from data.batch import IGNORE, Batch, padding_starts
from parallel.context import token_pieces
from parallel.layout import Layout


def pack_texts(texts: Sequence[Sequence[int]], layout: Layout) -> Batch:
    """Lay texts out one after the other, each a document, and cut this rank's tokens out.

    A token's label is the one after it, and the last of a text has none. Padding at the end makes
    the number of tokens one that the layout can split.
    """
    edges = [0, *accumulate(len(text) for text in texts)]
    multiple = layout.token_multiple
    total = -(-edges[-1] // multiple) * multiple
    starts = [*edges[:-1], *padding_starts(edges[-1], total).tolist()]
    cu_seqlens = torch.tensor([*starts, total], dtype=torch.int32)

    tokens_T = torch.zeros(total, dtype=torch.int64)
    labels_T = torch.full((total,), IGNORE, dtype=torch.int64)
    for text, (begin, end) in zip(texts, pairwise(edges), strict=True):
        tokens_T[begin:end] = torch.as_tensor(text, dtype=torch.int64)
        labels_T[begin : end - 1] = tokens_T[begin + 1 : end]
    lengths = cu_seqlens.diff().long()
    positions_T = torch.arange(total) - cu_seqlens[:-1].long().repeat_interleave(lengths)

    rows_t = rows_of_rank(total, layout)
    batch = Batch(tokens_T[rows_t], labels_T[rows_t], positions_T[rows_t], cu_seqlens)
    return batch.to(layout.device)


def rows_of_rank(total: int, layout: Layout) -> torch.Tensor:
    """Return which of the microbatch's `total` tokens this rank holds: int64 [t], on the host."""
    return torch.cat([torch.arange(*piece) for piece in token_pieces(total, layout)])
