"""A source as one endless token stream, whatever the sequence length.

Epoch e is a permutation of the source's documents, seeded by (seed, e); the stream is the epochs
one after another. The permutation needs no table (permutation.py), and a prefix offset is kept for
each block of 16 permuted documents, so an epoch of n documents costs n / 2 bytes. A stream position
is found by a binary search over the blocks and a walk in one of them; reading is a pure function of
the position.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numba
import numpy as np
import xxhash

from data.cache import IndexCache
from data.config import parse_split
from data.permutation import BATCH, Permutation, permuted, permuted_batch

SPLITS = ("train", "valid", "test")
KEPT_EPOCHS = 2
BLOCK = 16
"""Documents per prefix offset."""
SPLIT_PURPOSE = 1
EPOCH_PURPOSE = 2
"""Keep the seeds of the two permutations apart."""


class Reader(Protocol):
    """What a stream reads from: IndexedReader, SyntheticReader."""

    prefix: str
    document_lengths: np.ndarray

    def read_spans(
        self, documents: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, out: np.ndarray
    ) -> None: ...

    def fingerprint(self) -> str: ...


class Spans(NamedTuple):
    """Pieces of documents, in order: int64 [spans] each, lengths above 0."""

    documents: np.ndarray
    """Number of the document in the reader."""
    offsets: np.ndarray
    """First token in the document."""
    lengths: np.ndarray
    rests: np.ndarray
    """Tokens of the document after the span; 0 = the span ends its document."""
    intervals: np.ndarray
    """Which of the intervals asked for the span belongs to."""


class _Epoch(NamedTuple):
    """blocks: int64 [blocks + 1], tokens of the epoch before each block of permuted documents."""

    permutation: Permutation
    blocks: np.ndarray


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
                f"{reader.prefix}: no document has a token. Fix: give a corpus that is not empty, another "
                "split, or another range of lengths."
            )
        self._cache = cache or IndexCache(None)
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()
        self._identity: dict | None = None

    def locate(self, intervals: np.ndarray) -> Spans:
        """The spans of documents at the given intervals of the stream, in order.

        Args:
            intervals: int64 [intervals, 2], stream position of the first token and number of tokens
                of each.
        """
        intervals = np.asarray(intervals, dtype=np.int64).reshape(-1, 2)
        assert (intervals >= 0).all(), intervals
        first_epochs = intervals[:, 0] // self.tokens_per_epoch
        last_epochs = (intervals.sum(axis=1) - 1) // self.tokens_per_epoch
        if len(intervals) and first_epochs.min() == last_epochs.max():
            return self._locate_in(int(first_epochs[0]), intervals, np.arange(len(intervals)))
        parts = [(np.empty(0, dtype=np.int64),) * 5]
        for number, (start, length) in enumerate(intervals.tolist()):
            while length > 0:
                epoch, local = divmod(start, self.tokens_per_epoch)
                count = min(length, self.tokens_per_epoch - local)
                parts.append(self._locate_in(epoch, np.array([[start, count]]), np.array([number])))
                start = start + count
                length = length - count
        return Spans(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def spans(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document, offset in it and length of each span at stream positions [start, start +
        length)."""
        found = self.locate(np.array([[start, length]]))
        return found.documents, found.offsets, found.lengths

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens at stream positions [start, start + length) -> int64 [length], a copy."""
        out = np.empty(length, dtype=np.int64)
        self.reader.read_spans(*self.spans(start, length), out)
        return out

    def documents_before(self, position: int) -> int:
        """Documents that begin at stream positions below `position`, over all epochs."""
        epoch, local = divmod(position, self.tokens_per_epoch)
        if local == 0:
            return epoch * self.num_documents
        permutation, blocks = self._epoch(epoch)
        return (
            epoch * self.num_documents
            + int(_find_document(local - 1, self.lengths, permutation, blocks)[0])
            + 1
        )

    def first_documents(self, count: int, at_least: int) -> list[int]:
        """Numbers in the reader of the stream's first `count` documents that have `at_least`
        tokens, each once."""
        count = min(count, int(np.count_nonzero(self.lengths >= at_least)))
        found: list[int] = []
        for start in range(0, self.tokens_per_epoch, 1 << 20):
            if len(found) >= count:
                break
            documents, offsets, _ = self.spans(start, min(1 << 20, self.tokens_per_epoch - start))
            documents = documents[offsets == 0]
            found += documents[self.reader.document_lengths[documents] >= at_least].tolist()
        return found[:count]

    def document_start(self, position: int) -> int:
        """The first stream position >= `position` at which a document begins (or an epoch, as one
        then does)."""
        epoch, local = divmod(position, self.tokens_per_epoch)
        if local == 0:
            return position
        permutation, blocks = self._epoch(epoch)
        _, document, start = _find_document(local, self.lengths, permutation, blocks)
        end = int(start) + int(self.lengths[document])
        return position if start == local else epoch * self.tokens_per_epoch + end

    def fingerprint(self) -> dict:
        """JSON-able identity of what the stream reads: the files, and which of their documents."""
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
        """The spans of intervals that lie in one epoch; `numbers`: what to call them."""
        permutation, blocks = self._epoch(epoch)
        starts = intervals[:, 0] - epoch * self.tokens_per_epoch
        documents, *rest, found = _find_spans(
            starts, intervals[:, 1], self.lengths, permutation, blocks
        )
        if self.documents is not None:
            documents = self.documents[documents].astype(np.int64)
        return Spans(documents, *rest, numbers[found])

    def _epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            if epoch not in self._epochs:
                permutation = Permutation.make(self.num_documents, self.seed, EPOCH_PURPOSE, epoch)
                key = {
                    "what": "offsets",
                    "block": BLOCK,
                    "seed": self.seed,
                    "epoch": epoch,
                } | self.fingerprint()
                arrays = self._cache.get(
                    key, lambda: {"blocks": _prefix_offsets(self.lengths, permutation)}
                )
                while len(self._epochs) >= KEPT_EPOCHS:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[epoch] = _Epoch(permutation, arrays["blocks"])
            return self._epochs[epoch]


def split_documents(num_documents: int, split: str, seed: int) -> dict[str, np.ndarray]:
    """Cut a seeded permutation of the documents by shares -> split name -> document ids, ascending.

    Random, so that each split is representative, while Megatron-LM cuts in file order. A share
    above 0 gets at least one document as long as there are enough; train comes first, then valid.

    Args:
        split: shares such as `969,30,1`.

    Raises:
        ValueError: `split` is malformed.
    """
    shares = parse_split(split)
    counts = [int(round(share * num_documents)) for share in shares]
    wanted = [i for i, share in enumerate(shares) if share > 0]
    for i in wanted[:num_documents]:
        counts[i] = max(1, counts[i])
    while (excess := sum(counts) - num_documents) > 0:
        largest = max(range(3), key=lambda i: (counts[i], i))
        counts[largest] -= min(excess, max(1, counts[largest] - 1))
    counts[0] += num_documents - sum(counts)
    ends = np.cumsum(counts)
    if counts[0] == num_documents:
        whole = np.arange(num_documents, dtype=_id_type(num_documents))
        return {"train": whole, "valid": whole[:0], "test": whole[:0]}
    # A permutation ranks the documents: those of the lowest ranks train.
    permutation = Permutation.make(num_documents, seed, SPLIT_PURPOSE)
    outs = [np.empty(count, dtype=_id_type(num_documents)) for count in counts]
    _deal(permutation, ends, *outs)
    return dict(zip(SPLITS, outs, strict=True))


def _hash_ids(ids: np.ndarray) -> str:
    """xxh3 of the numbers as int64, hex, a block at a time."""
    digest = xxhash.xxh3_128()
    for start in range(0, len(ids), 1 << 20):
        digest.update(np.ascontiguousarray(ids[start : start + (1 << 20)], dtype=np.int64))
    return digest.hexdigest()


def _id_type(num_documents: int) -> type[np.integer]:
    return np.uint32 if num_documents <= 2**32 else np.int64


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _prefix_offsets(lengths: np.ndarray, permutation: Permutation) -> np.ndarray:
    """Tokens before each block of BLOCK permuted documents -> int64 [blocks + 1], on all cores."""
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
    """out[i] = tokens of the documents of block first + i."""
    low = np.empty(BATCH, dtype=np.uint32)
    high = np.empty(BATCH, dtype=np.uint32)
    documents = np.empty(BATCH, dtype=np.int64)
    start = first * BLOCK
    end = min(len(lengths), (first + len(out)) * BLOCK)
    out[:] = 0
    for batch in range(start, end, BATCH):
        count = min(BATCH, end - batch)
        permuted_batch(batch, permutation, low, high, documents[:count])
        for i in range(count):
            out[(batch + i - start) // BLOCK] += lengths[documents[i]]


@numba.njit(nogil=True, cache=True)
def _deal(permutation, ends, train, valid, test):
    """Put each document into the split whose range of ranks its own lies in."""
    counts = np.zeros(3, dtype=np.int64)
    low = np.empty(BATCH, dtype=np.uint32)
    high = np.empty(BATCH, dtype=np.uint32)
    ranks = np.empty(BATCH, dtype=np.int64)
    for document in range(permutation.size):
        if document % BATCH == 0:
            permuted_batch(
                document, permutation, low, high, ranks[: min(BATCH, permutation.size - document)]
            )
        rank = ranks[document % BATCH]
        if rank < ends[0]:
            train[counts[0]] = document
            counts[0] += 1
        elif rank < ends[1]:
            valid[counts[1]] = document
            counts[1] += 1
        else:
            test[counts[2]] = document
            counts[2] += 1


@numba.njit(nogil=True, cache=True)
def _find_document(position, lengths, permutation, blocks):
    """The document at a position of the epoch -> (place in the epoch's order, document, where it
    begins)."""
    block = np.searchsorted(blocks, position, side="right") - 1
    place = block * BLOCK
    start = blocks[block]
    document = permuted(place, permutation)
    while start + lengths[document] <= position:
        start += lengths[document]
        place += 1
        document = permuted(place, permutation)
    return place, document, start


@numba.njit(nogil=True, cache=True)
def _find_spans(starts, counts, lengths, permutation, blocks):
    """Documents, offsets, lengths, rests and interval of the spans at positions [starts, starts +
    counts)."""
    room = 2 * len(starts) + 64
    out = np.empty((5, room), dtype=np.int64)
    used = 0
    low = np.empty(BATCH, dtype=np.uint32)
    high = np.empty(BATCH, dtype=np.uint32)
    batch = np.empty(BATCH, dtype=np.int64)
    for i in range(len(starts)):
        if counts[i] == 0:
            continue
        position = starts[i]
        end = starts[i] + counts[i]
        place, document, start = _find_document(position, lengths, permutation, blocks)
        single, next_batch = (
            place + BLOCK,
            place + BLOCK,
        )  # a batch pays where an interval has many documents
        while True:
            if used == room:
                room *= 2
                larger = np.empty((5, room), dtype=np.int64)
                larger[:, :used] = out
                out = larger
            stop = min(end, start + lengths[document])
            out[0, used] = document
            out[1, used] = position - start
            out[2, used] = stop - position
            out[3, used] = start + lengths[document] - stop
            out[4, used] = i
            used += 1
            if stop == end:
                break
            position = start = stop
            place += 1
            if place < single:
                document = permuted(place, permutation)
            else:
                if place == next_batch:
                    size = min(BATCH, permutation.size - place)
                    permuted_batch(place, permutation, low, high, batch[:size])
                    next_batch = place + size
                document = batch[place - next_batch + size]
    out = out[:, :used]
    return out[0], out[1], out[2], out[3], out[4]
