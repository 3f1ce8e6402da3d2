"""A checkpoint's tensors read part by part, its files compared with their checksums on the way.

Who reads a whole checkpoint would read it twice if it compared checksums first. Here each byte is
read once, hashed, and used; `finish` says whether all of them were what was saved. What was made of
them must not be published before.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import xxhash
from torch.distributed.checkpoint.utils import _create_file_view

from data.files import checksum
from pretrain.checkpointing.manifest import (
    READERS,
    DamagedCheckpoint,
    read_manifest,
    refuse_damage,
    verify_files,
    verify_small_files,
)
from pretrain.checkpointing.stored_tensors import METADATA, SafeReader, tensors_of

BLOCK_BYTES = 1 << 20
"""Bytes that are read and hashed at once: few enough to stay in the CPU's cache."""


@dataclass(frozen=True)
class Part:
    """Says where a rank's part of a tensor is."""

    begin: tuple[int, ...]
    """Its first element's place in the whole tensor."""
    file: str
    offset: int
    length: int
    """Bytes in the file, of what `torch.save` wrote."""


class VerifyingReader:
    """Reads a checkpoint's tensors without a process group, and each byte of its files once.

    Memory holds one part at a time. A tensor that is asked for out of the order of `names` is read
    once more.

    Raises:
        ValueError: its small files, or its table of tensors, are not what was saved.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = read_manifest(folder)
        refuse_damage(folder, verify_small_files(folder))
        if checksum(folder / METADATA) != manifest.files.get(METADATA):
            raise self._damage(METADATA)
        table = SafeReader(folder).read_metadata()
        self.entries = tensors_of(table)
        """Name -> what the table says of the tensor."""
        self._parts: dict[str, list[Part]] = {name: [] for name in self.entries}
        for index, place in table.storage_data.items():
            if index.fqn in self._parts:
                part = Part(tuple(index.offset), place.relative_path, place.offset, place.length)
                self._parts[index.fqn].append(part)
        shards = [name for name in manifest.files if name.endswith(".distcp")]
        self._files = {name: _HashedFile(folder / name) for name in shards}
        self._expected = manifest.files
        # One buffer for all parts: memory that is new to the process is slow.
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

    def names(self, prefix: str = "model.") -> list[str]:
        """List the tensors whose names start with `prefix`, in the order in which they lie."""
        found = [name for name in self.entries if name.startswith(prefix)]
        return sorted(found, key=lambda name: min(map(_place, self._parts[name])))

    def read_parts(
        self, name: str, rows: int | None = None
    ) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
        """Read a tensor's parts one after the other -> (where it lies in the whole, the part).

        A part's memory is used again by the next one.

        Args:
            rows: number of rows that are needed: parts beyond them are not read.

        Raises:
            DamagedCheckpoint: a part that cannot be read.
        """
        for part in sorted(self._parts[name], key=lambda part: part.begin):
            if rows is not None and part.begin and part.begin[0] >= rows:
                continue
            try:
                values = self._read(part)
            except Exception as error:  # torch says what is wrong in many ways
                raise self._damage(part.file) from error
            if values.numel():
                yield tuple(slice(at, at + n) for at, n in zip(part.begin, values.shape)), values

    def is_cut_by_rows(self, name: str) -> bool:
        """Tell whether each part of a tensor holds whole rows, or all of it."""
        return all(not any(part.begin[1:]) for part in self._parts[name])

    def _read(self, part: Part) -> torch.Tensor:
        """Read one part into the buffer -> it as a tensor."""
        if self._buffer.numel() < part.length:
            self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")  # freed first
            self._buffer = torch.empty(part.length, dtype=torch.uint8, device="cpu")
        content = self._buffer[: part.length]
        self._files[part.file].read_into(_bytes_of(content), part.offset)
        # torch itself says where in its archive the numbers are, and how they are laid out.
        with open(self.folder / part.file, "rb") as file:
            archive = cast(BinaryIO, _create_file_view(file, part.offset, part.length))
            described = torch.load(archive, map_location="meta", weights_only=True)
        storage: Any = described.untyped_storage()
        begin = storage._checkpoint_offset
        numbers = content[begin : begin + storage.nbytes()].view(described.dtype)
        first = numbers.storage_offset() + described.storage_offset()
        return numbers.as_strided(described.shape, described.stride(), first)

    def finish(self) -> None:
        """Read what nobody asked for, and compare every file with its checksum.

        Raises:
            DamagedCheckpoint: a file is not what was saved.
        """
        with ThreadPoolExecutor(READERS, thread_name_prefix="checksum") as pool:
            found = dict(zip(self._files, pool.map(_HashedFile.digest, self._files.values())))
        for name, digest in found.items():
            if digest != self._expected[name]:
                raise self._damage(name)

    def _damage(self, file: str) -> DamagedCheckpoint:
        """Make the error that says which tensors are damaged: everything is read again for it."""
        problems = verify_files(self.folder)
        # A disk may have given other bytes once than it does now.
        return DamagedCheckpoint(
            self.folder, problems or [f"{self.folder / file} could not be read as it was saved"]
        )


def _bytes_of(content: torch.Tensor) -> memoryview:
    """Return the memory of a tensor of bytes."""
    array: Any = content.numpy()
    return memoryview(array)


def _place(part: Part) -> tuple[list[int], int]:
    """Return a key that sorts parts by the number of their file, and where in it they are."""
    return [int(number) for number in re.findall(r"\d+", part.file)], part.offset


class _HashedFile:
    """Hashes each byte of a file once, whichever of them are asked for."""

    def __init__(self, path: Path):
        self._path = path
        self._digest = xxhash.xxh3_128()
        self._num_hashed = 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from a place in the file; EOFError where the file is too short."""
        with self._open() as file:
            self._hash_until(file, offset)
            file.seek(offset)
            for begin in range(0, len(buffer), BLOCK_BYTES):
                block = buffer[begin : begin + BLOCK_BYTES]
                if file.readinto(block) != len(block):
                    raise EOFError(f"{self._path} is too short")
                self._hash(block, offset + begin)

    def digest(self) -> str:
        """Hash the rest of the file -> xxh3_128 of all of it, hex."""
        with self._open() as file:
            self._hash_until(file, None)
        return self._digest.hexdigest()

    def _open(self) -> BufferedReader:
        return open(self._path, "rb")

    def _hash_until(self, file: BufferedReader, end: int | None) -> None:
        """Hash the bytes up to `end`, or to the end of the file."""
        file.seek(self._num_hashed)
        while end is None or self._num_hashed < end:
            room = BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - self._num_hashed)
            block = file.read(room)
            if not block:
                return
            self._hash(memoryview(block), self._num_hashed)

    def _hash(self, block: memoryview, offset: int) -> None:
        """Hash a block, unless it was before."""
        if offset == self._num_hashed:
            self._digest.update(block)
            self._num_hashed += len(block)
