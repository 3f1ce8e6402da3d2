"""Arrays that are costly to make, kept in files that are named by what they depend on.

A file is written whole or not at all (written aside, synced, renamed) and carries a checksum; a
damaged one is made again. Processes that start together make it once where the file system has
locks, and all come to the same bytes where it has none, so the folder may be local to a node or
shared by all.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.files import CHECKSUM_BLOCK_BYTES, lock_file, open_atomically

Arrays = dict[str, np.ndarray]

MAGIC = b"ithaca index 2\n"
ALIGNMENT = 64
"""Bytes; each array in a file begins at a multiple."""
LEAST_MAPPED_BYTES = 1 << 20
"""Smaller arrays are copied: a map holds a file descriptor, and a run may have many sources."""
LARGEST_HEADER_BYTES = 1 << 20


class IndexCache:
    """Keeps named arrays by key, large ones memory-mapped from `folder`; without a folder they are
    made each time."""

    def __init__(self, folder: str | None):
        """Open the folder, or raise ValueError when it cannot be made or written."""
        self.folder = Path(folder) if folder else None
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not os.access(self.folder, os.W_OK):
                    raise PermissionError(13, "no permission to write")
            except OSError as error:
                raise ValueError(
                    f"data_cache_path = {folder}: cannot be written ({error.strerror}). Fix: give "
                    "another folder, or leave it out."
                ) from None

    def get(self, key: dict[str, Any], make: Callable[[], Arrays]) -> Arrays:
        """Give the arrays of `key`, from the folder or made now and kept there.

        Args:
            key: JSON-able; everything the arrays depend on.
        """
        if self.folder is None:
            return make()
        text = json.dumps(key, sort_keys=True)
        hashed = xxhash.xxh3_128_hexdigest(text.encode())
        path = self.folder / f"{key.get('what', 'index')}-{hashed}.index"
        found = _load(path, text)
        if found is not None:
            return found
        with _locked(path.with_suffix(".lock")):
            found = _load(path, text)  # made by another process while this one waited
            return _make_and_keep(path, text, make) if found is None else found


def _make_and_keep(path: Path, key: str, make: Callable[[], Arrays]) -> Arrays:
    """Make arrays and write them; where that fails, warn and go on without the file."""
    arrays = make()
    try:
        _write(path, key, arrays)
    except OSError as error:
        warnings.warn(
            f"{path}: cannot be written ({error.strerror}); the index is made again at the next "
            "start",
            stacklevel=3,
        )
        return arrays
    # From the file, so that the processes of a node share its pages.
    return _load(path, key) or arrays


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; does nothing where there are no locks."""
    with contextlib.ExitStack() as stack:
        try:
            lock_file(stack.enter_context(open(path, "a")), wait=True)
        except OSError:
            pass  # each process makes the arrays by itself; they are the same
        yield


# ---------------------------------------------------------------- files


def _write(path: Path, key: str, arrays: Arrays) -> None:
    """Write MAGIC, length of the header, header (JSON), arrays at multiples of ALIGNMENT."""
    # Where each array lies behind the header, and one checksum over all.
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
    inner = json.dumps({"key": key, "arrays": entries, "bytes": place})
    outer = {
        "header": inner,
        "header_checksum": xxhash.xxh3_128_hexdigest(inner.encode()),
        "checksum": digest.hexdigest(),
    }
    header = json.dumps(outer).encode()
    header += b" " * (-(len(MAGIC) + 8 + len(header)) % ALIGNMENT)
    with open_atomically(path) as file:
        os.fchmod(file.fileno(), 0o644)  # whatever the umask: others may share the folder
        file.write(MAGIC + len(header).to_bytes(8, "little") + header)
        for array in arrays.values():
            file.write(_bytes_of(np.ascontiguousarray(array)))
            file.write(b"\0" * (-array.nbytes % ALIGNMENT))


def _load(path: Path, key: str) -> Arrays | None:
    """Read and check the arrays of a file; None where it is missing, damaged or of another key."""
    try:
        return _read(path, key)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        warnings.warn(f"{path}: made again, since {error}", stacklevel=2)
        return None


def _read(path: Path, key: str) -> Arrays:
    """Read the arrays of a file; any error means that it is damaged or of another key."""
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin as an index does")
        header_bytes = int.from_bytes(file.read(8), "little")
        outer = json.loads(file.read(min(header_bytes, LARGEST_HEADER_BYTES)))
    if xxhash.xxh3_128_hexdigest(outer["header"].encode()) != outer["header_checksum"]:
        raise ValueError("its header's checksum is wrong")
    # The key is compared in full: its hash is only the file's name.
    header = json.loads(outer["header"])
    first = len(MAGIC) + 8 + header_bytes
    if path.stat().st_size != first + header["bytes"]:
        raise ValueError("it has another size than its header says")
    if header["key"] != key:
        raise ValueError("it was made for something else")
    # Empty arrays cannot be mapped; the checksum is over all of them.
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
        is_small = array.nbytes < LEAST_MAPPED_BYTES
        arrays[entry["name"]] = array.copy() if is_small else array
    if digest.hexdigest() != outer["checksum"]:
        raise ValueError("its checksum is wrong")
    return arrays


def _bytes_of(array: np.ndarray) -> memoryview:
    """View a contiguous array as bytes."""
    return array.reshape(-1).view(np.uint8).data


def _add(digest: xxhash.xxh3_128, array: np.ndarray) -> None:
    """Add an array's bytes to a checksum, a block at a time."""
    raw = _bytes_of(array)
    for start in range(0, len(raw), CHECKSUM_BLOCK_BYTES):
        digest.update(raw[start : start + CHECKSUM_BLOCK_BYTES])
