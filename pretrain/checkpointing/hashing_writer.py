"""DCP's writer of files, which hashes what it writes on its way to the disk.

A checksum then says what was meant to be written, and no file is read back for it.
"""

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options
from typing_extensions import Buffer

from data.files import WriteBehind

HASHED_BLOCK_BYTES = 1 << 20
"""Bytes that are hashed and then written while they are still in the CPU's cache."""

COPIED_AHEAD_BYTES = 10_000_000
"""Bytes that are on their way from a GPU while others are written; DCP's default."""


class HashingWriter(dcp.FileSystemWriter):
    """Writes one file per rank, synced, and keeps the checksums of what this rank wrote.

    Args:
        on_host: all tensors are in the host's memory already.
    """

    def __init__(self, folder: Path, *, on_host: bool):
        # DCP copies from a GPU ahead of writing, and waits for all that the GPU has to do then.
        ahead = 0 if on_host else COPIED_AHEAD_BYTES
        super().__init__(folder, per_thread_copy_ahead=ahead)
        files = _HashingFiles()
        self.fs = files
        self.checksums: dict[str, str] = files.checksums
        """File name -> xxh3_128, hex."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # The checksum of the file covers every byte: torch's own of each tensor is not needed.
        had_crc32 = get_crc32_options()
        set_crc32_options(False)
        try:
            return super().write_data(plan, planner)
        finally:
            set_crc32_options(had_crc32)


class _HashingFiles(FileSystem):
    """Opens files whose content is hashed as it is written."""

    def __init__(self) -> None:
        self.checksums: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        try:
            with super().create_stream(path, mode) as file:
                if "w" not in mode:
                    yield file
                    return
                hashing = _HashingFile(cast(BinaryIO, file))
                try:
                    yield hashing
                except Exception as error:
                    # torch.save hides why a write failed behind an error of its own.
                    raise hashing.error or error from None
                self.checksums[Path(path).name] = hashing.digest.hexdigest()
        except OSError as error:
            # Of a file that is open already, the system names no path.
            error.filename = error.filename or str(path)
            raise

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)


class _HashingFile(io.RawIOBase):
    """Passes writes on to a file, and hashes them."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.digest = xxhash.xxh3_128()
        self._behind = WriteBehind(file)
        self.error: OSError | None = None
        """What the file system said first."""

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:
        view = memoryview(data).cast("B")
        try:
            for begin in range(0, len(view), HASHED_BLOCK_BYTES):
                block = view[begin : begin + HASHED_BLOCK_BYTES]
                self.digest.update(block)
                self.file.write(block)
                self._behind.wrote(len(block))
        except OSError as error:
            self.error = self.error or error
            raise
        return len(view)

    def flush(self) -> None:
        if self.file.closed:
            return
        try:
            self.file.flush()
        except OSError as error:
            self.error = self.error or error
            raise

    def tell(self) -> int:
        return self.file.tell()

    def fileno(self) -> int:
        # DCP syncs by this number, without a flush: what is still here would miss that.
        self.flush()
        return self.file.fileno()
