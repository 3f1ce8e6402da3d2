"""Writing token files: PREFIX.bin, .idx and .json appear whole, or what stood there stays (format: indexed.py)."""

import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.indexed import COPY_BYTES, HEADER, LONGEST_SEQUENCE, MAGIC, VERSION, find_code, read_index, read_sequences


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
        lengths, first_sequences = read_sequences(prefix)
        self._documents.extend((first_sequences[1:] + len(self._lengths)).tolist())
        self._lengths.extend(lengths.tolist())
        self.num_tokens += index.num_tokens

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
