"""One rank's slice of one microbatch: tokens, shifted labels, positions and document boundaries.

A microbatch is T packed tokens with no batch dim: its samples one after another. A context-parallel
rank holds one or two pieces of it, together t = T / cp tokens, and reads no others, but for one token
per piece and sample, the label of the last position. Boundaries and positions come from the stream's
prefix offsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.stream import DocumentStream

IGNORE = -100
"""Label of a position without a target; torch's own default."""


@dataclass
class Batch:
    """T = tokens of the microbatch, t = those of this rank."""

    tokens: torch.Tensor  # int64 [t]
    labels: torch.Tensor  # int64 [t], IGNORE where there is no target
    positions: torch.Tensor  # int64 [t], from 0 in each segment
    cu_seqlens: torch.Tensor  # int32 [segments + 1], over all T tokens; stays on the host
    num_targets: int = -1  # of this slice; counted when not given

    def __post_init__(self) -> None:
        if self.num_targets < 0:
            self.num_targets = int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same on another device."""
        return Batch(self.tokens.to(device), self.labels.to(device), self.positions.to(device), self.cu_seqlens,
                     self.num_targets)


def read_batch(stream: DocumentStream, starts: Sequence[int], seq_length: int,
               pieces: Sequence[tuple[int, int]] | None = None, *, document_masking: bool = True,
               eod: int | None = None, eod_mask_loss: bool = False, vocab_size: int | None = None) -> Batch:
    """Those of a microbatch's tokens that lie in `pieces`, in that order.

    With document masking each document (cut at the start and end of a sample) is a segment, and the
    last token of a document has no target; one cut by the end of its sample has the next token as
    target. Without it each sample is a segment and every token has a target.

    Args:
        starts: stream position of each sample's first token.
        seq_length: tokens per sample.
        pieces: half-open ranges of the microbatch's T = len(starts) x seq_length tokens; all by default.
        eod, eod_mask_loss: no target where the input is `eod` (Megatron-LM's meaning).
        vocab_size: ids are checked against it when given.

    Raises:
        ValueError: a token id is not below vocab_size, or eod_mask_loss without an eod.
    """
    total = len(starts) * seq_length
    pieces = [(0, total)] if pieces is None else pieces
    if eod_mask_loss and eod is None:
        raise ValueError("eod_mask_loss = True: the tokenizer has no end-of-document token. Fix: remove it.")
    document_ends = np.empty(0, dtype=np.int64)
    if document_masking:
        # The last span's end is the window's, not a document's.
        document_ends = np.concatenate([
            i * seq_length + np.cumsum(stream.spans(start, seq_length + 1)[2])[:-1] for i, start in enumerate(starts)])
    cu_seqlens = np.unique(np.concatenate([np.arange(0, total + 1, seq_length), document_ends])).astype(np.int64)
    parts = [_read_piece(stream, starts, seq_length, low, high, vocab_size) for low, high in pieces]
    for (low, high), (_, labels) in zip(pieces, parts, strict=True):
        last_tokens = document_ends - 1
        labels[last_tokens[(last_tokens >= low) & (last_tokens < high)] - low] = IGNORE
    tokens, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if eod_mask_loss:
        labels[tokens == eod] = IGNORE
    positions = np.concatenate([_positions(cu_seqlens, low, high) for low, high in pieces])
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(positions),
                 torch.from_numpy(cu_seqlens.astype(np.int32)), num_targets=int((labels != IGNORE).sum()))


def _read_piece(stream: DocumentStream, starts: Sequence[int], seq_length: int, low: int, high: int,
                vocab_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [low, high) of the microbatch and the token that follows each in its sample."""
    tokens, labels = np.empty(high - low, dtype=np.int64), np.empty(high - low, dtype=np.int64)
    for i in range(low // seq_length, -(-high // seq_length)):
        sample = i * seq_length
        first, last = max(low, sample), min(high, sample + seq_length)
        window = stream.read(starts[i] + first - sample, last - first + 1)
        if vocab_size is not None:
            _check_ids(stream, starts[i] + first - sample, window, vocab_size)
        tokens[first - low:last - low], labels[first - low:last - low] = window[:-1], window[1:]
    return tokens, labels


def _positions(cu_seqlens: np.ndarray, low: int, high: int) -> np.ndarray:
    """Place in its segment of each token in [low, high) -> int64 [high - low]."""
    first = int(np.searchsorted(cu_seqlens, low, side="right")) - 1
    last = int(np.searchsorted(cu_seqlens, high, side="left"))
    begins = cu_seqlens[first:last]
    edges = np.clip(cu_seqlens[first:last + 1], low, high)
    return np.arange(low, high) - np.repeat(begins, np.diff(edges))


def _check_ids(stream: DocumentStream, start: int, tokens: np.ndarray, vocab_size: int) -> None:
    """Raises ValueError unless all ids, which begin at stream position `start`, are in [0, vocab_size)."""
    wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        at = int(wrong[0])
        document = int(stream.spans(start + at, 1)[0][0])
        raise ValueError(f"token id {tokens[at]} in document {document} of {stream.reader.prefix}: must be in [0, "
                         f"vocab_size = {vocab_size}). Fix: give the tokenizer (or --vocab-size) that made the corpus.")
