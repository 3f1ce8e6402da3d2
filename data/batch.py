"""One rank's slice of one microbatch: tokens, shifted labels, positions and sequence boundaries.

A microbatch is T packed tokens with no batch dim: its samples one after another. A context-parallel
rank holds one or two pieces of it, together t = T / cp tokens, and reads no others, but for one
token per piece and sample, the label of the last position. Boundaries and positions come from the
stream's prefix offsets.

A sequence is what attention stays within: a document (as far as the sample holds it), or without
document masking a whole sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np
import torch

from data.source_runs import NO_SOURCE, SourceRun, source_runs
from data.stream import DocumentStream, Spans

IGNORE = -100
"""Label of a position without a target; torch's own default."""
PADDING_SEQUENCE_TOKENS = 1024
"""Tokens of a sequence of padding at most, so that next to no attention is computed for it."""


class Sample(NamedTuple):
    """What one sample holds, in order; it is padded where that is less than its length."""

    stream: DocumentStream
    intervals: np.ndarray
    """int64 [intervals, 2]: position in the stream, tokens."""
    following: int = -1
    """Position in the stream of the token that comes next; -1 = there is none. Asked for without
    document masking."""
    source: int = NO_SOURCE
    """Number of the source in its blend, where that is asked for."""


@dataclass
class Batch:
    """A rank's slice of a microbatch. T = tokens of the microbatch, t = those of this rank."""

    tokens: torch.Tensor
    """int64 [t]"""
    labels: torch.Tensor
    """int64 [t], IGNORE where there is no target"""
    positions: torch.Tensor
    """int64 [t], from 0 in each sequence"""
    cu_seqlens: torch.Tensor
    """int32 [sequences + 1], over all T tokens: where each begins; stays on the host"""
    num_targets: int = -1
    """Targets of this slice; counted when not given."""
    digest: int = 0
    """`digest` of this slice."""
    source_runs: tuple[SourceRun, ...] = ()
    """Which source gave which tokens of this slice; empty where that is not asked for."""

    def __post_init__(self) -> None:
        if self.num_targets < 0:
            self.num_targets = int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same on another device; a GPU fetches it while the host goes on."""
        target = torch.device(device)
        return Batch(
            _move(self.tokens, target),
            _move(self.labels, target),
            _move(self.positions, target),
            self.cu_seqlens,
            self.num_targets,
            self.digest,
            self.source_runs,
        )


def _move(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def padding_starts(begin: int, end: int) -> np.ndarray:
    """List where the sequences of the padding [begin, end) begin: int64 [sequences]."""
    return np.arange(begin, end, PADDING_SEQUENCE_TOKENS)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class LabelRules:
    """Which positions have a target, and which ids are legal."""

    document_masking: bool = True
    """Each document is a sequence without a target at its end; otherwise each sample is one."""
    eod: int | None = None
    """Id that ends documents; fills the padding."""
    eod_mask_loss: bool = False
    """No target where the input is `eod` (Megatron-LM's meaning)."""
    vocab_size: int | None = None
    """Ids are checked against it when given."""

    def __post_init__(self) -> None:
        if self.eod_mask_loss and self.eod is None:
            raise ValueError(
                "eod_mask_loss = True: the tokenizer has no end-of-document token. Fix: remove it."
            )

    def check_id(self, token: int, prefix: str) -> None:
        """Raise ValueError where an id of the corpus `prefix` is outside the vocabulary."""
        if self.vocab_size is not None and token >= self.vocab_size:
            raise ValueError(f"token id {token} in {prefix}: {self._id_rule()}")

    def check_spans(
        self, stream: DocumentStream, documents: np.ndarray, lengths: np.ndarray, ids: np.ndarray
    ) -> None:
        """Raise ValueError where an id is outside the vocabulary; names its document.

        Args:
            documents, lengths: [spans]; ids: their tokens one after another.
        """
        if self.vocab_size is None or (ids.min() >= 0 and ids.max() < self.vocab_size):
            return
        wrong = int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
        document = int(documents[np.searchsorted(np.cumsum(lengths), wrong, side="right")])
        raise ValueError(
            f"token id {ids[wrong]} in document {document} of {stream.reader.prefix}: "
            f"{self._id_rule()}"
        )

    def _id_rule(self) -> str:
        return (
            f"must be in [0, vocab_size = {self.vocab_size}). Fix: give the tokenizer (or "
            "--vocab-size) that made the corpus."
        )


class _Located(NamedTuple):
    """A sample and where its spans lie."""

    sample: Sample
    spans: Spans
    begins: np.ndarray
    """int64 [spans + 1]: place of each span in the sample, then their end."""
    seq_length: int

    @staticmethod
    def make(sample: Sample, seq_length: int) -> "_Located":
        spans = sample.stream.locate(sample.intervals)
        begins = np.zeros(len(spans.lengths) + 1, dtype=np.int64)
        np.cumsum(spans.lengths, out=begins[1:])
        assert begins[-1] <= seq_length, (begins[-1], seq_length)
        return _Located(sample, spans, begins, seq_length)

    def sequence_starts(self, *, document_masking: bool) -> np.ndarray:
        """List where a sequence begins: at each document or at the sample, and in the padding."""
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
    """Read those of a microbatch's tokens that lie in `pieces`, in that order.

    The label of a token is the next one of its document, also where the sample cuts the document.
    The last token of a document has none with document masking, and without it the token that
    follows in the sample (at its end, the one that `following` names). Padding is token 0 (eod
    where there is one) without a label, in sequences of its own.

    Args:
        samples: of the microbatch, in order.
        seq_length: tokens per sample.
        pieces: half-open ranges of the microbatch's T = len(samples) x seq_length tokens; all by
            default.
        document_masking, eod, eod_mask_loss, vocab_size: see LabelRules.

    Raises:
        ValueError: a token id is not below vocab_size, or eod_mask_loss without an eod.
    """
    rules = LabelRules(
        document_masking=document_masking,
        eod=eod,
        eod_mask_loss=eod_mask_loss,
        vocab_size=vocab_size,
    )
    total = len(samples) * seq_length
    pieces = [(0, total)] if pieces is None else pieces
    located = [_Located.make(sample, seq_length) for sample in samples]
    # Boundaries are global: every rank knows all sequences, and reads its own tokens.
    starts = [
        i * seq_length + sample.sequence_starts(document_masking=document_masking)
        for i, sample in enumerate(located)
    ]
    cu_seqlens = np.concatenate([*starts, [total]])
    tokens, labels, targets = _read_pieces(located, seq_length, pieces, rules)
    positions = np.empty(len(tokens), dtype=np.int64)
    fill_positions(cu_seqlens, np.array(pieces, dtype=np.int64), positions)
    sources = [sample.source for sample in samples]
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        targets,
        source_runs=source_runs(sources, seq_length, pieces, labels != IGNORE),
    )


def _read_pieces(
    located: Sequence[_Located],
    seq_length: int,
    pieces: Sequence[tuple[int, int]],
    rules: LabelRules,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Read the tokens in the pieces -> tokens and labels, int64 [t], and the number of targets."""
    size = sum(high - low for low, high in pieces)
    # Tokens that are read for labels, and not kept, need room behind the last one.
    extra = 1 + max(len(sample.sample.intervals) for sample in located)
    tokens = np.empty(size + extra, dtype=np.int64)
    labels = np.empty(size, dtype=np.int64)
    filled = 0
    targets = 0
    for low, high in pieces:
        # A piece may begin in one sample and end in another.
        for i in range(low // seq_length, -(-high // seq_length)):
            first = max(low - i * seq_length, 0)
            last = min(high - i * seq_length, seq_length)
            part = labels[filled : filled + last - first]
            targets += _read_part(located[i], first, last, rules, tokens[filled:], part)
            filled += last - first
    tokens = tokens[:size]
    # By the input, and so only once all inputs are there.
    if rules.eod_mask_loss:
        labels[tokens == rules.eod] = IGNORE
        targets = int((labels != IGNORE).sum())
    return tokens, labels, targets


def _read_part(
    located: _Located,
    first: int,
    last: int,
    rules: LabelRules,
    tokens: np.ndarray,
    labels: np.ndarray,
) -> int:
    """Fill the tokens [first, last) of a sample and their labels -> number of targets.

    Reads one token more where a label needs it, so that `tokens` is longer.
    """
    stream = located.sample.stream
    begins = located.begins
    padding = 0 if rules.eod is None else rules.eod
    real_end = max(first, min(last, int(begins[-1])))  # padding from here on
    labels[real_end - first :] = IGNORE
    if real_end == first:
        tokens[: last - first] = padding
        return 0
    # The spans [low, high) are touched; the first and the last perhaps only in part.
    low = int(np.searchsorted(begins, first, side="right")) - 1
    high = int(np.searchsorted(begins, real_end, side="left"))
    documents, offsets, lengths, rests = (array[low:high].copy() for array in located.spans[:4])
    # Cut them to what lies in [first, real_end).
    skipped = first - int(begins[low])
    left = int(begins[high]) - real_end
    offsets[0] += skipped
    lengths[0] -= skipped
    lengths[-1] -= left
    rests[-1] += left
    # The token after a span that does not end its document is read with it: it is a label.
    inner = rests > 0
    window = tokens[: int(lengths.sum() + inner.sum())]
    stream.reader.read_spans(documents, offsets, lengths + inner, window)
    rules.check_spans(stream, documents, lengths + inner, window)
    # Without document masking the last token's label may lie in what follows.
    after = IGNORE
    if not rules.document_masking and rests[-1] == 0:
        after = _token_after(located, high)
        rules.check_id(after, stream.reader.prefix)
    targets = _shift(window, lengths, inner, offsets == 0, rules.document_masking, after, labels)
    if inner[:-1].any():
        _compact(window, lengths, inner)
    tokens[real_end - first : last - first] = padding
    return targets


def _token_after(located: _Located, span: int) -> int:
    """Read the first token of a span, or after the last one the token that follows the sample;
    IGNORE if none does."""
    spans = located.spans
    stream = located.sample.stream
    if span < len(spans.lengths):
        if spans.offsets[span] > 0:
            return IGNORE
        out = np.empty(1, dtype=np.int64)
        one = slice(span, span + 1)
        stream.reader.read_spans(
            spans.documents[one], spans.offsets[one], np.ones(1, dtype=np.int64), out
        )
        return int(out[0])
    # Behind the sample: only the beginning of a document follows it, not the rest of one.
    following = located.sample.following
    if following < 0 or stream.document_start(following) != following:
        return IGNORE
    return int(stream.read(following, 1)[0])


@numba.njit(nogil=True, cache=True)
def _shift(window, lengths, inner, starting, document_masking, after, labels):
    """Fill the labels of the spans in `window` -> number of targets.

    inner[i]: a token more of span i's document lies behind it. starting[i]: span i begins its
    document; if not, its first token is the label of the one before it there. after: label of the
    last token, where its document ends.
    """
    read = 0
    written = 0
    targets = 0
    for i in range(len(lengths)):
        length = lengths[i]
        # Within a span, the next token.
        for j in range(length - 1):
            labels[written + j] = window[read + j + 1]
        # At its end: the rest of the document, nothing, or what follows in the sample.
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


@numba.njit(nogil=True, cache=True)
def fill_positions(cu_seqlens, pieces, positions):
    """Fill the place in its sequence of each token in the pieces, int64 [pieces, 2]."""
    filled = 0
    for i in range(len(pieces)):
        low, high = pieces[i]
        sequence = np.searchsorted(cu_seqlens, low, side="right") - 1
        while low < high:
            begin = cu_seqlens[sequence]
            end = min(high, cu_seqlens[sequence + 1])
            for j in range(end - low):
                positions[filled + j] = low - begin + j
            filled += end - low
            low = end
            sequence += 1
