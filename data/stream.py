"""A source as one endless token stream, whatever the sequence length.

Epoch e is a permutation of the source's documents, seeded by (seed, e); the stream is the epochs
one after another. The permutation needs no table (permutation.py), and a prefix offset is kept for
each block of 16 permuted documents, so an epoch of n documents costs n / 2 bytes. locating.py finds
a stream position with them; reading is a pure function of the position.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numba
import numpy as np
import xxhash

from data.cache import IndexCache
from data.locating import BLOCK, find_document, find_lengths, find_spans
from data.permutation import BATCH, Permutation, permuted_batch

KEPT_EPOCHS = 2
"""Epochs whose offsets stay in memory: the one under way and the next."""
SCANNED_TOKENS = 1 << 20
"""Tokens of a stream that a scan looks at together."""
EPOCH_PURPOSE = 2
"""Keeps the seeds of the epochs apart from that of the split (document_split.py)."""


class Reader(Protocol):
    """What a stream reads its documents from: IndexedReader, SyntheticReader."""

    prefix: str
    document_lengths: np.ndarray

    def read_spans(
        self, documents: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, out: np.ndarray
    ) -> None:
        """Copy tokens [offset, offset + length) of each document in a row into `out`, int64."""
        ...

    def fingerprint(self) -> str:
        """Return a text that is the same for the same tokens only."""
        ...


class Spans(NamedTuple):
    """Pieces of documents, in order: int64 [spans] each, lengths above 0."""

    documents: np.ndarray
    """Number of the document in the reader."""
    offsets: np.ndarray
    """First token in the document."""
    lengths: np.ndarray
    """Tokens of the span."""
    rests: np.ndarray
    """Tokens of the document after the span; 0 = the span ends its document."""
    intervals: np.ndarray
    """Which of the intervals asked for the span belongs to."""


class DocumentLengths(NamedTuple):
    """How many tokens of each document some samples, or intervals of a stream, hold, in order."""

    lengths: np.ndarray
    """int64 [documents], above 0."""
    begins: np.ndarray
    """int64 [samples + 1]: where those of each sample begin, then their end."""


class _Epoch(NamedTuple):
    """The order of the documents in one epoch."""

    permutation: Permutation
    blocks: np.ndarray
    """int64 [blocks + 1]: tokens of the epoch before each block of permuted documents."""


class DocumentStream:
    """The documents of one source as an endless stream of tokens. Safe to read from several
    threads.

    Attributes: reader, documents (ids of those that are not empty, ascending; None = all of the
    reader's), seed, num_documents, tokens_per_epoch.
    """

    def __init__(
        self,
        reader: Reader,
        documents: np.ndarray | None,
        seed: int,
        cache: IndexCache | None = None,
    ):
        """
        Args:
            documents: ids of the documents to stream, ascending; None = all.
            cache: keeps the prefix offsets across starts.

        Raises:
            ValueError: the documents hold no token.
        """
        lengths = (
            reader.document_lengths if documents is None else reader.document_lengths[documents]
        )
        # Empty documents have no place in the stream.
        if len(lengths) and int(lengths.min()) == 0:
            keep = np.flatnonzero(lengths)
            documents = keep if documents is None else documents[keep]
            lengths = lengths[keep]
        self.reader = reader
        self.documents = documents
        self.lengths = lengths
        self.seed = seed
        self.num_documents = len(lengths)
        self.tokens_per_epoch = int(lengths.sum(dtype=np.int64))
        if self.tokens_per_epoch == 0:
            raise ValueError(
                f"{reader.prefix}: no document has a token. Fix: give a corpus that is not empty, "
                "another split, or another range of lengths."
            )
        self._cache = cache or IndexCache(None)
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()
        self._identity: dict | None = None

    def locate(self, intervals: np.ndarray) -> Spans:
        """Find the spans of documents at the given intervals of the stream, in order.

        Args:
            intervals: int64 [intervals, 2], stream position of the first token and number of tokens
                of each.
        """
        intervals = np.asarray(intervals, dtype=np.int64).reshape(-1, 2)
        assert (intervals >= 0).all(), intervals
        nothing = np.empty(0, dtype=np.int64)
        parts = [Spans(nothing, nothing, nothing, nothing, nothing)]
        parts += [self._locate_in(*part) for part in self._by_epoch(intervals)]
        if len(parts) == 2:
            return parts[1]
        return Spans._make(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def find_lengths(self, intervals: np.ndarray) -> DocumentLengths:
        """Find how many tokens of each document lie in the given intervals of the stream, in order.

        Args:
            intervals: as of `locate`.
        """
        intervals = np.asarray(intervals, dtype=np.int64).reshape(-1, 2)
        counts = np.zeros(len(intervals), dtype=np.int64)
        parts = [np.empty(0, dtype=np.int64)]
        for epoch, pieces, numbers in self._by_epoch(intervals):
            permutation, blocks = self._epoch(epoch)
            starts = pieces[:, 0] - epoch * self.tokens_per_epoch
            lengths, begins = find_lengths(starts, pieces[:, 1], self.lengths, permutation, blocks)
            parts.append(lengths)
            np.add.at(counts, numbers, np.diff(begins))
        lengths = parts[1] if len(parts) == 2 else np.concatenate(parts)
        return DocumentLengths(lengths, np.concatenate([[0], np.cumsum(counts)]))

    def _by_epoch(self, intervals: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Cut intervals at the ends of epochs -> an epoch, intervals in it, and their numbers."""
        # The usual case: all in one epoch.
        first_epochs = intervals[:, 0] // self.tokens_per_epoch
        last_epochs = (intervals.sum(axis=1) - 1) // self.tokens_per_epoch
        if len(intervals) and first_epochs.min() == last_epochs.max():
            yield int(first_epochs[0]), intervals, np.arange(len(intervals))
            return
        # Otherwise one interval after another.
        for number, (start, length) in enumerate(intervals.tolist()):
            while length > 0:
                epoch, local = divmod(start, self.tokens_per_epoch)
                count = min(length, self.tokens_per_epoch - local)
                yield epoch, np.array([[start, count]]), np.array([number])
                start = start + count
                length = length - count

    def spans(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find document, offset in it and length of each span at stream positions [start, start +
        length)."""
        found = self.locate(np.array([[start, length]]))
        return found.documents, found.offsets, found.lengths

    def read(self, start: int, length: int) -> np.ndarray:
        """Copy the tokens at stream positions [start, start + length) -> int64 [length]."""
        out = np.empty(length, dtype=np.int64)
        self.reader.read_spans(*self.spans(start, length), out)
        return out

    def documents_before(self, position: int) -> int:
        """Count the documents that begin at stream positions below `position`, over all epochs."""
        epoch, local = divmod(position, self.tokens_per_epoch)
        before = epoch * self.num_documents
        if local == 0:
            return before
        permutation, blocks = self._epoch(epoch)
        place, _, _ = find_document(local - 1, self.lengths, permutation, blocks)
        return before + int(place) + 1

    def first_documents(self, count: int, at_least: int) -> list[int]:
        """List the numbers in the reader of the stream's first `count` documents that have
        `at_least` tokens, each once."""
        count = min(count, int(np.count_nonzero(self.lengths >= at_least)))
        found: list[int] = []
        # A part of the first epoch at a time, until enough are found.
        for start in range(0, self.tokens_per_epoch, SCANNED_TOKENS):
            if len(found) >= count:
                break
            length = min(SCANNED_TOKENS, self.tokens_per_epoch - start)
            documents, offsets, _ = self.spans(start, length)
            documents = documents[offsets == 0]
            found += documents[self.reader.document_lengths[documents] >= at_least].tolist()
        return found[:count]

    def document_start(self, position: int) -> int:
        """Find the first stream position >= `position` at which a document begins (or an epoch, as
        one then does)."""
        epoch, local = divmod(position, self.tokens_per_epoch)
        if local == 0:
            return position
        permutation, blocks = self._epoch(epoch)
        _, document, start = find_document(local, self.lengths, permutation, blocks)
        end = int(start) + int(self.lengths[document])
        return position if start == local else epoch * self.tokens_per_epoch + end

    def fingerprint(self) -> dict:
        """Identify what the stream reads, JSON-able: the files, and which of their documents."""
        if self._identity is None:
            selection = "all" if self.documents is None else _hash_ids(self.documents)
            self._identity = {
                "corpus": self.reader.fingerprint(),
                "documents": self.num_documents,
                "tokens": self.tokens_per_epoch,
                "selection": selection,
            }
        return self._identity

    def _locate_in(self, epoch: int, intervals: np.ndarray, numbers: np.ndarray) -> Spans:
        """Find the spans of intervals that lie in one epoch; `numbers`: what to call them."""
        permutation, blocks = self._epoch(epoch)
        starts = intervals[:, 0] - epoch * self.tokens_per_epoch
        documents, offsets, lengths, rests, found = find_spans(
            starts, intervals[:, 1], self.lengths, permutation, blocks
        )
        # From numbers among the stream's documents to those of the reader.
        if self.documents is not None:
            documents = self.documents[documents].astype(np.int64)
        return Spans(documents, offsets, lengths, rests, numbers[found])

    def _epoch(self, epoch: int) -> _Epoch:
        """Give the order of an epoch, from memory, the cache, or made now."""
        with self._lock:
            if epoch not in self._epochs:
                while len(self._epochs) >= KEPT_EPOCHS:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[epoch] = self._make_epoch(epoch)
            return self._epochs[epoch]

    def _make_epoch(self, epoch: int) -> _Epoch:
        permutation = Permutation.make(self.num_documents, self.seed, EPOCH_PURPOSE, epoch)
        key = {"what": "offsets", "block": BLOCK, "seed": self.seed, "epoch": epoch}
        arrays = self._cache.get(
            key | self.fingerprint(),
            lambda: {"blocks": _prefix_offsets(self.lengths, permutation)},
        )
        return _Epoch(permutation, arrays["blocks"])


def _hash_ids(ids: np.ndarray) -> str:
    """Hash the numbers as int64, a block at a time -> xxh3, hex."""
    digest = xxhash.xxh3_128()
    for start in range(0, len(ids), 1 << 20):
        digest.update(np.ascontiguousarray(ids[start : start + (1 << 20)], dtype=np.int64).data)
    return digest.hexdigest()


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _prefix_offsets(lengths: np.ndarray, permutation: Permutation) -> np.ndarray:
    """Count the tokens before each block of BLOCK permuted documents -> int64 [blocks + 1].

    Takes all cores: a few parts for each, but none too small to be worth a thread.
    """
    blocks = -(-len(lengths) // BLOCK)
    offsets = np.zeros(blocks + 1, dtype=np.int64)
    share = max(1 << 16, -(-blocks // (4 * usable_cores())))
    starts = range(0, blocks, share)

    def work(start: int) -> None:
        _sum_blocks(lengths, permutation, start, offsets[1 + start : 1 + start + share])

    if len(starts) == 1:  # most sources are small, and there may be thousands
        work(0)
    else:
        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(work, starts))
    return np.cumsum(offsets, out=offsets)


@numba.njit(nogil=True, cache=True)
def _sum_blocks(lengths, permutation, first, out):
    """Fill out[i] with the tokens of the documents of block first + i."""
    low = np.empty(BATCH, dtype=np.uint32)
    high = np.empty(BATCH, dtype=np.uint32)
    documents = np.empty(BATCH, dtype=np.int64)
    start = first * BLOCK
    end = min(len(lengths), (first + len(out)) * BLOCK)
    out[:] = 0
    # A batch of documents at a time goes through the permutation.
    for batch in range(start, end, BATCH):
        count = min(BATCH, end - batch)
        permuted_batch(batch, permutation, low, high, documents[:count])
        for i in range(count):
            out[(batch + i - start) // BLOCK] += lengths[documents[i]]
