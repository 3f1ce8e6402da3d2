"""A writer of token files that a killed process can take up again.

Beside the output stand PREFIX.bin.partial (tokens), PREFIX.lengths.partial and
PREFIX.documents.partial (what becomes .idx) and PREFIX.progress.json, which says how much of each
counts. They are removed when the output is published.
"""

import contextlib
import json
import os
from array import array
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.files import lock_if_possible, open_atomically, sync_file
from data.idx_format import COPY_BYTES
from data.writers.indexed_writer import IndexedWriter


class ResumableWriter(IndexedWriter):
    """An IndexedWriter whose `save` makes what was added so far survive the process.

    Begin with `saved`, then `restore` or `discard`. One process may write a prefix at a time.
    """

    def __init__(self, prefix: str, dtype: type[np.integer]):
        """Open the files; ValueError as of IndexedWriter, or when another process writes them."""
        self._tables = {name: Path(f"{prefix}.{name}.partial") for name in ("lengths", "documents")}
        self._progress = Path(f"{prefix}.progress.json")
        self._state: dict | None = None
        super().__init__(prefix, dtype)

    def _temporary_path(self, end: str) -> Path:
        return Path(f"{self.prefix}.{end}.partial")

    def _open_bin(self, path: Path) -> BinaryIO:
        # Opened without emptying it: `restore` may want what is there.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        file = os.fdopen(descriptor, "wb", buffering=COPY_BYTES)
        try:
            lock_if_possible(file)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"output_prefix = {self.prefix}: another run is writing {path} now. Fix: wait for "
                "it, or give another prefix."
            ) from None
        return file

    def saved(self) -> dict | None:
        """Read the note of the last `save` of an earlier process; None if there is none, or files
        are missing."""
        try:
            state = json.loads(self._progress.read_text(encoding="utf-8"))
            # The files may be longer: what was written after the save does not count.
            whole = (
                self._temporary["bin"].stat().st_size >= state["bytes"]
                and self._tables["lengths"].stat().st_size >= 4 * state["sequences"]
                and self._tables["documents"].stat().st_size >= 8 * state["documents"]
            )
            self._state = state if whole else None
        except (OSError, ValueError, KeyError, TypeError):
            self._state = None
        return self._state and self._state["note"]

    def restore(self) -> None:
        """Go on from what `saved` found."""
        state = self._state
        assert state is not None
        # What was written after the save does not count.
        self._bin.truncate(state["bytes"])
        self._bin.seek(state["bytes"])
        self._lengths = array("i", self._tables["lengths"].read_bytes()[: 4 * state["sequences"]])
        self._documents = array("q", [0])
        self._documents.frombytes(self._tables["documents"].read_bytes()[: 8 * state["documents"]])
        self.num_tokens = state["tokens"]
        self.max_token_id = state["max_token_id"]

    def discard(self) -> None:
        """Begin again: forget what an earlier process saved."""
        self._state = None
        self._progress.unlink(missing_ok=True)
        for path in self._tables.values():
            path.unlink(missing_ok=True)
        self._bin.truncate(0)

    def save(self, note: dict) -> None:
        """Make what was added so far durable, with `note` (JSON-able), which `saved` gives back.

        Raises:
            ValueError: the disk is full; what was saved before still counts.
        """
        # First the tokens, then the tables' new entries, and last what says how much counts.
        old = self._state or {"sequences": 0, "documents": 0}
        state = {
            "bytes": self.num_tokens * self.dtype.itemsize,
            "sequences": len(self._lengths),
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "max_token_id": self.max_token_id,
            "note": note,
        }
        with self._explained("bin"):
            sync_file(self._bin)
        tables = {
            "lengths": (4, self._lengths[old["sequences"] :]),
            "documents": (8, self._documents[1 + old["documents"] :]),
        }
        # Only what is new since the last save is written again.
        for name, (itemsize, numbers) in tables.items():
            with (
                self._explained(name, itemsize * len(numbers)),
                open(self._tables[name], "ab") as file,
            ):
                file.truncate(itemsize * old["sequences" if name == "lengths" else "documents"])
                file.write(numbers.tobytes())
                sync_file(file)
        text = json.dumps(state)
        with self._explained("progress.json", len(text)):
            self._replace_progress(text)
        self._state = state

    def _replace_progress(self, text: str) -> None:
        # A name that `_remove_state` knows: a killed process may leave it.
        with open_atomically(self._progress, Path(f"{self._progress}.partial")) as file:
            file.write(text.encode())

    def _publish(self) -> None:
        super()._publish()
        self._remove_state()

    def _what_is_kept(self) -> str:
        if self._state is None:
            return super()._what_is_kept()
        return (
            f"What is done stays in {self.prefix}.*.partial, and the same command goes on from "
            f"there; what stood at {self.prefix} before is as it was."
        )

    def abort(self) -> None:
        """Keep what was last saved, and nothing else."""
        if self._state is None:
            super().abort()
            self._remove_state()
            return
        self._close()
        with contextlib.suppress(OSError):
            os.truncate(self._temporary["bin"], self._state["bytes"])
        for end in ("json", "idx"):
            self._temporary[end].unlink(missing_ok=True)

    def _remove_state(self) -> None:
        for path in (self._progress, Path(f"{self._progress}.partial"), *self._tables.values()):
            path.unlink(missing_ok=True)
