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
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

HEADER = struct.Struct("<9sQBQQ")
MAGIC, VERSION = b"MMIDIDX\0\0", 1
DTYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Codes of .idx. 6 and 7 are float64 and float32: no token ids."""
LONGEST_SEQUENCE = 2**31 - 1
"""Tokens; .idx has int32 lengths. A longer document becomes several sequences."""
COPY_BYTES = 8 << 20
"""Block size of scans and copies."""
SAMPLED_BLOCKS, SAMPLED_BYTES = 16, 64 << 10
"""Parts of .bin that take part in its fingerprint."""


def optimal_dtype(vocab_size: int) -> type[np.integer]:
    """Megatron-Core's choice: uint16 below 65,500 ids, otherwise int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def find_code(dtype: type[np.integer]) -> int:
    """The code of a dtype in .idx."""
    return next(code for code, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class Index:
    """What .idx says, checked.

    dtype: of the tokens in .bin. sequence_lengths: int32 [sequences], tokens.
    document_indices: int64 [documents + 1], first sequence of each document.
    """

    dtype: type[np.integer]
    sequence_lengths: np.ndarray
    document_indices: np.ndarray


def read_index(prefix: str) -> Index:
    """Read and check .idx, and the size of .bin against it.

    Raises:
        ValueError: a file is missing, damaged, or does not belong to the other.
    """
    idx, bin_file = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for file in (idx, bin_file):
        if not file.is_file():
            hint = " The prefix has no ending." if prefix.endswith((".bin", ".idx")) else ""
            raise ValueError(f"{file}: no such file.{hint} Fix: give the prefix of a .bin/.idx pair, as "
                             "tools.preprocess_data writes it.")
    size = idx.stat().st_size
    with open(idx, "rb") as file:
        head = file.read(HEADER.size)
        magic, version, code, sequences, indices = HEADER.unpack(head.ljust(HEADER.size, b"\0"))
        if magic != MAGIC or version != VERSION:
            raise ValueError(f"{idx}: not an index of version {VERSION}. Fix: make it with tools.preprocess_data or "
                             "Megatron-LM's preprocess_data.py.")
        if code not in DTYPES:
            raise ValueError(f"{idx}: dtype code {code}: token ids must be integers (codes {sorted(DTYPES)}). Fix: "
                             "make the file again with an integer dtype.")
        plain = HEADER.size + 12 * sequences + 8 * indices
        if size not in (plain, plain + sequences):
            raise ValueError(f"{idx}: {size:,} bytes, but its header asks for {plain:,}: it is damaged. Fix: copy or "
                             "make it again.")
        lengths = np.fromfile(file, dtype="<i4", count=sequences)
        pointers = np.fromfile(file, dtype="<i8", count=sequences)
        documents = np.fromfile(file, dtype="<i8", count=indices)
    if indices < 2:
        raise ValueError(f"{idx}: zero documents. Fix: make it again from inputs that are not empty.")
    itemsize = np.dtype(DTYPES[code]).itemsize
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    if (lengths < 0).any() or not np.array_equal(pointers, ends - lengths.astype(np.int64) * itemsize):
        raise ValueError(f"{idx}: its sequence lengths and offsets disagree: it is damaged. Fix: make it again.")
    if documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise ValueError(f"{idx}: its document ranges do not cover its sequences: it is damaged. Fix: make it again.")
    expected, found = int(ends[-1]) if sequences else 0, bin_file.stat().st_size
    if found != expected:
        raise ValueError(f"{bin_file}: {found:,} bytes, but {idx.name} describes {expected:,}: "
                         f"{'truncated' if found < expected else 'too long'}, or of another corpus. Fix: copy both "
                         "files again, or make them again.")
    return Index(DTYPES[code], lengths, documents)


def read_side_file(prefix: str) -> dict | None:
    """What PREFIX.json says (documents, tokens, max_token_id, tokenizer); None if there is none or it is not ours."""
    try:
        side = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return side if isinstance(side, dict) and {"documents", "tokens", "max_token_id"} <= side.keys() else None


class IndexedReader:
    """Random access to the documents of a .bin/.idx pair, memory-mapped.

    Attributes: prefix, dtype, num_documents, num_tokens, document_lengths (int64 [documents], tokens;
    a document may be empty).
    """

    def __init__(self, prefix: str):
        """Raises ValueError as `read_index` does."""
        index = read_index(prefix)
        self.prefix, self.dtype = prefix, index.dtype
        token_offsets = np.zeros(len(index.sequence_lengths) + 1, dtype=np.int64)
        np.cumsum(index.sequence_lengths, dtype=np.int64, out=token_offsets[1:])
        self._offsets = token_offsets[index.document_indices]
        self.document_lengths = np.diff(self._offsets)
        self.num_documents, self.num_tokens = len(self.document_lengths), int(self._offsets[-1])
        self._tokens: np.ndarray | None = np.empty(0, dtype=self.dtype)
        if self.num_tokens:  # an empty file cannot be mapped
            self._tokens = np.asarray(np.memmap(f"{prefix}.bin", dtype=self.dtype, mode="r"))

    def read_into(self, document: int, offset: int, out: np.ndarray) -> None:
        """Copy tokens [offset, offset + len(out)) of a document into `out`, int64."""
        assert 0 <= offset and offset + len(out) <= self.document_lengths[document], (document, offset, len(out))
        assert self._tokens is not None, "the reader is closed"
        start = self._offsets[document] + offset
        out[:] = self._tokens[start:start + len(out)]

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """Tokens [offset, offset + length) of a document -> int64 [length], a copy."""
        out = np.empty(length, dtype=np.int64)
        self.read_into(document, offset, out)
        return out

    def token_range(self) -> tuple[int, int]:
        """Smallest and largest id of the whole file, read in blocks; (0, -1) when it is empty."""
        assert self._tokens is not None, "the reader is closed"
        low, high, block = 0, -1, COPY_BYTES // self._tokens.itemsize
        for start in range(0, self.num_tokens, block):
            part = self._tokens[start:start + block]
            low, high = min(low, int(part.min())), max(high, int(part.max()))
        return low, high

    def fingerprint(self) -> str:
        """xxh3 of the .idx bytes, .bin's size and some blocks of it, spread evenly; hex.

        The blocks catch a corpus made again with another tokenizer and the same lengths. They do not
        prove that all of .bin is the same.
        """
        digest = xxhash.xxh3_128()
        with open(f"{self.prefix}.idx", "rb") as file:
            while block := file.read(COPY_BYTES):
                digest.update(block)
        with open(f"{self.prefix}.bin", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(str(size).encode())
            for i in range(SAMPLED_BLOCKS):
                file.seek(max(0, size - SAMPLED_BYTES) * i // (SAMPLED_BLOCKS - 1))
                digest.update(file.read(SAMPLED_BYTES))
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the file. What was read stays valid: it was copied."""
        self._tokens = None


class IndexedWriter:
    """Writes a .bin/.idx pair document by document; the pair appears whole at `finish` or not at all.

    As a context manager it aborts unless `finish` was called: what stood at the prefix before stays.
    """

    def __init__(self, prefix: str, dtype: type[np.integer]):
        """Raises ValueError when the folder of `prefix` cannot be made or written."""
        self.prefix, self.dtype, self._code = prefix, np.dtype(dtype), find_code(dtype)
        self._lengths, self._documents = array("i"), array("q", [0])
        self.num_tokens, self.max_token_id = 0, -1
        self._temporary = {end: Path(f"{prefix}.{end}.{os.getpid()}.tmp") for end in ("bin", "json", "idx")}
        self._open = True
        try:
            Path(prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
            self._bin = open(self._temporary["bin"], "wb", buffering=COPY_BYTES)
        except OSError as error:
            raise ValueError(f"output prefix {prefix}: cannot write there ({error.strerror}). Fix: give another "
                             "prefix.") from None

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document, int [tokens]; it may be empty.

        Raises:
            ValueError: an id does not fit the dtype.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids):
            low, high, limits = int(ids.min()), int(ids.max()), np.iinfo(self.dtype)
            if low < 0 or high > limits.max:
                raise ValueError(f"token id {low if low < 0 else high}: must be in [0, {limits.max}] for "
                                 f"{self.dtype.name} (document {self.num_documents}). Fix: the input, or a larger "
                                 "vocabulary size.")
            self.max_token_id = max(self.max_token_id, high)
        self._bin.write(ids.astype(self.dtype.newbyteorder("<")).tobytes())
        self._lengths.extend([LONGEST_SEQUENCE] * ((len(ids) - 1) // LONGEST_SEQUENCE))
        self._lengths.append(len(ids) - LONGEST_SEQUENCE * max(0, (len(ids) - 1) // LONGEST_SEQUENCE))
        self._documents.append(len(self._lengths))
        self.num_tokens += len(ids)

    def append_from(self, prefix: str) -> None:
        """Append all documents of another pair, sequences as they are.

        Raises:
            ValueError: it is damaged, or of another dtype.
        """
        index = read_index(prefix)
        if index.dtype != self.dtype:
            raise ValueError(f"{prefix}: dtype {np.dtype(index.dtype).name}, but {self.prefix} is written as "
                             f"{self.dtype.name}. Fix: make both with the same tokenizer.")
        with open(f"{prefix}.bin", "rb") as file:
            while block := file.read(COPY_BYTES):
                self.max_token_id = max(self.max_token_id, int(np.frombuffer(block, dtype=self.dtype).max()))
                self._bin.write(block)
        self._documents.extend((index.document_indices[1:] + len(self._lengths)).tolist())
        self._lengths.extend(index.sequence_lengths.tolist())
        self.num_tokens += int(index.sequence_lengths.sum(dtype=np.int64))

    def finish(self, tokenizer: dict | None = None) -> list[str]:
        """Publish PREFIX.bin, .json and .idx -> their paths. `tokenizer`: its description, for .json.

        .idx is the proof that the pair is whole: the old one goes first, the new one comes last.

        Raises:
            ValueError: no document was added.
        """
        assert self._open, "finish or abort was called before"
        if self.num_documents == 0:
            self.abort()
            raise ValueError(f"{self.prefix}: no documents. Fix: give inputs that are not empty.")
        _sync(self._bin)
        with open(self._temporary["idx"], "wb") as file:
            lengths = np.array(self._lengths, dtype=np.int32)
            pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * self.dtype.itemsize
            file.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(self._documents)))
            for values, dtype in ((lengths, "<i4"), (pointers, "<i8"), (np.array(self._documents), "<i8")):
                file.write(values.astype(dtype).tobytes())
            _sync(file)
        side = {"tokenizer": tokenizer, "dtype": self.dtype.name, "documents": self.num_documents,
                "tokens": self.num_tokens, "max_token_id": self.max_token_id}
        with open(self._temporary["json"], "w", encoding="utf-8") as file:
            file.write(json.dumps(side, indent=1) + "\n")
            _sync(file)
        self._open = False
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for end, path in self._temporary.items():
            path.replace(f"{self.prefix}.{end}")
        folder = os.open(Path(self.prefix).absolute().parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        return [f"{self.prefix}.{end}" for end in self._temporary]

    def abort(self) -> None:
        """Leave nothing behind, and what was published before as it is."""
        self._open = False
        self._bin.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, *exception) -> None:
        if self._open:
            self.abort()


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
