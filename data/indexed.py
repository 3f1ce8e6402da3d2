"""Random access to the documents of token files, however many are open (format: idx_format.py)."""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import xxhash

from data.idx_format import COPY_BYTES, HEADER, read_index

SAMPLED_BLOCKS = 16
"""Number of blocks of .bin that take part in its fingerprint."""
SAMPLED_BYTES = 64 << 10
"""Size of each of them."""


class _Maps(NamedTuple):
    """A pair's open memory maps."""

    tokens: np.ndarray
    """[tokens]"""
    pointers: np.ndarray
    """uint8 [sequences, 8]: int64 byte offsets in .bin, as bytes: .idx does not align them."""
    first_sequences: np.ndarray
    """uint8 [documents + 1, 8]: int64 first sequence of each document, as bytes too."""


class OpenFiles:
    """Bounds the memory maps that many readers hold open: the one not used for longest is closed.

    A reader's maps take two file descriptors, and 1,024 are a common limit of a process. Closing
    frees the map; a copy that another thread is making from it is safe, as it holds the map.
    """

    def __init__(self, limit: int = 64):
        self.limit = limit
        self._maps: OrderedDict[IndexedReader, _Maps] = OrderedDict()
        self._lock = threading.Lock()

    def maps_of(self, reader: "IndexedReader") -> _Maps:
        """Give a reader's maps, opening them where they are not open."""
        # The dict is in the order of use: the first is the one not used for longest.
        with self._lock:
            if reader not in self._maps:
                while len(self._maps) >= self.limit:
                    self._maps.popitem(last=False)
                self._maps[reader] = reader.open_maps()
            self._maps.move_to_end(reader)
            return self._maps[reader]

    def close(self, reader: "IndexedReader") -> None:
        """Close a reader's maps."""
        with self._lock:
            self._maps.pop(reader, None)

    def __len__(self) -> int:
        return len(self._maps)


class IndexedReader:
    """Random access to the documents of a .bin/.idx pair, memory-mapped.

    Attributes: prefix, dtype, num_documents, num_tokens, document_lengths (int32 or int64
    [documents], tokens; a document may be empty).
    """

    def __init__(self, prefix: str, files: OpenFiles | None = None):
        """Open a pair of files; raises ValueError as `read_index` does."""
        self._stamps = _file_stamps(prefix)
        index = read_index(prefix)
        self.prefix = prefix
        self.dtype = index.dtype
        self.document_lengths = index.document_lengths
        self.num_documents = len(index.document_lengths)
        self.num_tokens = index.num_tokens
        self._num_sequences = index.num_sequences
        self._one_sequence_each = index.one_sequence_each
        self._index_checksum = index.checksum
        self._identity = ""
        self._files = OpenFiles(1) if files is None else files
        self._closed = False

    def open_maps(self) -> _Maps:
        """Map both files; OpenFiles calls it.

        Raises:
            ValueError: the files are not those that were opened first: their tokens would be read
                by the index of others.
        """
        if _file_stamps(self.prefix) != self._stamps:
            raise ValueError(
                f"{self.prefix}: its files were replaced or changed since they were opened. Fix: "
                "start again, which compares the data with the checkpoint's."
            )
        tokens = np.empty(0, dtype=self.dtype)
        if self.num_tokens:  # an empty file cannot be mapped
            tokens = np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r").view(np.ndarray)
        table = np.memmap(f"{self.prefix}.idx", dtype=np.uint8, mode="r").view(np.ndarray)
        # Behind the lengths lie the sequences' offsets, then the documents' first sequences.
        start = HEADER.size + 4 * self._num_sequences
        middle = start + 8 * self._num_sequences
        end = start + 8 * (self._num_sequences + self.num_documents + 1)
        return _Maps(tokens, table[start:middle].reshape(-1, 8), table[middle:end].reshape(-1, 8))

    def read_spans(
        self, documents: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, out: np.ndarray
    ) -> None:
        """Copy spans one after another into `out`, int64 [sum of lengths].

        Args:
            documents, offsets, lengths: int64 [spans]; tokens [offset, offset + length) of each
                document.
        """
        assert not self._closed, "the reader is closed"
        assert int(lengths.sum()) == len(out), (lengths.sum(), len(out))
        if len(out) == 0:
            return
        if not lengths.all():
            # An empty document may have no sequence, and the last one then lies behind the table.
            full = lengths > 0
            documents = documents[full]
            offsets = offsets[full]
            lengths = lengths[full]
        # Document -> its first sequence -> where that begins in .bin; its others follow there.
        maps = self._files.maps_of(self)
        sequences = documents
        if not self._one_sequence_each:
            sequences = _int64_rows(maps.first_sequences, documents)
        starts = _int64_rows(maps.pointers, sequences) // np.dtype(self.dtype).itemsize + offsets
        assert len(starts) == 0 or (starts + lengths).max() <= self.num_tokens, self.prefix
        _copy_spans(maps.tokens, starts, lengths, out)

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """Copy tokens [offset, offset + length) of a document -> int64 [length]."""
        last = offset + length
        assert 0 <= offset and last <= self.document_lengths[document], (document, offset, length)
        out = np.empty(length, dtype=np.int64)
        # int64 whatever is given: with unsigned numbers, places would become floats.
        documents, offsets, lengths = np.array([[document], [offset], [length]], dtype=np.int64)
        self.read_spans(documents, offsets, lengths, out)
        return out

    def token_range(self) -> tuple[int, int]:
        """Find the smallest and largest id of the whole file; (0, -1) when it is empty."""
        tokens = self._files.maps_of(self).tokens
        low = 0
        high = -1
        # Ids below 0 are found too: a foreign file may have them.
        block = COPY_BYTES // tokens.itemsize
        for start in range(0, self.num_tokens, block):
            part = tokens[start : start + block]
            low = min(low, int(part.min()))
            high = max(high, int(part.max()))
        return low, high

    def fingerprint(self) -> str:
        """Hash what .idx says, .bin's size and some blocks of it, spread evenly -> xxh3, hex.

        The blocks catch a corpus made again with another tokenizer and the same lengths. They do
        not prove that all of .bin is the same.
        """
        if not self._identity:
            # The first block begins the file, the last one ends it.
            digest = xxhash.xxh3_128(self._index_checksum.encode())
            with open(f"{self.prefix}.bin", "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(str(size).encode())
                for i in range(SAMPLED_BLOCKS):
                    file.seek(max(0, size - SAMPLED_BYTES) * i // (SAMPLED_BLOCKS - 1))
                    digest.update(file.read(SAMPLED_BYTES))
            self._identity = digest.hexdigest()
        return self._identity

    def close(self) -> None:
        """Close the files. What was read stays valid: it was copied."""
        self._closed = True
        self._files.close(self)


def _file_stamps(prefix: str) -> list[tuple[int, int]]:
    """List size and time of the files of a pair that are there."""
    stamps = []
    for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
        if path.is_file():
            status = path.stat()
            stamps.append((status.st_size, status.st_mtime_ns))
    return stamps


def _int64_rows(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Read rows of a table of little-endian int64 in bytes [rows, 8] -> int64."""
    return np.take(table, rows, axis=0).view("<i8").reshape(-1)


@numba.njit(nogil=True, cache=True)
def _copy_spans(tokens, starts, lengths, out):
    """Copy tokens[start:start + length] of each span into `out`, one after another."""
    filled = 0
    for i in range(len(starts)):
        start = starts[i]
        for j in range(lengths[i]):
            out[filled + j] = tokens[start + j]
        filled += lengths[i]
