"""Files that are read from their beginning only, as they are compressed: gzip, zstd, bzip2, xz.

Decompressed a block at a time, so that memory does not grow with the file. zstandard is imported by
what needs it.
"""

import bz2
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from tools.preprocessing.input_kinds import COMPRESSIONS, is_compressed

COMPRESSED_BLOCK = 128 << 10
"""Bytes of a file read at a time; they may become a thousand times as many."""
PADDED = (".gz", ".xz")
"""Formats whose files may have zeros between and behind their members."""


class Decompressor(Protocol):
    """What zlib, bz2, lzma and zstandard have in common: it decompresses one member of a file."""

    @property
    def eof(self) -> bool:
        """Whether the member has ended."""
        ...

    @property
    def unused_data(self) -> bytes:
        """What was given behind the end of the member."""
        ...

    def decompress(self, data: bytes, /) -> bytes:
        """Decompress the next bytes."""
        ...


def read_blocks(path: str) -> Iterator[tuple[bytes, int]]:
    """Read a file as (its next bytes, decompressed; bytes of the file read so far).

    Raises:
        ValueError: the file is damaged or not whole.
    """
    with open(path, "rb") as file:
        if not is_compressed(path):
            while block := file.read(COMPRESSED_BLOCK):
                yield block, file.tell()
            return
        for block in _decompress(path, file):
            yield block, file.tell()


def _decompress(path: str, file: BinaryIO) -> Iterator[bytes]:
    """Decompress every member or frame of the file; a file of none is empty."""
    ending = next(ending for ending in COMPRESSIONS if path.lower().endswith(ending))
    decompressor: Decompressor | None = None
    while data := file.read(COMPRESSED_BLOCK):
        # One block may end a member and begin others.
        while data:
            if decompressor is None:
                data = data.lstrip(b"\0") if ending in PADDED else data
                if not data:
                    break
                decompressor = _decompressor(ending)
            yield _decompress_block(path, decompressor, data)
            data = decompressor.unused_data if decompressor.eof else b""
            if decompressor.eof:
                decompressor = None
    if decompressor is not None:
        raise _damaged(path, "it ends in the middle")


def _decompress_block(path: str, decompressor: Decompressor, data: bytes) -> bytes:
    """Decompress a block; an error of any library becomes a ValueError that names the file."""
    try:
        return decompressor.decompress(data)
    except MemoryError:
        raise
    except Exception as error:  # each library has kinds of its own; what reads the file is outside
        raise _damaged(path, f"{error}".rstrip(".") or type(error).__name__) from None


def _damaged(path: str, reason: str) -> ValueError:
    """Say that a file is damaged or incomplete."""
    return ValueError(f"{path}: damaged, or not whole ({reason}). Fix: copy or download it again.")


def _decompressor(ending: str) -> Decompressor:
    """Make the decompressor of one member, by the ending of the file."""
    if ending == ".gz":
        return zlib.decompressobj(wbits=31)
    if ending == ".bz2":
        return bz2.BZ2Decompressor()
    if ending == ".xz":
        return lzma.LZMADecompressor(format=lzma.FORMAT_XZ)
    import zstandard

    # The largest window there is: dumps are made with `zstd --long=31`.
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def read_whole(path: str) -> bytes:
    """Read all bytes of a file, decompressed."""
    if is_compressed(path):
        return b"".join(block for block, _ in read_blocks(path))
    return Path(path).read_bytes()


def read_line_blocks(path: str, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Read a file as (whole lines of about `block_bytes`, bytes of the file read so far)."""
    # `parts` hold the beginning of a line, or lines that are too few for a block.
    parts = []
    held = 0
    read = 0
    for block, read in read_blocks(path):
        cut = block.rfind(b"\n") + 1
        if held + len(block) >= block_bytes and cut:
            yield b"".join([*parts, block[:cut]]), read
            parts = []
            held = 0
            block = block[cut:]
        parts.append(block)
        held += len(block)
    if held:
        yield b"".join(parts), read
