"""The format of token files: PREFIX.bin and .idx as in Megatron-Core's IndexedDataset, and our
PREFIX.json beside them.

Format (megatron/core/datasets/indexed_dataset.py), little-endian: .bin holds the token ids of all
sequences one after another; .idx holds b"MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64
sequences, uint64 documents + 1, then int32 length [sequences], int64 byte offset [sequences] and
int64 first sequence of each document [documents + 1], and an int8 mode per sequence in multimodal
files, which we ignore. A document is one or more sequences.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
"""Code in .idx -> dtype of .bin. 6 and 7 are float64 and float32: no token ids."""
LONGEST_SEQUENCE = 2**31 - 1
"""Tokens; .idx has int32 lengths. A longer document becomes several sequences."""
COPY_BYTES = 8 << 20
"""Block size of scans and copies."""


def optimal_dtype(vocab_size: int) -> type[np.integer]:
    """Choose the dtype of token ids as Megatron-Core does: uint16 below 65,500 ids, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def find_code(dtype: type[np.integer]) -> int:
    """Find the code of a dtype in .idx."""
    return next(code for code, known in DTYPES.items() if known == dtype)


# ---------------------------------------------------------------- .idx


class _Header(NamedTuple):
    """Numbers at the head of .idx, and where its tables begin, in bytes."""

    code: int
    """Code of the dtype."""
    sequences: int
    indices: int
    """Documents + 1."""

    @property
    def pointers_start(self) -> int:
        """Byte at which the table of the sequences' offsets in .bin begins."""
        return HEADER.size + 4 * self.sequences

    @property
    def indices_start(self) -> int:
        """Byte at which the table of the documents' first sequences begins."""
        return HEADER.size + 12 * self.sequences


@dataclass(frozen=True)
class Index:
    """What .idx says, checked, of a .bin of the right size."""

    dtype: type[np.integer]
    """Dtype of the tokens in .bin."""
    document_lengths: np.ndarray
    """Tokens: int32 [documents], int64 where one is longer."""
    num_sequences: int
    num_tokens: int
    checksum: str
    """xxh3 of dtype, lengths and document ranges, hex."""
    one_sequence_each: bool
    """Document i is sequence i. As many documents as sequences do not prove it: a document of none
    may stand beside one of two."""


def read_index(prefix: str) -> Index:
    """Read and check .idx in blocks, and the size of .bin against it.

    Raises:
        ValueError: a file is missing, damaged, or does not belong to the other.
    """
    idx = Path(f"{prefix}.idx")
    bin_file = Path(f"{prefix}.bin")
    _check_present(prefix, [idx, bin_file])
    header = _read_header(idx)
    dtype = DTYPES[header.code]
    itemsize = np.dtype(dtype).itemsize
    # The checksum covers what .idx says, not how: the offsets follow from the lengths.
    digest = xxhash.xxh3_128(
        HEADER.pack(MAGIC, VERSION, header.code, header.sequences, header.indices)
    )
    lengths = np.fromfile(idx, "<i4", header.sequences, offset=HEADER.size)
    digest.update(lengths.data)
    # Each sequence begins where the one before it ends: `end` is the size that .bin must have.
    end = 0
    for first, pointers in _blocks(idx, header.pointers_start, header.sequences):
        end = _check_pointers(lengths[first : first + len(pointers)], pointers, end, itemsize)
        if end < 0:
            raise ValueError(
                f"{idx}: its sequence lengths and offsets disagree: it is damaged. Fix: make it "
                "again."
            )
    found = bin_file.stat().st_size
    if found != end:
        # A copy that stopped, or the files of two corpora beside each other.
        fault = "truncated" if found < end else "too long"
        raise ValueError(
            f"{bin_file}: {found:,} bytes, but {idx.name} describes {end:,}: {fault}, or of "
            "another corpus. Fix: copy both files again, or make them again."
        )
    documents = _document_lengths(idx, lengths, header, digest)
    return Index(
        dtype,
        documents,
        header.sequences,
        num_tokens=end // itemsize,
        checksum=digest.hexdigest(),
        one_sequence_each=documents is lengths,
    )


def read_sequences(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the tables of a sound pair: int32 length of each sequence, and int64 [documents + 1]
    first sequence of each document."""
    idx = Path(f"{prefix}.idx")
    header = _read_header(idx)
    return (
        np.fromfile(idx, "<i4", header.sequences, offset=HEADER.size),
        np.fromfile(idx, "<i8", header.indices, offset=header.indices_start),
    )


def _check_present(prefix: str, files: list[Path]) -> None:
    """Raise ValueError where a file of a pair is missing."""
    for file in files:
        if not file.is_file():
            hint = " The prefix has no ending." if prefix.endswith((".bin", ".idx")) else ""
            raise ValueError(
                f"{file}: no such file.{hint} Fix: give the prefix of a .bin/.idx pair, as "
                "bash launch/ithaca.sh preprocess writes it."
            )


def _read_header(idx: Path) -> _Header:
    """Read the head of .idx, and check it against the size of the file."""
    with open(idx, "rb") as file:
        magic, version, code, sequences, indices = HEADER.unpack(
            file.read(HEADER.size).ljust(HEADER.size, b"\0")
        )
    # Any of these means another program's file, or half a copy.
    if magic != MAGIC or version != VERSION:
        raise ValueError(
            f"{idx}: not an index of version {VERSION}. Fix: make it with bash "
            "launch/ithaca.sh preprocess or Megatron-LM's preprocess_data.py."
        )
    if code not in DTYPES:
        raise ValueError(
            f"{idx}: dtype code {code}: token ids must be integers (codes {sorted(DTYPES)}). Fix: "
            "make the file again with an integer dtype."
        )
    size = idx.stat().st_size
    plain = HEADER.size + 12 * sequences + 8 * indices
    # Multimodal files have a byte more per sequence.
    if size not in (plain, plain + sequences):
        raise ValueError(
            f"{idx}: {size:,} bytes, but its header asks for {plain:,}: it is damaged. Fix: copy "
            "or make it again."
        )
    if indices < 2:
        raise ValueError(
            f"{idx}: zero documents. Fix: make it again from inputs that are not empty."
        )
    return _Header(code, sequences, indices)


def _blocks(file: Path, start: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Read `count` int64 numbers from byte `start` on, a block at a time: (number of the block's
    first, its numbers)."""
    block = COPY_BYTES // 8
    for first in range(0, count, block):
        yield first, np.fromfile(file, "<i8", min(block, count - first), offset=start + 8 * first)


def _document_lengths(
    idx: Path, lengths: np.ndarray, header: _Header, digest: xxhash.xxh3_128
) -> np.ndarray:
    """Compute the tokens of each document; `lengths` itself where each is one sequence, as they
    mostly are.

    Args:
        lengths: tokens of each sequence.
        digest: gets the documents' first sequences.
    """
    damaged = ValueError(
        f"{idx}: its document ranges do not cover its sequences: it is damaged. Fix: make it again."
    )
    # First pass: the ranges are sound, and are they one sequence each?
    one_each = header.indices == len(lengths) + 1
    last = 0
    for first, numbers in _blocks(idx, header.indices_start, header.indices):
        digest.update(numbers.data)
        starts_wrong = first == 0 and numbers[0] != 0
        falls = numbers[0] < last or bool((np.diff(numbers) < 0).any())
        if starts_wrong or falls or numbers[-1] > len(lengths):
            raise damaged
        one_each = one_each and np.array_equal(numbers, np.arange(first, first + len(numbers)))
        last = int(numbers[-1])
    if last != len(lengths):
        raise damaged
    if one_each:
        return lengths
    # Second pass: sums over each document's sequences.
    # (Blocks again: the table may be larger than memory should hold.)
    sums = []
    before = 0
    for first, numbers in _blocks(idx, header.indices_start, header.indices):
        ends = numbers[1:] if first == 0 else numbers
        sums.append(_sum_ranges(lengths, before, ends))
        before = int(numbers[-1])
    totals = np.concatenate(sums)
    return totals if totals.max() > LONGEST_SEQUENCE else totals.astype(np.int32)


@numba.njit(nogil=True, cache=True)
def _check_pointers(lengths, pointers, end, itemsize):
    """Find the byte after the last sequence; -1 where they do not follow one another."""
    for i in range(len(lengths)):
        if pointers[i] != end or lengths[i] < 0:
            return -1
        end += numba.int64(lengths[i]) * itemsize
    return end


@numba.njit(nogil=True, cache=True)
def _sum_ranges(lengths, first, ends):
    """Sum lengths[first:ends[0]], lengths[ends[0]:ends[1]], ..."""
    out = np.zeros(len(ends), dtype=np.int64)
    for i in range(len(ends)):
        for sequence in range(first, ends[i]):
            out[i] += lengths[sequence]
        first = ends[i]
    return out


# ---------------------------------------------------------------- .json


def read_side_file(prefix: str) -> dict[str, Any] | None:
    """Read PREFIX.json (documents, tokens, max_token_id, tokenizer); None if none is ours.

    Raises:
        ValueError: it cannot be read, or is damaged. It says which tokenizer made the corpus: taken
            for absent, it would switch that check off.
    """
    path = Path(f"{prefix}.json")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}). Fix: its permissions, or copy it again."
        ) from None
    except UnicodeDecodeError:
        raise _damaged_side_file(path, "no text") from None
    try:
        side, end = json.JSONDecoder().raw_decode(text)
    except ValueError as error:
        raise _damaged_side_file(path, f"no JSON: {error}") from None
    # Another program's JSON, or a corpus of one JSON per line.
    if not isinstance(side, dict) or not side.keys() >= {"documents", "tokens", "max_token_id"}:
        return None
    if end < len(text):
        raise _damaged_side_file(path, "goes on after its end")
    for name, kind in _SIDE_KINDS.items():
        if not isinstance(side.get(name), kind):
            raise _damaged_side_file(path, f"{name} = {side.get(name)!r}")
    return side


_SIDE_KINDS = {
    "documents": int,
    "tokens": int,
    "max_token_id": int,
    "tokenizer": dict | None,
    "text": dict | None,
}
"""Key of PREFIX.json -> the kinds of its value."""


def _damaged_side_file(path: Path, fault: str) -> ValueError:
    return ValueError(
        f"{path}: damaged ({fault}); it says which tokenizer made the corpus. Fix: copy it again, "
        "or make the corpus again; or move it away, and nothing is known of its tokenizer."
    )


def describe_one_token_documents(count: int, documents: int) -> str:
    """Say what `count` documents of one token, out of `documents`, mean for training."""
    if count == documents:
        return (
            "warning: every document has one token, so that none has a target with document "
            "masking: a run would learn nothing. Fix: --append-eod, or longer documents."
        )
    return f"{count:,} documents have one token, and no target with document masking"
