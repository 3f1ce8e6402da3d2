"""What happens in folders, told by the kernel within a fraction of a millisecond (inotify).

Polling sees a file that lives for a millisecond by chance only. No package of ours has inotify, and
its three calls are in the C library.
"""

import ctypes
import os
import select
import struct
import time
from dataclasses import dataclass
from pathlib import Path

MODIFIED = 0x2
CLOSED = 0x8
MOVED_FROM = 0x40
MOVED_TO = 0x80
CREATED = 0x100
DELETED = 0x200
ALL = MODIFIED | CLOSED | MOVED_FROM | MOVED_TO | CREATED | DELETED
"""Linux's numbers of what can happen (inotify.h)."""
HEADER = struct.Struct("iIII")
"""Watch, what happened, cookie, bytes of the name that follows."""
BUFFER_BYTES = 1 << 16


@dataclass(frozen=True)
class FileEvent:
    """One thing that happened to an entry of a folder."""

    folder: Path
    name: str
    mask: int
    time: float
    """When it was heard, by time.monotonic."""


class FileEvents:
    """Hears what happens in folders that exist already."""

    def __init__(self, *folders: Path):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self.folders: dict[int, Path] = {}
        for folder in folders:
            self.add(folder)

    def add(self, folder: Path) -> None:
        """Hear this folder, too; one that is gone already is left out."""
        watch = self.libc.inotify_add_watch(self.descriptor, os.fsencode(folder), ALL)
        if watch >= 0:
            self.folders[watch] = folder

    def wait(self, seconds: float) -> list[FileEvent]:
        """Return what happened; waits for it at most this long."""
        if not select.select([self.descriptor], [], [], seconds)[0]:
            return []
        data = os.read(self.descriptor, BUFFER_BYTES)
        now = time.monotonic()
        found = []
        at = 0
        while at < len(data):
            watch, mask, _, length = HEADER.unpack_from(data, at)
            at += HEADER.size
            name = os.fsdecode(data[at : at + length].rstrip(b"\0"))
            at += length
            if watch in self.folders:
                found.append(FileEvent(self.folders[watch], name, mask, now))
        return found

    def forget(self) -> None:
        """Drop everything that was not read yet."""
        while self.wait(0):
            pass

    def close(self) -> None:
        """Stop hearing."""
        os.close(self.descriptor)
