"""Token files: PREFIX.bin and PREFIX.idx in Megatron-Core's IndexedDataset format, and our PREFIX.json beside them.

Format (megatron/core/datasets/indexed_dataset.py), little-endian: .bin holds the token ids of all
sequences one after another; .idx holds b"MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64
sequences, uint64 documents + 1, then int32 length [sequences], int64 byte offset [sequences] and
int64 first sequence of each document [documents + 1], and an int8 mode per sequence in multimodal
files, which we ignore. A document is one or more sequences.
"""

import json
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import xxhash

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\0\0"
VERSION = 1
DTYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Codes of .idx. 6 and 7 are float64 and float32: no token ids."""
LONGEST_SEQUENCE = 2**31 - 1
"""Tokens; .idx has int32 lengths. A longer document becomes several sequences."""
COPY_BYTES = 8 << 20
"""Block size of scans and copies."""
SAMPLED_BLOCKS = 16
SAMPLED_BYTES = 64 << 10
"""Parts of .bin that take part in its fingerprint."""


def optimal_dtype(vocab_size: int) -> type[np.integer]:
    """Megatron-Core's choice: uint16 below 65,500 ids, otherwise int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def find_code(dtype: type[np.integer]) -> int:
    """The code of a dtype in .idx."""
    return next(code for code, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class Index:
    """What .idx says, checked, of a .bin of the right size.

    dtype: of the tokens in .bin. document_lengths: int32 [documents] (int64 where one is longer),
        tokens.
    num_sequences. num_tokens. checksum: xxh3 of dtype, lengths and document ranges, hex.
    one_sequence_each: document i is sequence i. As many documents as sequences do not prove it: a
    document of none may stand beside one of two.
    """

    dtype: type[np.integer]
    document_lengths: np.ndarray
    num_sequences: int
    num_tokens: int
    checksum: str
    one_sequence_each: bool


def read_index(prefix: str) -> Index:
    """Read and check .idx in blocks, and the size of .bin against it.

    Raises:
        ValueError: a file is missing, damaged, or does not belong to the other.
    """
    idx = Path(f"{prefix}.idx")
    bin_file = Path(f"{prefix}.bin")
    for file in (idx, bin_file):
        if not file.is_file():
            hint = " The prefix has no ending." if prefix.endswith((".bin", ".idx")) else ""
            raise ValueError(
                f"{file}: no such file.{hint} Fix: give the prefix of a .bin/.idx pair, as "
                "tools.preprocess_data writes it."
            )
    code, sequences, indices = _read_header(idx)
    digest = xxhash.xxh3_128(HEADER.pack(MAGIC, VERSION, code, sequences, indices))
    itemsize = np.dtype(DTYPES[code]).itemsize
    lengths = np.fromfile(idx, "<i4", sequences, offset=HEADER.size)
    digest.update(lengths)
    end = 0
    pointers_start = HEADER.size + 4 * sequences
    for block in _blocks(idx, pointers_start, sequences):
        first, pointers = block
        end = _check_pointers(lengths[first : first + len(pointers)], pointers, end, itemsize)
        if end < 0:
            raise ValueError(
                f"{idx}: its sequence lengths and offsets disagree: it is damaged. Fix: make it again."
            )
    found = bin_file.stat().st_size
    if found != end:
        raise ValueError(
            f"{bin_file}: {found:,} bytes, but {idx.name} describes {end:,}: "
            f"{'truncated' if found < end else 'too long'}, or of another corpus. Fix: copy both "
            "files again, or make them again."
        )
    documents = _document_lengths(idx, lengths, pointers_start + 8 * sequences, indices, digest)
    num_tokens = end // itemsize
    one_sequence_each = documents is lengths
    return Index(
        DTYPES[code], documents, sequences, num_tokens, digest.hexdigest(), one_sequence_each
    )


def read_sequences(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """int32 length of each sequence and int64 [documents + 1] first sequence of each document, of a
    sound pair."""
    idx = Path(f"{prefix}.idx")
    _, sequences, indices = _read_header(idx)
    return (
        np.fromfile(idx, "<i4", sequences, offset=HEADER.size),
        np.fromfile(idx, "<i8", indices, offset=HEADER.size + 12 * sequences),
    )


def _read_header(idx: Path) -> tuple[int, int, int]:
    """Dtype code, number of sequences, number of document indices."""
    with open(idx, "rb") as file:
        magic, version, code, sequences, indices = HEADER.unpack(
            file.read(HEADER.size).ljust(HEADER.size, b"\0")
        )
    if magic != MAGIC or version != VERSION:
        raise ValueError(
            f"{idx}: not an index of version {VERSION}. Fix: make it with tools.preprocess_data or "
            "Megatron-LM's preprocess_data.py."
        )
    if code not in DTYPES:
        raise ValueError(
            f"{idx}: dtype code {code}: token ids must be integers (codes {sorted(DTYPES)}). Fix: "
            "make the file again with an integer dtype."
        )
    size = idx.stat().st_size
    plain = HEADER.size + 12 * sequences + 8 * indices
    if size not in (plain, plain + sequences):
        raise ValueError(
            f"{idx}: {size:,} bytes, but its header asks for {plain:,}: it is damaged. Fix: copy or "
            "make it again."
        )
    if indices < 2:
        raise ValueError(
            f"{idx}: zero documents. Fix: make it again from inputs that are not empty."
        )
    return code, sequences, indices


def _blocks(file: Path, start: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first, int64 numbers) of `count` numbers from byte `start` on, a block at a
    time."""
    block = COPY_BYTES // 8
    for first in range(0, count, block):
        yield first, np.fromfile(file, "<i8", min(block, count - first), offset=start + 8 * first)


def _document_lengths(
    idx: Path, lengths: np.ndarray, start: int, indices: int, digest
) -> np.ndarray:
    """Tokens of each document; `lengths` itself where each is one sequence, as they mostly are."""
    problem = ValueError(
        f"{idx}: its document ranges do not cover its sequences: it is damaged. Fix: make it again."
    )
    documents = lengths if indices == len(lengths) + 1 else None
    last = 0
    sums = []
    for first, numbers in _blocks(idx, start, indices):
        digest.update(numbers)
        if (
            (first == 0 and numbers[0] != 0)
            or numbers[0] < last
            or (np.diff(numbers) < 0).any()
            or (numbers[-1] > len(lengths))
        ):
            raise problem
        if documents is not None and not np.array_equal(
            numbers, np.arange(first, first + len(numbers))
        ):
            documents = None
        last = int(numbers[-1])
    if last != len(lengths):
        raise problem
    if documents is not None:
        return documents
    before = 0
    for first, numbers in _blocks(idx, start, indices):
        sums.append(_sum_ranges(lengths, before, numbers[first == 0 :]))
        before = int(numbers[-1])
    totals = np.concatenate(sums)
    return totals if totals.max() > LONGEST_SEQUENCE else totals.astype(np.int32)


@numba.njit(nogil=True, cache=True)
def _check_pointers(lengths, pointers, end, itemsize):
    """The byte after the last sequence, or -1 where a pointer is not the end of the sequence
    before."""
    for i in range(len(lengths)):
        if pointers[i] != end or lengths[i] < 0:
            return -1
        end += numba.int64(lengths[i]) * itemsize
    return end


@numba.njit(nogil=True, cache=True)
def _sum_ranges(lengths, first, ends):
    """Sums of lengths[first:ends[0]], lengths[ends[0]:ends[1]], ..."""
    out = np.zeros(len(ends), dtype=np.int64)
    for i in range(len(ends)):
        for sequence in range(first, ends[i]):
            out[i] += lengths[sequence]
        first = ends[i]
    return out


def describe_single(single: int, documents: int) -> str:
    """Say what documents of one token mean for training."""
    if single == documents:
        return (
            "warning: every document has one token, so that none has a target with document masking: a "
            "run would learn nothing. Fix: --append-eod, or longer documents."
        )
    return f"{single:,} documents have one token, and no target with document masking"


def read_side_file(prefix: str) -> dict | None:
    """What PREFIX.json says (documents, tokens, max_token_id, tokenizer); None if there is none or
    it is not ours."""
    try:
        side = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return (
        side
        if isinstance(side, dict) and {"documents", "tokens", "max_token_id"} <= side.keys()
        else None
    )


class _Maps(NamedTuple):
    """A pair's open memory maps. pointers: bytes [sequences, 8], since .idx does not align them."""

    tokens: np.ndarray
    pointers: np.ndarray
    first_sequences: np.ndarray


class OpenFiles:
    """Bounds the memory maps that many readers hold open (two file descriptors each, and 1,024 are
    a common limit of a process): the one not used for longest is closed.

    Closing lets go of the map; a copy that another thread is making from it is safe, as it holds
    the map.
    """

    def __init__(self, limit: int = 64):
        self.limit = limit
        self._maps: OrderedDict[IndexedReader, _Maps] = OrderedDict()
        self._lock = threading.Lock()

    def maps_of(self, reader: "IndexedReader") -> _Maps:
        with self._lock:
            if reader not in self._maps:
                while len(self._maps) >= self.limit:
                    self._maps.popitem(last=False)
                self._maps[reader] = reader.open_maps()
            self._maps.move_to_end(reader)
            return self._maps[reader]

    def close(self, reader: "IndexedReader") -> None:
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
        """Raises ValueError as `read_index` does."""
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
        maps = self._files.maps_of(self)
        sequences = (
            documents if self._one_sequence_each else _numbers_at(maps.first_sequences, documents)
        )
        starts = _numbers_at(maps.pointers, sequences) // np.dtype(self.dtype).itemsize + offsets
        assert len(starts) == 0 or (starts + lengths).max() <= self.num_tokens, self.prefix
        _copy_spans(maps.tokens, starts, lengths, out)

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """Tokens [offset, offset + length) of a document -> int64 [length], a copy."""
        assert 0 <= offset and offset + length <= self.document_lengths[document], (
            document,
            offset,
            length,
        )
        out = np.empty(length, dtype=np.int64)
        self.read_spans(
            *(np.array([number], dtype=np.int64) for number in (document, offset, length)), out
        )
        return out

    def token_range(self) -> tuple[int, int]:
        """Smallest and largest id of the whole file, read in blocks; (0, -1) when it is empty."""
        tokens = self._files.maps_of(self).tokens
        low = 0
        high = -1
        block = COPY_BYTES // tokens.itemsize
        for start in range(0, self.num_tokens, block):
            part = tokens[start : start + block]
            low = min(low, int(part.min()))
            high = max(high, int(part.max()))
        return low, high

    def fingerprint(self) -> str:
        """xxh3 of what .idx says, .bin's size and some blocks of it, spread evenly; hex.

        The blocks catch a corpus made again with another tokenizer and the same lengths. They do
        not prove that all of .bin is the same.
        """
        if not self._identity:
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
        """Let go of the files. What was read stays valid: it was copied."""
        self._closed = True
        self._files.close(self)


def _file_stamps(prefix: str) -> list[tuple[int, int]]:
    """Size and time of the files of a pair that are there."""
    stamps = []
    for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
        if path.is_file():
            status = path.stat()
            stamps.append((status.st_size, status.st_mtime_ns))
    return stamps


def _numbers_at(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of a table of little-endian int64 in bytes [rows, 8] -> int64."""
    return np.take(table, rows, axis=0).view("<i8").reshape(-1)


@numba.njit(nogil=True, cache=True)
def _copy_spans(tokens, starts, lengths, out):
    at = 0
    for i in range(len(starts)):
        start = starts[i]
        for j in range(lengths[i]):
            out[at + j] = tokens[start + j]
        at += lengths[i]
