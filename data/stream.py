"""A corpus as one endless token stream, whatever the sequence length.

Epoch e is a permutation of the documents, seeded by (seed, e); the stream is the epochs one after
another. Prefix offsets over the permuted documents turn a stream position into a document and an
offset by binary search, so reading is a pure function of the position.
"""

import threading
from typing import Protocol

import numpy as np
import xxhash

from data.config import parse_split

SPLITS = ("train", "valid", "test")
KEPT_EPOCHS = 2


class Reader(Protocol):
    """What a stream reads from: IndexedReader, SyntheticReader."""

    prefix: str
    document_lengths: np.ndarray

    def read_into(self, document: int, offset: int, out: np.ndarray) -> None: ...

    def fingerprint(self) -> str: ...


def permutation(size: int, *seed: int) -> np.ndarray:
    """Seeded permutation of range(size) -> int64 [size].

    Sorts raw PCG64 output. numpy guarantees that output for all its versions, but not that of
    Generator.permutation, and a run may be continued years later.
    """
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size)
    return np.argsort(keys, kind="stable")


def split_documents(num_documents: int, split: str, seed: int) -> dict[str, np.ndarray]:
    """Cut a seeded permutation of the documents by shares -> split name -> document ids, int64, sorted.

    Random, so that each split is representative, while Megatron-LM cuts in file order. A share above
    0 gets at least one document as long as there are enough; train comes first, then valid.

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
    order = permutation(num_documents, seed, 0x5BD17)  # apart from the epochs' seeds
    ends = np.cumsum(counts)
    return {name: np.sort(order[end - count:end]) for name, count, end in zip(SPLITS, counts, ends, strict=True)}


class DocumentStream:
    """The documents of one split as an endless stream of tokens. Safe to read from several threads.

    Attributes: reader, documents (int64, ids of those that are not empty), seed, tokens_per_epoch.
    """

    def __init__(self, reader: Reader, documents: np.ndarray, seed: int):
        """Raises ValueError when the documents hold no token."""
        lengths = reader.document_lengths[documents]
        self.reader, self.documents, self.seed = reader, np.asarray(documents, dtype=np.int64)[lengths > 0], seed
        self._lengths = lengths[lengths > 0].astype(np.int64)
        self.tokens_per_epoch = int(self._lengths.sum())
        if self.tokens_per_epoch == 0:
            raise ValueError(f"{reader.prefix}: {len(documents)} documents without a single token. Fix: give a corpus "
                             "that is not empty, or another split.")
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def spans(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces of documents at stream positions [start, start + length).

        Returns:
            document, offset in the document, length: int64 [pieces] each, lengths > 0. A boundary
            between two pieces is always an end of a document, even where both have the same id.
        """
        assert start >= 0 and length >= 0, (start, length)
        pieces = []
        while length > 0:
            epoch, local = divmod(start, self.tokens_per_epoch)
            count = min(length, self.tokens_per_epoch - local)
            documents, offsets = self._epoch(epoch)
            first = int(np.searchsorted(offsets, local, side="right")) - 1
            last = int(np.searchsorted(offsets, local + count, side="left"))
            begins = np.maximum(offsets[first:last], local)
            ends = np.minimum(offsets[first + 1:last + 1], local + count)
            pieces.append((documents[first:last], begins - offsets[first:last], ends - begins))
            start, length = start + count, length - count
        if not pieces:
            return (np.empty(0, dtype=np.int64),) * 3
        documents, offsets, lengths = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return documents, offsets, lengths

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens at stream positions [start, start + length) -> int64 [length], a copy."""
        out, at = np.empty(length, dtype=np.int64), 0
        for document, offset, count in zip(*(part.tolist() for part in self.spans(start, length)), strict=True):
            self.reader.read_into(document, offset, out[at:at + count])
            at += count
        return out

    def fingerprint(self) -> dict:
        """JSON-able identity of what the stream reads: the files, and which of their documents."""
        return {"corpus": self.reader.fingerprint(), "documents": len(self.documents),
                "tokens": self.tokens_per_epoch, "selection": xxhash.xxh3_128_hexdigest(self.documents.tobytes())}

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Document ids in this epoch's order, int64 [documents], and their prefix offsets, int64 [documents + 1]."""
        with self._lock:
            if epoch not in self._epochs:
                order = permutation(len(self.documents), self.seed, epoch)
                offsets = np.zeros(len(order) + 1, dtype=np.int64)
                np.cumsum(self._lengths[order], out=offsets[1:])
                while len(self._epochs) >= KEPT_EPOCHS:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[epoch] = self.documents[order], offsets
            return self._epochs[epoch]


class SyntheticReader:
    """Documents that need no files: motifs of 8 tokens from a small pool, in random order. Learnable, and
    readable at any offset, since every token is a hash of (seed, document, offset).

    Lengths are log-uniform in [16, 8192] tokens.
    """

    MOTIF, POOL = 8, 64

    def __init__(self, vocab_size: int, seed: int, num_documents: int = 10_000):
        self.prefix, self.vocab_size, self.seed = "mock data", vocab_size, seed
        draws = _hash(np.arange(num_documents, dtype=np.uint64), seed, 1) >> np.uint64(11)
        self.document_lengths = (16 * 512.0 ** (draws / 2.0**53)).astype(np.int64)
        self.num_documents, self.num_tokens = num_documents, int(self.document_lengths.sum())
        size = np.uint64(vocab_size)
        self._motifs = (_hash(np.arange(self.POOL * self.MOTIF, dtype=np.uint64), seed, 2) % size).astype(np.int64)

    def read_into(self, document: int, offset: int, out: np.ndarray) -> None:
        """Tokens [offset, offset + len(out)) of a document into `out`, int64."""
        assert offset + len(out) <= self.document_lengths[document], (document, offset, len(out))
        places = np.arange(offset, offset + len(out), dtype=np.uint64)
        blocks = places // np.uint64(self.MOTIF) + (np.uint64(document) << np.uint64(32))
        motifs = _hash(blocks, self.seed, 3) % np.uint64(self.POOL)
        out[:] = self._motifs[motifs * np.uint64(self.MOTIF) + places % np.uint64(self.MOTIF)]

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """Tokens [offset, offset + length) of a document -> int64 [length]."""
        out = np.empty(length, dtype=np.int64)
        self.read_into(document, offset, out)
        return out

    def fingerprint(self) -> str:
        return f"synthetic-{self.vocab_size}-{self.seed}-{self.num_documents}"

    def close(self) -> None:
        """Nothing is open."""


def _hash(values: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """splitmix64 (Steele et al., 2014) of uint64 values, keyed."""
    key = np.array([(seed * 16 + purpose) * 0x9E3779B97F4A7C15 % 2**64], dtype=np.uint64)
    mixed = (values + key) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
