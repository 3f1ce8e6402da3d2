"""Microbatches laid out by hand, for evaluations: stretches of tokens that no stream has in that
order, and which of their tokens are scored."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from data.batch import IGNORE, Batch, fill_positions, padding_starts


class Stretch(NamedTuple):
    """Consecutive tokens of a document that attend to nothing before them, at positions from 0."""

    read: Callable[[int, int], np.ndarray]
    """(first token, number of them) -> ids."""
    start: int
    """Number of its first token in the document."""
    length: int
    targets: np.ndarray
    """int64 [ranges, 2]: half-open ranges of the document's tokens that are targets, each after
    `start` and within the stretch."""


def lay_out(
    stretches: Sequence[Stretch],
    total: int,
    pieces: Sequence[tuple[int, int]],
    *,
    padding: int,
    vocab_size: int,
) -> Batch:
    """A microbatch of `total` tokens: the stretches one after another, then padding, in segments of
    its own.

    Args:
        pieces: half-open ranges of the microbatch that this rank holds; only those tokens are read,
            and one more per stretch and piece, the label of the last.
        padding: id that fills the rest.

    Raises:
        ValueError: a token id is not below vocab_size.
    """
    begins = np.cumsum([0, *(stretch.length for stretch in stretches)])
    assert begins[-1] <= total, (begins, total)
    cu_seqlens = np.concatenate([begins[:-1], padding_starts(begins[-1], total), [total]])
    size = sum(high - low for low, high in pieces)
    tokens = np.full(size, padding, dtype=np.int64)
    labels = np.full(size, IGNORE, dtype=np.int64)
    at = 0
    for low, high in pieces:
        for stretch, begin in zip(stretches, begins.tolist(), strict=False):
            first = max(low, begin) - begin
            last = min(high, begin + stretch.length) - begin
            if first < last:
                place = slice(at + begin + first - low, at + begin + last - low)
                tokens[place], labels[place] = _part(stretch, first, last, vocab_size)
        at += high - low
    positions = np.empty(size, dtype=np.int64)
    fill_positions(cu_seqlens, np.array(pieces, dtype=np.int64), positions)
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
    )


def _part(
    stretch: Stretch, first: int, last: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [first, last) of a stretch and their labels."""
    count = last - first
    following = last < stretch.length
    ids = np.asarray(stretch.read(stretch.start + first, count + following), dtype=np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"token id {ids.min() if ids.min() < 0 else ids.max()} in the validation data: must be in [0, "
            f"vocab_size = {vocab_size}). Fix: give the tokenizer (or --vocab-size) that made the corpus."
        )
    labels = np.full(count, IGNORE, dtype=np.int64)
    offset = stretch.start + first + 1  # number of the token that labels[0] may name
    for low, high in stretch.targets.tolist():
        assert stretch.start < low < high <= stretch.start + stretch.length, (low, high)
        place = slice(max(low - offset, 0), max(min(high - offset, len(ids) - 1), 0))
        labels[place] = ids[1:][place]
    return ids[:count], labels
