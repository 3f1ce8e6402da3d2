"""A checkpoint's list of files with their checksums: made by a save, compared before a load."""

import json
from pathlib import Path

import torch.distributed as dist

from data.files import checksum
from parallel.layout import Axis
from pretrain.checkpointing.folders import LATEST, MANIFEST
from pretrain.checkpointing.stored_tensors import SafeReader

SHOWN_PROBLEMS = 4
"""Files or tensors that a message about a checkpoint names."""


def list_checksums(folder: Path, world: Axis) -> dict[str, str]:
    """Compute the checksum of every file of a checkpoint, the work shared by all ranks.

    Collective over `world`.

    Returns:
        Relative path -> checksum.
    """
    files = _files_of_save(folder) if world.rank == 0 else []
    if world.size > 1:
        # One list for all: on a network file system each node may see other files for a while.
        shared = [files]
        dist.broadcast_object_list(shared, src=0, group=world.group)
        files = shared[0]
    # Each rank takes every size-th file; then all know all.
    mine = {name: checksum(folder / name) for name in files[world.rank :: world.size]}
    gathered: list[dict[str, str]] = [mine]
    if world.size > 1:
        gathered *= world.size
        dist.all_gather_object(gathered, mine, group=world.group)
    return {name: value for part in gathered for name, value in sorted(part.items())}


def _files_of_save(folder: Path) -> list[str]:
    """List every file there, and every one that .metadata names, seen by this node yet or not."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    stored = SafeReader(folder).read_metadata().storage_data
    return sorted(found | {place.relative_path for place in stored.values()})


def to_text(checksums: dict[str, str]) -> str:
    """Write the content of manifest.json."""
    return json.dumps({"algorithm": "xxh3_128", "files": checksums}, indent=1)


def verify_files(folder: Path, rank: int = 0, size: int = 1) -> list[str]:
    """Compare this rank's share of the listed files with what is on disk.

    Returns:
        The problems found, each a sentence.
    """
    # As a save lists them, so that the shares of the ranks are the same everywhere.
    files = sorted(json.loads((folder / MANIFEST).read_text())["files"].items())
    problems = []
    for name, expected in files[rank::size]:
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif checksum(path) != expected:
            problems.append(f"{path} differs from its checksum in {MANIFEST}")
    return problems


def refuse_damage(folder: Path, problems: list[str]) -> None:
    """Raise ValueError if there are problems."""
    if problems:
        raise ValueError(
            f"checkpoint {folder}: damaged: {'; '.join(problems[:SHOWN_PROBLEMS])}. Fix: start "
            f"from an earlier iteration: write its number into {folder.parent / LATEST}."
        )
