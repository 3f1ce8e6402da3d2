"""Let a process outlive its console: what nobody can read any more is dropped.

A terminal goes away with its connection, `| head` has read enough, the disk of a log file is full:
none of these is a reason to lose what was trained.
"""

import io
import os
import select
import sys
from typing import Any, TextIO


class _DroppingFile(io.FileIO):
    """A console's bytes, of which those are dropped that it does not take."""

    lost = ""
    """Why the last write that was lost failed; empty while none was."""

    def write(self, data: Any, /) -> int:
        try:
            taken = super().write(data)
            while taken is None:  # it is full, and somebody has made it non-blocking
                select.select([], [self], [])
                taken = super().write(data)
            return taken
        except OSError as error:
            self.lost = error.strerror or type(error).__name__
            return len(data)


class ConsoleStream(io.TextIOWrapper):
    """A standard stream whose writes never fail."""

    def __init__(self, stream: TextIO):
        # Nobody else may hold it, and with it its descriptor would be closed.
        self._stream = stream
        stream.flush()
        self._file = _DroppingFile(stream.fileno(), "wb", closefd=False)
        super().__init__(
            io.BufferedWriter(self._file),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=True,
        )

    @property
    def lost(self) -> str:
        """Why the last write that was lost failed; empty while none was."""
        return self._file.lost


def outlive_console() -> None:
    """Replace this process's standard output and error by streams that drop what nobody reads."""
    sys.stdout = ConsoleStream(_opened(sys.stdout))
    sys.stderr = ConsoleStream(_opened(sys.stderr))


def _opened(stream: TextIO | None) -> TextIO:
    """Return a stream, also where the process began with a closed one (`>&-`)."""
    return open(os.devnull, "w", encoding="utf-8") if stream is None else stream
