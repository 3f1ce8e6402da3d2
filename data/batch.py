"""One rank's slice of one microbatch: tokens, shifted labels, positions and document boundaries.

A microbatch is T packed tokens with no batch dim: its samples one after another. A context-parallel
rank holds one or two pieces of it, together t = T / cp tokens, and reads no others, but for one
token per piece and sample, the label of the last position. Boundaries and positions come from the
stream's prefix offsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np
import torch

from data.stream import DocumentStream, Spans

IGNORE = -100
"""Label of a position without a target; torch's own default."""
PADDING_SEGMENT = 1024
"""Padding is cut into segments of at most so many tokens, so that next to no attention is computed
for it."""


class Sample(NamedTuple):
    """What one sample holds, in order; it is padded where that is less than its length."""

    stream: DocumentStream
    intervals: np.ndarray
    """int64 [intervals, 2]: position in the stream, tokens."""
    following: int = -1
    """Position in the stream of the token that comes next; -1 = there is none. Asked for without
    document masking."""


@dataclass
class Batch:
    """T = tokens of the microbatch, t = those of this rank."""

    tokens: torch.Tensor  # int64 [t]
    labels: torch.Tensor  # int64 [t], IGNORE where there is no target
    positions: torch.Tensor  # int64 [t], from 0 in each segment
    cu_seqlens: torch.Tensor  # int32 [segments + 1], over all T tokens; stays on the host
    num_targets: int = -1  # of this slice; counted when not given
    digest: int = 0  # of this slice (see `digest`)

    def __post_init__(self) -> None:
        if self.num_targets < 0:
            self.num_targets = int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same on another device; a GPU fetches it by itself, and the host does not
        wait."""
        tokens, labels, positions = (
            _move(x, torch.device(device)) for x in (self.tokens, self.labels, self.positions)
        )
        return Batch(tokens, labels, positions, self.cu_seqlens, self.num_targets, self.digest)


def _move(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def padding_starts(begin: int, end: int) -> np.ndarray:
    """Where the segments of the padding [begin, end) begin: int64 [segments], none if it is
    empty."""
    return np.arange(begin, end, PADDING_SEGMENT)


class _Located(NamedTuple):
    """A sample and where its spans lie. begins: int64 [spans + 1], place of each span in the
    sample, then their end."""

    sample: Sample
    spans: Spans
    begins: np.ndarray
    seq_length: int

    @staticmethod
    def make(sample: Sample, seq_length: int) -> "_Located":
        spans = sample.stream.locate(sample.intervals)
        begins = np.zeros(len(spans.lengths) + 1, dtype=np.int64)
        np.cumsum(spans.lengths, out=begins[1:])
        assert begins[-1] <= seq_length, (begins[-1], seq_length)
        return _Located(sample, spans, begins, seq_length)

    def segments(self, document_masking: bool) -> np.ndarray:
        """Where a segment of attention begins: at each document, and in the padding."""
        starts = self.begins[:-1] if document_masking else self.begins[:-1][:1]
        return np.append(starts, padding_starts(self.begins[-1], self.seq_length))


def read_batch(
    samples: Sequence[Sample],
    seq_length: int,
    pieces: Sequence[tuple[int, int]] | None = None,
    *,
    document_masking: bool = True,
    eod: int | None = None,
    eod_mask_loss: bool = False,
    vocab_size: int | None = None,
) -> Batch:
    """Those of a microbatch's tokens that lie in `pieces`, in that order.

    The label of a token is the next one of its document, also where the sample cuts the document.
    The last token of a document has none with document masking, and without it the token that
    follows in the sample (at its end, the one that `following` names). Padding is token 0 (eod
    where there is one) without a label, in segments of its own.

    Args:
        samples: of the microbatch, in order.
        seq_length: tokens per sample.
        pieces: half-open ranges of the microbatch's T = len(samples) x seq_length tokens; all by
            default.
        document_masking: each document (cut at the start and end of a sample) is a segment;
            otherwise each sample.
        eod, eod_mask_loss: no target where the input is `eod` (Megatron-LM's meaning).
        vocab_size: ids are checked against it when given.

    Raises:
        ValueError: a token id is not below vocab_size, or eod_mask_loss without an eod.
    """
    total = len(samples) * seq_length
    pieces = [(0, total)] if pieces is None else pieces
    if eod_mask_loss and eod is None:
        raise ValueError(
            "eod_mask_loss = True: the tokenizer has no end-of-document token. Fix: remove it."
        )
    located = [_Located.make(sample, seq_length) for sample in samples]
    cu_seqlens = np.concatenate(
        [i * seq_length + sample.segments(document_masking) for i, sample in enumerate(located)]
        + [[total]]
    )
    size = sum(high - low for low, high in pieces)
    extra = 1 + max(len(sample.intervals) for sample in samples)  # read for labels, and not kept
    tokens, labels, positions = (
        np.empty(length, dtype=np.int64) for length in (size + extra, size, size)
    )
    at = 0
    targets = 0
    for low, high in pieces:
        for i in range(low // seq_length, -(-high // seq_length)):
            first = max(low - i * seq_length, 0)
            last = min(high - i * seq_length, seq_length)
            targets += _read_part(
                located[i],
                first,
                last,
                document_masking,
                0 if eod is None else eod,
                vocab_size,
                tokens[at:],
                labels[at : at + last - first],
            )
            at += last - first
    tokens = tokens[:size]
    fill_positions(cu_seqlens, np.array(pieces, dtype=np.int64), positions)
    if eod_mask_loss:
        labels[tokens == eod] = IGNORE
        targets = int((labels != IGNORE).sum())
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        targets,
    )


def _read_part(
    located: _Located,
    first: int,
    last: int,
    document_masking: bool,
    padding: int,
    vocab_size: int | None,
    tokens: np.ndarray,
    labels: np.ndarray,
) -> int:
    """Fill the tokens [first, last) of a sample and their labels -> number of targets. Reads one
    token more where a label needs it, so that `tokens` is longer."""
    spans = located.spans
    begins = located.begins
    real = max(first, min(last, int(begins[-1])))
    labels[real - first :] = IGNORE
    if real == first:
        tokens[: last - first] = padding
        return 0
    low = int(np.searchsorted(begins, first, side="right")) - 1
    high = int(np.searchsorted(begins, real, side="left"))  # of the spans, [low, high) are touched
    documents, offsets, lengths = (array[low:high].copy() for array in spans[:3])
    rests = spans.rests[low:high].copy()
    skipped = first - int(begins[low])
    left = int(begins[high]) - real
    offsets[0] += skipped
    lengths[0] -= skipped
    lengths[-1] -= left
    rests[-1] += left
    inner = rests > 0  # the token after a span that does not end its document is read with it
    window = tokens[: int(lengths.sum() + inner.sum())]
    located.sample.stream.reader.read_spans(documents, offsets, lengths + inner, window)
    if vocab_size is not None and (window.min() < 0 or window.max() >= vocab_size):
        _refuse_id(located.sample.stream, documents, lengths + inner, window, vocab_size)
    after = IGNORE if document_masking or rests[-1] > 0 else _token_after(located, high)
    if vocab_size is not None and after >= vocab_size:
        raise ValueError(
            f"token id {after} in {located.sample.stream.reader.prefix}: must be in [0, vocab_size = "
            f"{vocab_size}). Fix: give the tokenizer (or --vocab-size) that made the corpus."
        )
    targets = _shift(window, lengths, inner, offsets == 0, document_masking, after, labels)
    if inner[:-1].any():
        _compact(window, lengths, inner)
    tokens[real - first : last - first] = padding
    return targets


def _token_after(located: _Located, span: int) -> int:
    """The first token of a span, or after the last one the token that follows the sample; IGNORE if
    none does."""
    spans = located.spans
    stream = located.sample.stream
    if span < len(spans.lengths):
        if spans.offsets[span] > 0:
            return IGNORE
        return int(stream.reader.read(int(spans.documents[span]), 0, 1)[0])
    following = located.sample.following
    if following < 0 or stream.document_start(following) != following:
        return IGNORE
    return int(stream.read(following, 1)[0])


def _refuse_id(
    stream: DocumentStream,
    documents: np.ndarray,
    lengths: np.ndarray,
    window: np.ndarray,
    vocab_size: int,
) -> None:
    at = int(np.flatnonzero((window < 0) | (window >= vocab_size))[0])
    document = int(documents[np.searchsorted(np.cumsum(lengths), at, side="right")])
    raise ValueError(
        f"token id {window[at]} in document {document} of {stream.reader.prefix}: must be in [0, "
        f"vocab_size = {vocab_size}). Fix: give the tokenizer (or --vocab-size) that made the corpus."
    )


@numba.njit(nogil=True, cache=True)
def _shift(window, lengths, inner, starting, document_masking, after, labels):
    """The labels of the spans in `window` -> number of targets. inner[i]: a token more of span i's
    document lies behind it. starting[i]: span i begins its document; if not, its first token is the
    label of the one before it there."""
    read = 0
    written = 0
    targets = 0
    for i in range(len(lengths)):
        length = lengths[i]
        for j in range(length - 1):
            labels[written + j] = window[read + j + 1]
        if inner[i]:
            label = window[read + length]
        elif document_masking:
            label = IGNORE
        elif i + 1 < len(lengths):
            label = numba.int64(window[read + length]) if starting[i + 1] else IGNORE
        else:
            label = after
        labels[written + length - 1] = label
        targets += length - 1 + (label != IGNORE)
        read += length + inner[i]
        written += length
    return targets


@numba.njit(nogil=True, cache=True)
def _compact(window, lengths, inner):
    """Close the gaps that the tokens read for labels leave between the spans."""
    read = 0
    written = 0
    for i in range(len(lengths)):
        for j in range(lengths[i]):
            window[written + j] = window[read + j]
        read += lengths[i] + inner[i]
        written += lengths[i]


DIGEST_BITS = 40
"""So that the digests of 8,192 ranks add up exactly in fp64."""


def digest(batch: Batch, pieces: Sequence[tuple[int, int]], first: int) -> int:
    """A number below 2^40 of the inputs and labels and their places in the global batch.

    The digests of all slices of a global batch, added modulo 2^40, are the same however it is cut
    over ranks and microbatches.

    Args:
        pieces: ranges of the microbatch's tokens that `batch` holds.
        first: place of the microbatch's first token in the global batch.
    """
    return int(
        _digest(batch.tokens.numpy(), batch.labels.numpy(), np.array(pieces, dtype=np.int64), first)
    )


@numba.njit(nogil=True, cache=True)
def _digest(tokens, labels, pieces, first):
    total = numba.uint64(0)
    at = 0
    for i in range(len(pieces)):
        for place in range(first + pieces[i, 0], first + pieces[i, 1]):
            # A place's weight: the mixing step of SplitMix64 (Steele, Lea, Flood 2014).
            weight = numba.uint64(place + 1) * numba.uint64(0x9E3779B97F4A7C15)
            weight = (weight ^ (weight >> numba.uint64(30))) * numba.uint64(0xBF58476D1CE4E5B9)
            weight = (weight ^ (weight >> numba.uint64(27))) * numba.uint64(0x94D049BB133111EB)
            weight ^= weight >> numba.uint64(31)
            total += weight * numba.uint64(tokens[at] + 1)
            total += (weight ^ numba.uint64(0x9E3779B97F4A7C15)) * numba.uint64(
                labels[at] + 1 - IGNORE
            )
            at += 1
    return total & numba.uint64((1 << DIGEST_BITS) - 1)


@numba.njit(nogil=True, cache=True)
def fill_positions(cu_seqlens, pieces, positions):
    """Place in its segment of each token in the pieces."""
    at = 0
    for i in range(len(pieces)):
        low, high = pieces[i]
        segment = np.searchsorted(cu_seqlens, low, side="right") - 1
        while low < high:
            begin = cu_seqlens[segment]
            end = min(high, cu_seqlens[segment + 1])
            for j in range(end - low):
                positions[at + j] = low - begin + j
            at += end - low
            low = end
            segment += 1
