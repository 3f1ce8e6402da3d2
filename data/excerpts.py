"""Microbatches laid out by hand, for evaluations: excerpts of documents in an order that no stream
has, and which of their tokens are scored."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from data.batch import IGNORE, Batch, fill_positions, padding_starts


class ReadTokens(Protocol):
    """Reads tokens of one document by their numbers."""

    def __call__(self, first: int, count: int, /) -> np.ndarray: ...


class Excerpt(NamedTuple):
    """Consecutive tokens of a document that attend to nothing before them, at positions from 0."""

    read: ReadTokens
    start: int
    """Number of its first token in the document."""
    length: int
    targets: np.ndarray
    """int64 [ranges, 2]: half-open ranges of the document's tokens that are targets, each after
    `start` and within the excerpt."""


def lay_out(
    excerpts: Sequence[Excerpt],
    total: int,
    pieces: Sequence[tuple[int, int]],
    *,
    padding: int,
    vocab_size: int,
) -> Batch:
    """Read a microbatch of `total` tokens: the excerpts one after another, then padding, in
    sequences of its own.

    Args:
        pieces: half-open ranges of the microbatch that this rank holds; only those tokens are read,
            and one more per excerpt and piece, the label of the last.
        padding: id that fills the rest.

    Raises:
        ValueError: a token id is not below vocab_size.
    """
    begins = np.cumsum([0, *(excerpt.length for excerpt in excerpts)])
    assert begins[-1] <= total, (begins, total)
    cu_seqlens = np.concatenate([begins[:-1], padding_starts(begins[-1], total), [total]])
    size = sum(high - low for low, high in pieces)
    tokens = np.full(size, padding, dtype=np.int64)
    labels = np.full(size, IGNORE, dtype=np.int64)
    filled = 0  # tokens of the pieces before
    for low, high in pieces:
        for excerpt, begin in zip(excerpts, begins.tolist(), strict=False):
            # The part of the excerpt that lies in this piece, by its own numbers.
            first = max(low, begin) - begin
            last = min(high, begin + excerpt.length) - begin
            if first < last:
                place = slice(filled + begin + first - low, filled + begin + last - low)
                tokens[place], labels[place] = _read_part(excerpt, first, last, vocab_size)
        filled += high - low
    positions = np.empty(size, dtype=np.int64)
    fill_positions(cu_seqlens, np.array(pieces, dtype=np.int64), positions)
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
    )


def _read_part(
    excerpt: Excerpt, first: int, last: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Read tokens [first, last) of an excerpt and their labels."""
    count = last - first
    # The last token's label is the token after it, unless the excerpt ends there.
    extra = 1 if last < excerpt.length else 0
    ids = np.asarray(excerpt.read(excerpt.start + first, count + extra), dtype=np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(
            f"token id {wrong} in the validation data: must be in [0, vocab_size = {vocab_size}). "
            "Fix: give the tokenizer (or --vocab-size) that made the corpus."
        )
    labels = np.full(count, IGNORE, dtype=np.int64)
    offset = excerpt.start + first + 1  # number of the token that labels[0] may name
    for low, high in excerpt.targets.tolist():
        assert excerpt.start < low < high <= excerpt.start + excerpt.length, (low, high)
        place = slice(max(low - offset, 0), max(min(high - offset, len(ids) - 1), 0))
        labels[place] = ids[1:][place]
    return ids[:count], labels
