"""Documents that need no files, for --mock-data."""

import numpy as np

from data.permutation import hash_numbers


class SyntheticReader:
    """Documents of motifs of 8 tokens from a small pool, in random order.

    They can be learned, and read at any offset, since every token is a hash of (seed, document,
    offset). Lengths are log-uniform in [16, 8192] tokens.
    """

    MOTIF = 8
    """Tokens of a motif."""
    POOL = 64
    """Number of motifs."""

    def __init__(self, vocab_size: int, seed: int, num_documents: int = 10_000):
        self.prefix = "mock data"
        self.vocab_size = vocab_size
        self.seed = seed
        draws = _keyed(np.arange(num_documents, dtype=np.uint64), seed, 1) >> np.uint64(11)
        self.document_lengths = (16 * 512.0 ** (draws / 2.0**53)).astype(np.int64)
        self.num_documents = num_documents
        self.num_tokens = int(self.document_lengths.sum())
        size = np.uint64(vocab_size)
        self._motifs = (
            _keyed(np.arange(self.POOL * self.MOTIF, dtype=np.uint64), seed, 2) % size
        ).astype(np.int64)

    def read_spans(
        self, documents: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, out: np.ndarray
    ) -> None:
        """Copy tokens [offset, offset + length) of each document in a row into `out`, int64."""
        # The place of each token in its document.
        begins = np.cumsum(lengths) - lengths
        places = np.arange(len(out)) + np.repeat(offsets - begins, lengths)
        places = places.astype(np.uint64)
        # Which motif is there: a hash of (document, number of the motif in it).
        high = np.repeat(documents, lengths).astype(np.uint64) << np.uint64(32)
        blocks = places // np.uint64(self.MOTIF) + high
        motifs = _keyed(blocks, self.seed, 3) % np.uint64(self.POOL)
        out[:] = self._motifs[motifs * np.uint64(self.MOTIF) + places % np.uint64(self.MOTIF)]

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """Make tokens [offset, offset + length) of a document -> int64 [length]."""
        out = np.empty(length, dtype=np.int64)
        self.read_spans(np.array([document]), np.array([offset]), np.array([length]), out)
        return out

    def fingerprint(self) -> str:
        return f"synthetic-{self.vocab_size}-{self.seed}-{self.num_documents}"

    def close(self) -> None:
        """Do nothing: no file is open."""


def _keyed(numbers: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """Hash uint64 numbers, differently for each seed and purpose."""
    key = np.array([(seed * 16 + purpose) * 0x9E3779B97F4A7C15 % 2**64], dtype=np.uint64)
    return hash_numbers(numbers + key)
