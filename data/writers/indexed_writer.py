"""Writing token files (../idx_format.py): all three appear whole, or what was there stays."""

import contextlib
import errno
import json
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from data.files import sync_file, sync_path
from data.idx_format import (
    COPY_BYTES,
    HEADER,
    LONGEST_SEQUENCE,
    MAGIC,
    VERSION,
    find_code,
    read_index,
    read_sequences,
)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk: no space, a quota, or a limit on the size of files."""


class IndexedWriter:
    """Writes a .bin/.idx pair document by document; the pair appears whole at `finish` or not at
    all.

    As a context manager it aborts unless `finish` was called: what was at the prefix before stays.
    Holds 12 bytes of memory per document.

    Attributes:
        num_documents, num_tokens, max_token_id: of what was added.
        share: the caller's estimate of how much of the whole is added, in (0, 1], which a full
            disk's error uses to say what is needed.
    """

    def __init__(self, prefix: str, dtype: type[np.integer]):
        """Open the files, or raise ValueError when their folder cannot be made or written."""
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self._code = find_code(dtype)
        # The tables of .idx; arrays of C numbers, since Python's take 10 times the memory.
        self._lengths = array("i")
        self._documents = array("q", [0])
        self.num_tokens = 0
        self.max_token_id = -1
        self.share = 1.0
        self._temporary = {end: self._temporary_path(end) for end in ("bin", "json", "idx")}
        self._open = True
        try:
            Path(prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._open_bin(self._temporary["bin"])
        except OSError as error:
            raise ValueError(
                f"output prefix {prefix}: cannot write there ({error.strerror}). Fix: give another "
                "prefix."
            ) from None

    def _temporary_path(self, end: str) -> Path:
        return Path(f"{self.prefix}.{end}.{os.getpid()}.tmp")

    def _open_bin(self, path: Path) -> BinaryIO:
        return open(path, "wb", buffering=COPY_BYTES)

    @property
    def num_documents(self) -> int:
        """Documents that were added."""
        return len(self._documents) - 1

    @property
    def num_single(self) -> int:
        """Documents of one token that were added."""
        documents = np.asarray(self._documents)
        lengths = np.asarray(self._lengths)
        block = COPY_BYTES // 8  # as in _write_index
        single = 0
        for start in range(0, self.num_documents, block):
            edges = documents[start : start + block + 1]
            first = edges[:-1][np.diff(edges) == 1]
            single += int((lengths[first] == 1).sum())
        return single

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document, int [tokens]; it may be empty.

        Raises:
            ValueError: an id does not fit the dtype, or the disk is full.
        """
        ids = np.asarray(ids, dtype=np.int64)
        self.add_documents(ids, np.array([len(ids)], dtype=np.int64))

    def add_documents(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents whose ids, int [tokens], follow one another; lengths: int64 [documents],
        their tokens.

        Raises:
            ValueError: an id does not fit the dtype, or the disk is full.
        """
        assert lengths.sum() == len(ids), "the documents are not the ids"
        if len(ids):
            low = int(ids.min())
            high = int(ids.max())
            limits = np.iinfo(self.dtype)
            if low < 0 or high > limits.max:
                first = int(np.argmax((ids < 0) | (ids > limits.max)))
                document = self.num_documents + int(
                    np.searchsorted(np.cumsum(lengths), first, side="right")
                )
                raise ValueError(
                    f"token id {ids[first]}: must be in [0, {limits.max}] for {self.dtype.name} "
                    f"(document {document}). Fix: the input, or a larger vocabulary size."
                )
            self.max_token_id = max(self.max_token_id, high)
        with self._explained("bin"):
            self._bin.write(np.ascontiguousarray(ids, dtype=self.dtype.newbyteorder("<")).data)
        # A document is one sequence, unless it is longer than .idx can say.
        sequences = lengths
        ends = np.arange(1, len(lengths) + 1)
        if len(lengths) and lengths.max() > LONGEST_SEQUENCE:
            rows = [
                np.diff(np.append(np.arange(0, max(1, n), LONGEST_SEQUENCE), n))
                for n in lengths.tolist()
            ]
            sequences = np.concatenate(rows)
            ends = np.cumsum([len(row) for row in rows])
        self._documents.frombytes((ends + len(self._lengths)).astype(np.int64).tobytes())
        self._lengths.frombytes(sequences.astype(np.int32).tobytes())
        self.num_tokens += len(ids)

    def append_from(self, prefix: str, first: int = 0, end: int | None = None) -> None:
        """Append the documents [first, end) of another pair, by default all; their sequences stay.

        Raises:
            ValueError: it is damaged, or of another dtype; or the disk is full.
        """
        index = read_index(prefix)
        if index.dtype != self.dtype:
            raise ValueError(
                f"{prefix}: dtype {np.dtype(index.dtype).name}, but {self.prefix} is written as "
                f"{self.dtype.name}. Fix: make both with the same tokenizer."
            )
        # The sequences of these documents, and where their tokens lie in .bin.
        lengths, first_sequences = read_sequences(prefix)
        ranges = first_sequences[first : len(first_sequences) if end is None else end + 1]
        skipped = int(lengths[: ranges[0]].sum(dtype=np.int64))
        lengths = lengths[ranges[0] : ranges[-1]]
        tokens = int(lengths.sum(dtype=np.int64))
        with open(f"{prefix}.bin", "rb") as file:
            file.seek(skipped * self.dtype.itemsize)
            left = tokens * self.dtype.itemsize
            while block := file.read(min(left, COPY_BYTES)):
                self.max_token_id = max(
                    self.max_token_id, int(np.frombuffer(block, dtype=self.dtype).max())
                )
                with self._explained("bin", left):
                    self._bin.write(block)
                left -= len(block)
        # Bytes, not lists: a Python integer takes 10 times the memory of what it says.
        moved = ranges[1:] + (len(self._lengths) - int(ranges[0]))
        self._documents.frombytes(moved.astype(np.int64).data.cast("B"))
        self._lengths.frombytes(np.ascontiguousarray(lengths, dtype=np.int32).data.cast("B"))
        self.num_tokens += tokens

    def finish(self, tokenizer: dict | None = None, text: dict | None = None) -> list[str]:
        """Publish PREFIX.bin, .json and .idx -> their paths.

        Args:
            tokenizer, text: the tokenizer's description, and settings with which text became ids,
                for .json.

        .idx is the proof that the pair is whole: the old one goes first, the new one comes last.

        Raises:
            ValueError: no document was added, or the disk is full.
        """
        assert self._open, "finish or abort was called before"
        if self.num_documents == 0:
            self.abort()
            raise ValueError(f"{self.prefix}: no documents. Fix: give inputs that are not empty.")
        with self._explained("bin"):
            sync_file(self._bin)
            self._bin.close()
        size = HEADER.size + 12 * len(self._lengths) + 8 * len(self._documents)
        with self._explained("idx", size), open(self._temporary["idx"], "wb") as file:
            self._write_index(file)
            sync_file(file)
        # What .idx does not say: the tokenizer, and how text became ids.
        side: dict[str, Any] = {
            "tokenizer": tokenizer,
            "dtype": self.dtype.name,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "max_token_id": self.max_token_id,
        }
        if text is not None:
            side["text"] = text
        with self._explained("json"), open(self._temporary["json"], "w", encoding="utf-8") as file:
            file.write(json.dumps(side, indent=1) + "\n")
            sync_file(file)
        self._publish()
        return [f"{self.prefix}.{end}" for end in self._temporary]

    def _write_index(self, file: BinaryIO) -> None:
        """Write .idx: header, lengths, offsets in .bin, first sequences of the documents."""
        lengths = np.asarray(self._lengths)
        documents = np.asarray(self._documents)
        file.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(documents)))
        # A block of numbers at a time: copies for 100M documents would be gigabytes.
        block = COPY_BYTES // 8
        for start in range(0, len(lengths), block):
            file.write(lengths[start : start + block].astype("<i4").tobytes())
        end = 0
        for start in range(0, len(lengths), block):
            sizes = lengths[start : start + block].astype("<i8") * self.dtype.itemsize
            pointers = np.cumsum(sizes) - sizes + end
            end = int(pointers[-1] + sizes[-1])
            file.write(pointers.astype("<i8").tobytes())
        for start in range(0, len(documents), block):
            file.write(documents[start : start + block].astype("<i8").tobytes())

    def _publish(self) -> None:
        """Rename the temporary files into their place; .idx goes first and comes last."""
        self._open = False
        # Between the two no reader takes the new tokens for the old ones.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for end, path in self._temporary.items():
            path.replace(f"{self.prefix}.{end}")
        sync_path(Path(self.prefix).absolute().parent)

    @contextlib.contextmanager
    def _explained(self, end: str, needed: int = 0) -> Iterator[None]:
        """Turn a full disk into a ValueError that names the file and the space that is missing."""
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            file = self._temporary_path(end)
            free = shutil.disk_usage(Path(self.prefix).absolute().parent).free
            if end == "bin" and not needed:
                # The whole is estimated from what was added: 20 bytes of .idx per sequence.
                added = self.num_tokens * self.dtype.itemsize + 20 * len(self._lengths)
                whole = added / max(self.share, 1e-9)
                needed = int(whole) - (file.stat().st_size if file.exists() else 0)
            raise ValueError(
                f"{file}: cannot write it: {error.strerror}; about {max(needed, 1):,} bytes more "
                f"are needed, {free:,} are free. {self._what_is_kept()} Fix: free space, or give "
                "an output prefix on another disk, and run again."
            ) from None

    def _what_is_kept(self) -> str:
        """Say what a full disk leaves."""
        return f"The temporary files are removed; what stood at {self.prefix} before is as it was."

    def abort(self) -> None:
        """Remove what was written; what was published before stays."""
        self._close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def _close(self) -> None:
        self._open = False
        # On a full disk the buffer cannot be written, and is not wanted any more.
        with contextlib.suppress(OSError):
            self._bin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        if self._open:
            self.abort()
