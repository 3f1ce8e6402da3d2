"""The tensors in a checkpoint's files, read without a process group and without running code.

DCP keeps its table of tensors as a pickle, which can run anything when it is loaded. Here it is
read by an unpickler that knows the classes of such a table and no others.
"""

import dataclasses
import io
import os
import pickle
import re
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

METADATA = ".metadata"
"""DCP's table of the tensors in a checkpoint's files."""
READERS = 4
"""Tensors that are read at once: reading and copying leave the interpreter free."""
SHOWN_TENSORS = 3
"""Tensors of a damaged file that are named."""
ALONE = "torch.distributed is disabled"
"""DCP's warning where working without a process group is meant."""


class _MetadataUnpickler(pickle.Unpickler):
    """Loads DCP's .metadata and nothing else: a checkpoint from a stranger must not run code."""

    allowed = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "device"},
        "pathlib": {"PosixPath", "PurePosixPath", "Path"},
        "collections": {"OrderedDict"},
    }

    def find_class(self, module: str, name: str) -> Any:
        # As Python 3.11.0 to 3.11.3 writes the member of an enum: an attribute of its class.
        if (module, name) == ("builtins", "getattr"):
            return _member_of
        # Dtypes are attributes of torch like its functions, which must not be called.
        is_dtype = (
            module == "torch"
            and re.fullmatch(r"[a-z0-9]+", name)
            and isinstance(getattr(torch, name, None), torch.dtype)
        )
        if not is_dtype and name not in self.allowed.get(module, ()):
            raise ValueError(
                f"checkpoint metadata names {module}.{name}, which no checkpoint of ours holds. "
                "Fix: do not load this folder; it may be harmful."
            )
        return super().find_class(module, name)


def _member_of(kind: Any, name: Any) -> Enum:
    """Return the member of an enum; in a pickle it stands for getattr, which could return anything.

    Raises:
        ValueError: it is no member of an enum.
    """
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise ValueError(
            f"checkpoint metadata names attribute {name!r} of {kind!r}, which no checkpoint of "
            "ours holds. Fix: do not load this folder; it may be harmful."
        )
    return kind[name]


class SafeReader(dcp.FileSystemReader):
    """A FileSystemReader whose metadata goes through `_MetadataUnpickler`, and is read once.

    Several threads read the tensors: each is copied twice on its way.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self._metadata: Any = None
        self.sizes: dict[str, torch.Size] = {}
        """Sizes to claim for tensors that are asked for in another than the stored one: DCP then
        reads the part that is stored."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            with open(Path(self.path) / METADATA, "rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
        metadata = self._metadata
        # As DCP's own reader does.
        metadata.storage_meta.load_id = self.load_id
        # DCP compares sizes before it reads.
        for name, size in self.sizes.items():
            metadata.state_dict_metadata[name].size = size
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        # Parts of tensors do not overlap, and DCP's planner only looks up where they belong.
        parts = [dataclasses.replace(plan, items=plan.items[i::READERS]) for i in range(READERS)]
        read_part = super().read_data
        with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint-reader") as pool:
            done = list(pool.map(lambda part: read_part(part, planner), parts))
        return done[0]


def tensors_of(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Find the stored tensors by name, without what else a table of DCP may hold."""
    return {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def tensor_names(folder: Path, prefix: str = "model.") -> list[str]:
    """List the stored tensors whose names start with `prefix`."""
    stored = tensors_of(SafeReader(folder).read_metadata())
    return sorted(name for name in stored if name.startswith(prefix))


def read_whole_tensors(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Read the named tensors, whole, into the CPU's memory, without any process group."""
    return StoredTensors(folder).read_all(names)


class StoredTensors:
    """The tensors of a checkpoint, whose table is read once.

    Args:
        folder: the checkpoint, whose files were verified.
    """

    def __init__(self, folder: Path):
        self._reader = SafeReader(folder)
        self.entries = tensors_of(self._reader.read_metadata())
        """Name -> what the table says of the tensor."""

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].properties.dtype

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, whole, into the CPU's memory."""
        return self.read_all([name])[name]

    def read_all(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Read the named tensors, whole, into the CPU's memory."""
        # DCP fills tensors that exist: of the stored sizes and dtypes, and on the CPU.
        tensors = {
            name: torch.empty(self.entries[name].size, dtype=self.dtype(name), device="cpu")
            for name in names
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=ALONE)
            dcp.load(tensors, storage_reader=self._reader, no_dist=True)
        return tensors


# ---------------------------------------------------------------- what a damaged file held


def name_damaged_tensors(folder: Path, file: str) -> str:
    """Say which tensors of a damaged file are lost, as closely as the file tells.

    Args:
        file: relative path, whose content differs from what was saved. The table of tensors must be
            as it was.
    """
    path = folder / file
    size = path.stat().st_size if path.is_file() else 0
    places = SafeReader(folder).read_metadata().storage_data
    parts = [(index.fqn, at) for index, at in places.items() if at.relative_path == file]
    # What is cut off is known; of the rest, older saves wrote a checksum for each tensor.
    lost = [name for name, at in parts if at.offset + at.length > size]
    if not lost:
        unsound = [name for name, at in parts if not _is_sound(path, at.offset, at.length)]
        lost = unsound if len(unsound) < len(parts) else []
    what = "damaged" if lost else "one or more is damaged of"
    names = sorted(set(lost or (name for name, _ in parts)))
    shown = ", ".join(names[:SHOWN_TENSORS])
    more = len(names) - SHOWN_TENSORS
    return f"{what}: {shown}{f' and {more} more' if more > 0 else ''}"


def _is_sound(path: Path, offset: int, length: int) -> bool:
    """Tell whether a part of a file is a tensor as torch saves it: an archive with a checksum."""
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(length)
    try:
        return zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError):
        return False
