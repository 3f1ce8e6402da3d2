"""Files that appear whole or not at all, and locks that end with the process that holds them.

`fcntl` and not a library of lock files: the lock lies on the file that it guards (a .bin under way,
a folder's marker), which such a library would empty, and a file system without locks is no error.
"""

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

import xxhash

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What flock says on a file system without locks, as some network file systems are."""
SENT_BYTES = 16 << 20
"""Bytes that are written before the kernel is asked to bring them to the disk."""
CHECKSUM_BLOCK_BYTES = 1 << 20
"""Bytes that are read and hashed at once: few enough to stay in the CPU's cache."""


# ---------------------------------------------------------------- durable


def sync_file(file: IO) -> None:
    """Make what was written to an open file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a text file and sync it; a reader may see it half-written meanwhile."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        sync_file(file)


class WriteBehind:
    """Has the disk write a large file while it grows, so that the sync at its end is short.

    Without it the disk has nothing to do until then, and memory fills with what waits for it.
    """

    def __init__(self, file: IO):
        self._file = file
        self._num_written = 0
        self._num_sent = 0
        """Bytes that the kernel has been asked to bring to the disk."""

    def wrote(self, num_bytes: int) -> None:
        """Note that more was written, and ask the kernel from time to time; waits for nothing."""
        self._num_written += num_bytes
        if self._num_written - self._num_sent < SENT_BYTES:
            return
        # "Not needed again" makes the kernel write these pages now, so that it can drop them.
        num_bytes = self._num_written - self._num_sent
        # A file system that does not take the hint loses speed, and no file.
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._file.fileno(), self._num_sent, num_bytes, os.POSIX_FADV_DONTNEED)
        self._num_sent = self._num_written


# ---------------------------------------------------------------- whole or not at all


@contextlib.contextmanager
def open_atomically(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file to write that replaces `path` when the block ends, and vanishes if it fails.

    A reader sees the old or the new content, never a part.

    Args:
        temporary: where the content grows, beside `path`; by default a hidden name of its own, so
            that writers on other threads and machines do not meet.
    """
    if temporary is None:
        temporary = path.with_name(f".{path.name}.partial.{secrets.token_hex(8)}")
    try:
        with open(temporary, "wb") as file:
            yield file
            sync_file(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a small file so that a reader sees the old or the new content, never a part."""
    with open_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


# ---------------------------------------------------------------- locks


def lock_file(file: IO, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed or the process ends.

    Args:
        wait: wait until another process releases the lock, instead of raising.

    Returns:
        False where the file system has no locks, and nothing was done.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the lock fails for a reason of its own.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def lock_if_possible(file: IO) -> None:
    """Lock an open file as `lock_file` does, or go on without a lock where that fails.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        lock_file(file)
    except BlockingIOError:
        raise
    except OSError:
        pass  # some file systems fail in ways of their own


# ---------------------------------------------------------------- checksums


def checksum(path: Path) -> str:
    """Compute the xxh3_128 of a file, hex, a block at a time."""
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(CHECKSUM_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        # The system reads further ahead of the hashing then.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()
