"""Checkpoints: torch.distributed.checkpoint files, published whole or not at all.

    DIR/iter_0000100/                      DCP files, manifest.json, config.yaml, progress.json, tokenizer/,
                                           huggingface/ (where the model came from there)
    DIR/latest_checkpointed_iteration.txt  100

A save writes into a hidden folder, checksums every file, syncs, and renames; only then does the
text file name it. A load checks every checksum first. All ranks must see the same folder.
"""

import itertools
import json
import os
import pickle
import re
import shutil
import socket
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from data.files import checksum, lock_file, sync_path, write_atomically, write_durably
from model.hf import VOCABULARY_ROWS
from parallel.layout import Axis
from pretrain.checkpointing.progress import FILE as PROGRESS_FILE
from pretrain.checkpointing.progress import Progress

_ALONE = "torch.distributed is disabled"  # DCP's warning where working alone is meant
LATEST = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
CARRIED = "huggingface"
"""Folder of a checkpoint with what its Hugging Face source held besides weights
(checkpointing/model_files.py)."""


def iteration_folder(root: str | os.PathLike, step: int) -> Path:
    return Path(root) / f"iter_{step:07d}"


def published(root: str | os.PathLike | None, step: int | None = None) -> Path | None:
    """The folder of the latest published checkpoint under `root` (or of iteration `step`), or None.

    Raises:
        ValueError: the text file names a checkpoint that is not there or not complete.
    """
    if root is None:
        return None
    if ".." in Path(root).parts:
        # The system finds nothing at x/.. before x is there, which a save would make.
        root = os.path.realpath(root)
    if step is None:
        latest = Path(root) / LATEST
        if not latest.is_file():
            return None
        text = latest.read_text().strip()
        if not text.isdigit():
            raise ValueError(
                f"{latest} = {text!r}: must hold an iteration number. Fix: write the number of a complete "
                "iter_ folder into it."
            )
        step = int(text)
    folder = iteration_folder(root, step)
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"checkpoint {folder}: missing or not complete (no {MANIFEST}). Fix: write the number of a "
            f"complete one into {Path(root) / LATEST}, or name it with --ckpt-step."
        )
    return folder


# ---------------------------------------------------------------- writing


class FolderLock:
    """Keeps a second run out of a --save folder; the system lets go of it when the process ends."""

    def __init__(self, root: str | os.PathLike, world: Axis):
        """Collective over `world`; global rank 0 holds the lock.

        Raises:
            ValueError: another run holds it, or the folder cannot be written; on all ranks.
        """
        self.file = None
        problem = [None]
        if world.rank == 0:
            try:
                Path(root).mkdir(parents=True, exist_ok=True)
                self.file = open(Path(root) / ".lock", "a+", encoding="utf-8", errors="replace")
                lock_file(self.file)
                self.file.seek(0)
                if re.fullmatch(r"(process \d+ on .*)?", self.file.read()):  # not another program's
                    self.file.truncate(0)
                    self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
                    self.file.flush()
            except BlockingIOError:
                self.file.seek(0)
                problem = [
                    f"{self.file.read() or 'another process'} is training into it. Fix: stop that run, or give "
                    "another --save."
                ]
            except OSError as error:
                problem = [f"cannot be written ({error.strerror}). Fix: give another --save."]
        dist.broadcast_object_list(problem, src=0, group=world.group)
        if problem[0]:
            self.release()
            raise ValueError(f"save = {root}: {problem[0]}")

    def release(self) -> None:
        if self.file is not None:
            self.file.close()


def same_start_on_all_ranks(root: str | os.PathLike, planned: Path | None, world: Axis) -> bool:
    """Is `planned` still the latest published checkpoint (None = there is none), on every rank?
    Collective.

    Plans are made before the processes meet and before the folder is locked.
    """
    latest = [published(root) if world.rank == 0 else None]
    dist.broadcast_object_list(latest, src=0, group=world.group)
    answers = [False] * world.size
    dist.all_gather_object(answers, latest[0] == planned, group=world.group)
    return all(answers)


def save(
    root: str | os.PathLike,
    step: int,
    tensors: dict[str, torch.Tensor],
    progress: Progress,
    config_yaml: str,
    tokenizer_files: list[str],
    world: Axis,
    carried: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Write and publish iteration `step`; collective over `world` (of size 1 it needs no process
    group).

    Args:
        tensors: flat name -> DTensor or plain tensor (pretrain/state.py: checkpoint_tensors).
        carried: name -> content of what the model's Hugging Face folder held besides weights.
    Returns:
        The published folder.
    """
    final = iteration_folder(root, step)
    partial = final.with_name(f".{final.name}.partial")
    if world.rank == 0:
        _clear(partial)
        (partial / "tokenizer").mkdir(parents=True)
        write_durably(partial / "config.yaml", config_yaml)
        write_durably(partial / PROGRESS_FILE, progress.to_text())
        for file in tokenizer_files:
            shutil.copy(file, partial / "tokenizer" / Path(file).name)
        for name, content in carried.items():
            path = partial / CARRIED / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    _wait_for_all(world)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ALONE)
        dcp.save(
            tensors,
            storage_writer=dcp.FileSystemWriter(
                partial, single_file_per_rank=True, sync_files=True
            ),
            process_group=world.group,
            no_dist=world.group is None,
        )
    checksums = _checksums(partial, world)
    if world.rank == 0:
        write_durably(
            partial / MANIFEST, json.dumps({"algorithm": "xxh3_128", "files": checksums}, indent=1)
        )
        sync_path(partial)
        replaced = final.with_name(f".{final.name}.replaced")
        _clear(replaced)
        if os.path.lexists(final):
            os.rename(final, replaced)
        os.rename(partial, final)
        sync_path(final.parent)
        write_atomically(Path(root) / LATEST, str(step))
        _clear(replaced)
    _wait_for_all(world)
    return final


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether a folder holds nothing but what `save` wrote there, whole or in part.

    What deletes a checkpoint asks this first.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    files = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    try:
        listed = {*json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"], MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        return all(_PARTS.fullmatch(file) for file in files)
    return files <= listed


_PARTS = re.compile(
    rf"config\.yaml|progress\.json|{re.escape(MANIFEST)}|\.metadata(\.tmp)?|__\d+_\d+\.distcp"
    rf"|tokenizer/[^/]+|{CARRIED}/.+"
)
"""Files of a checkpoint that is not finished."""


def _clear(folder: Path) -> None:
    """Remove what an earlier save left at `folder`; move anything else aside, and say so."""
    if not os.path.lexists(folder):
        return
    if is_checkpoint_folder(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    names = (
        folder.with_name(f"{folder.name.lstrip('.')}.kept{number}") for number in itertools.count(1)
    )
    kept = next(name for name in names if not os.path.lexists(name))
    os.rename(folder, kept)
    print(
        f"warning: {folder} holds what no save wrote: kept as {kept}", file=sys.stderr, flush=True
    )


def _wait_for_all(world: Axis) -> None:
    if world.size > 1:
        dist.barrier(group=world.group)


def _checksums(folder: Path, world: Axis) -> dict[str, str]:
    """Relative path -> checksum of every file, the work shared by all ranks."""
    files = _files_of_save(folder) if world.rank == 0 else []
    if world.size > 1:
        # One list for all: on a network file system each node may see other files for a while.
        shared = [files]
        dist.broadcast_object_list(shared, src=0, group=world.group)
        files = shared[0]
    mine = {name: checksum(folder / name) for name in files[world.rank :: world.size]}
    gathered: list[dict] = [mine]
    if world.size > 1:
        gathered *= world.size
        dist.all_gather_object(gathered, mine, group=world.group)
    return {name: value for part in gathered for name, value in sorted(part.items())}


def _files_of_save(folder: Path) -> list[str]:
    """Every file there, and every one that .metadata names, whether this node sees it yet or
    not."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    stored = SafeReader(folder).read_metadata().storage_data
    return sorted(found | {place.relative_path for place in stored.values()})


# ---------------------------------------------------------------- reading


def verify_files(folder: Path, rank: int = 0, size: int = 1) -> list[str]:
    """Compare files [rank::size] of the manifest with what is on disk; the problems found, each a
    sentence."""
    files = sorted(json.loads((folder / MANIFEST).read_text())["files"].items())
    problems = []
    for name, expected in files[rank::size]:
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif checksum(path) != expected:
            problems.append(f"{path} differs from its checksum in {MANIFEST}")
    return problems


def load(
    folder: Path, tensors: dict[str, torch.Tensor], world: Axis, *, vocab_size: int | None = None
) -> None:
    """Fill `tensors` in place from a checkpoint written on any layout; collective over `world`.

    Args:
        vocab_size: tokens that exist. Rows beyond them are padding and take no part: the checkpoint
            may have more or fewer of them, and those that it lacks are filled with zeros.
    Raises:
        ValueError: damaged files, or tensors that the checkpoint lacks or holds in another shape;
            the same error on all ranks, and nothing is changed.
    """
    gathered: list[list[str]] = [[] for _ in range(world.size)]
    dist.all_gather_object(
        gathered, verify_files(folder, world.rank, world.size), group=world.group
    )
    refuse_damage(folder, [problem for part in gathered for problem in part])
    reader = SafeReader(folder)
    repadded = _repadded(reader.read_metadata(), tensors, vocab_size)
    others = {name: tensor for name, tensor in tensors.items() if name not in repadded}
    dist.all_gather_object(gathered, _misfits(reader.read_metadata(), others), group=world.group)
    problems = list(dict.fromkeys(problem for part in gathered for problem in part))
    if problems:
        raise ValueError(
            f"checkpoint {folder}: does not fit this run: {'; '.join(problems[:4])}"
            f"{f' and {len(problems) - 4} more' if len(problems) > 4 else ''}. Fix: load it with the "
            "model settings in its config.yaml (--no-load-optim if only optimizer state is missing)."
        )
    for tensor in repadded.values():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.zero_()
    reader.sizes = {name: tensor.shape for name, tensor in repadded.items()}
    dcp.load(tensors, storage_reader=reader, process_group=world.group)


def refuse_damage(folder: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"checkpoint {folder}: damaged: {'; '.join(problems[:4])}. Fix: start from an earlier "
            f"iteration: write its number into {folder.parent / LATEST}."
        )


def _repadded(
    metadata: Metadata, tensors: dict[str, torch.Tensor], vocab_size: int | None
) -> dict[str, torch.Tensor]:
    """Tensors with a row per token that differ from the stored ones in rows of padding only."""
    found = {}
    for name, tensor in tensors.items():
        stored = metadata.state_dict_metadata.get(name)
        parameter = name.removeprefix("model.").removeprefix("optimizer.")
        has_rows = parameter.startswith(VOCABULARY_ROWS) and isinstance(
            stored, TensorStorageMetadata
        )
        if vocab_size is None or not has_rows or stored.size == tensor.shape:
            continue
        if (
            stored.size[1:] == tensor.shape[1:]
            and min(stored.size[0], tensor.shape[0]) >= vocab_size
        ):
            found[name] = tensor
    return found


def _misfits(metadata: Metadata, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Tensors that the checkpoint lacks, or holds in another shape."""
    stored = metadata.state_dict_metadata
    problems = []
    for name, tensor in tensors.items():
        if name not in stored:
            problems.append(f"{name} is not in it")
        elif tuple(stored[name].size) != tuple(tensor.shape):
            problems.append(
                f"{name} has shape {tuple(stored[name].size)}, this model needs {tuple(tensor.shape)}"
            )
    return problems


def read_whole_tensors(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """The named tensors, whole, on the CPU, without any process group."""
    reader = SafeReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype, device="cpu")
        for name in names
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ALONE)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def tensor_names(folder: Path, prefix: str = "model.") -> list[str]:
    """Names of the stored tensors that start with `prefix`."""
    stored = SafeReader(folder).read_metadata().state_dict_metadata
    return sorted(
        name
        for name, entry in stored.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    )


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

    def find_class(self, module: str, name: str):
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


class SafeReader(dcp.FileSystemReader):
    """FileSystemReader whose metadata goes through `_MetadataUnpickler`."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self.sizes: dict[str, torch.Size] = {}
        """Tensors of which another size is asked for: the part that is stored is read, and no
        more."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        for name, size in self.sizes.items():
            metadata.state_dict_metadata[name].size = size
        return metadata
