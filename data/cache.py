"""Arrays that are costly to make, kept in files that are named by what they depend on.

A file is written whole or not at all (written aside, synced, renamed) and carries a checksum; a
damaged one is made again. Processes that start together make it once where the file system has
locks, and all come to the same bytes where it has none, so the folder may be local to a node or
shared by all.
"""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from data.files import lock_file, open_atomically

MAGIC = b"ithaca index 2\n"
ALIGNMENT = 64
CHECKED_BYTES = 16 << 20
"""Block size of checksums."""
MAPPED_BYTES = 1 << 20
"""Smaller arrays are copied: a map holds a file descriptor, and a run may have thousands of small
sources."""


class IndexCache:
    """Named arrays by key, large ones memory-mapped from `folder`; without a folder they are made
    each time."""

    def __init__(self, folder: str | None):
        """Raises ValueError when the folder cannot be made or written."""
        self.folder = Path(folder) if folder else None
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not os.access(self.folder, os.W_OK):
                    raise PermissionError(13, "no permission to write")
            except OSError as error:
                raise ValueError(
                    f"data_cache_path = {folder}: cannot be written ({error.strerror}). Fix: give another "
                    "folder, or leave it out."
                ) from None

    def get(self, key: dict, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of `key`, from the folder or made now and kept there.

        Args:
            key: JSON-able; everything the arrays depend on.
        """
        if self.folder is None:
            return make()
        text = json.dumps(key, sort_keys=True)
        path = (
            self.folder
            / f"{key.get('what', 'index')}-{xxhash.xxh3_128_hexdigest(text.encode())}.index"
        )
        found = _load(path, text)
        if found is None:
            with _locked(path.with_suffix(".lock")):
                found = _load(path, text)  # made by another process while this one waited
                if found is None:
                    arrays = make()
                    found = arrays
                    try:
                        _publish(path, text, arrays)
                        found = _load(path, text) or arrays
                    except OSError as error:
                        warnings.warn(
                            f"{path}: cannot be written ({error.strerror}); the index is made again at the "
                            "next start",
                            stacklevel=2,
                        )
        return found


class _locked:
    """Holds a file lock; the system lets go of it when the process dies. Does nothing where there
    are no locks."""

    def __init__(self, path: Path):
        self._path = path
        self._file = None

    def __enter__(self):
        try:
            self._file = open(self._path, "a")
            lock_file(self._file, wait=True)
        except OSError:
            pass  # each process makes the arrays by itself; they are the same
        return self

    def __exit__(self, *exception):
        if self._file is not None:
            self._file.close()


def _publish(path: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Write a file: MAGIC, length of the header, header (JSON), arrays at multiples of
    ALIGNMENT."""
    entries = []
    place = 0
    digest = xxhash.xxh3_128()
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        entries.append(
            {"name": name, "dtype": array.dtype.str, "shape": array.shape, "start": place}
        )
        place += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        _add(digest, array)
    header = json.dumps({"key": key, "arrays": entries, "bytes": place})
    header = json.dumps(
        {
            "header": header,
            "header_checksum": xxhash.xxh3_128_hexdigest(header.encode()),
            "checksum": digest.hexdigest(),
        }
    ).encode()
    header += b" " * (-(len(MAGIC) + 8 + len(header)) % ALIGNMENT)
    with open_atomically(path) as file:
        file.write(MAGIC + len(header).to_bytes(8, "little") + header)
        for array in arrays.values():
            file.write(_bytes_of(np.ascontiguousarray(array)))
            file.write(b"\0" * (-array.nbytes % ALIGNMENT))


def _load(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file, checked; None where it is missing, damaged or of another key."""
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError("it does not begin as an index does")
            header_bytes = int.from_bytes(file.read(8), "little")
            outer = json.loads(file.read(min(header_bytes, 1 << 20)))
        if xxhash.xxh3_128_hexdigest(outer["header"].encode()) != outer["header_checksum"]:
            raise ValueError("its header's checksum is wrong")
        header = json.loads(outer["header"])
        first = len(MAGIC) + 8 + header_bytes
        if path.stat().st_size != first + header["bytes"]:
            raise ValueError("it has another size than its header says")
        if header["key"] != key:
            raise ValueError("it was made for something else")
        arrays = {}
        digest = xxhash.xxh3_128()
        for entry in header["arrays"]:
            dtype = np.dtype(entry["dtype"])
            shape = tuple(entry["shape"])
            array = (
                np.memmap(path, dtype, "r", first + entry["start"], shape).view(np.ndarray)
                if np.prod(shape)
                else np.empty(shape, dtype)
            )
            _add(digest, array)
            arrays[entry["name"]] = array.copy() if array.nbytes < MAPPED_BYTES else array
        if digest.hexdigest() != outer["checksum"]:
            raise ValueError("its checksum is wrong")
        return arrays
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        warnings.warn(f"{path}: made again, since {error}", stacklevel=2)
        return None


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """View a contiguous array as uint8 [bytes]."""
    return array.reshape(-1).view(np.uint8)


def _add(digest, array: np.ndarray) -> None:
    raw = _bytes_of(array)
    for start in range(0, len(raw), CHECKED_BYTES):
        digest.update(raw[start : start + CHECKED_BYTES])
