"""What a tool may write over: only what it made itself, and nothing that it reads.

Files, and folders that get something new in them; tools/outputs/folder.py writes folders whole.
"""

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.units import show_bytes
from pretrain.checkpointing.space import free_bytes


@dataclass(frozen=True)
class Input:
    """Something that a tool reads, and the name that a user knows it by."""

    label: str
    path: Path


# ---------------------------------------------------------------- where two paths meet


def relation(output: Path, source: Path) -> str | None:
    """Say how `output` lies to `source`: "is", "lies in" or "contains"; None if they are apart.

    Links and `..` are followed; a bind mount of a folder is that folder.
    """
    end = real_path(output)
    beginnings = {real_path(source)}
    if source.name not in ("", ".."):  # the place of a link counts as well as its target
        beginnings.add(real_path(source.parent) / source.name)
    for beginning in beginnings:
        if _is_same(end, beginning):
            return "is"
        if any(_is_same(parent, beginning) for parent in end.parents):
            return "lies in"
        if any(_is_same(parent, end) for parent in beginning.parents):
            return "contains"
    return None


def real_path(path: Path) -> Path:
    """Resolve links and `..` in a path; its end need not be there."""
    return Path(os.path.realpath(path))


def _is_same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def refuse_inputs(
    name: str,
    output: Path,
    inputs: Sequence[Input],
    allowed: Sequence[str] = (),
) -> None:
    """Raise ValueError where `output` is, lies in or contains an input, but for `allowed`."""
    for source in inputs:
        found = relation(output, source.path)
        if found is not None and found not in allowed:
            raise ValueError(
                f"{name} = {output}: {found} {source.label} ({source.path}), which is read. "
                "Fix: give a place of its own."
            )


def require_room(name: str, output: Path, needed_bytes: int) -> None:
    """Raise ValueError where fewer bytes are free than will be written at `output`."""
    free = free_bytes(output)
    if free < needed_bytes:
        raise ValueError(
            f"{name} = {output}: takes {show_bytes(needed_bytes)}, and {show_bytes(free)} are free "
            "there. Fix: free space, or give another place."
        )


def refuse_parents(name: str, output: Path) -> None:
    """Raise ValueError where the folder around `output` cannot be made or written."""
    parents = real_path(output.parent / "x").parents
    # As it is written, too: what follows a file in a path is no place, even if it is `..`.
    written = [parent for parent in output.parents if os.path.lexists(parent)]
    files = [parent for parent in written if not parent.is_dir()]
    around = next(parent for parent in [*files, *parents] if os.path.lexists(parent))
    if not around.is_dir():
        raise ValueError(f"{name} = {output}: {around} is not a folder. Fix: give another place.")
    if not os.access(around, os.W_OK | os.X_OK):
        raise ValueError(f"{name} = {output}: {around} cannot be written. Fix: give another place.")


# ---------------------------------------------------------------- files


def check_file(
    name: str,
    output: Path,
    maker: str,
    is_ours: Callable[[Path], bool],
    inputs: Sequence[Input] = (),
) -> Path:
    """Allow a file that is not there yet, or one that `maker` wrote -> its path without `..`.

    Args:
        name: the setting that gives `output`.
        is_ours: whether an existing file is one that `maker` wrote.
        inputs: files that are read; the output may lie beside them, but be none of them.

    Raises:
        ValueError: anything else is there, or the place cannot be written.
    """
    if output.is_symlink():
        raise ValueError(f"{name} = {output}: is a link. Fix: give the name of a file.")
    refuse_inputs(name, output, inputs, allowed=("lies in",))
    refuse_parents(name, output)
    place = real_path(output.parent) / output.name
    if not os.path.lexists(output):
        return place
    if not stat.S_ISREG(output.stat().st_mode):
        raise ValueError(f"{name} = {output}: is not a file. Fix: give the name of a file.")
    if not is_ours(output):
        raise ValueError(
            f"{name} = {output}: exists, and was not made by {maker}. "
            "Fix: give another name, or move the file away."
        )
    return place


PNG_METADATA = {"Software": "Ithaca"}
"""Metadata by which our pictures are known, for matplotlib's savefig."""
PAGE_GENERATOR = '<meta name="generator" content="Ithaca">'
"""Tag by which our pages are known, in their first lines."""
_HEAD_BYTES = 4096
"""Beginning of a file that is searched for them."""


def is_own_picture(path: Path) -> bool:
    """Tell whether a file is a PNG that was saved with PNG_METADATA."""
    head = _head(path)
    return head.startswith(b"\x89PNG") and b"tEXtSoftware\0Ithaca" in head


def is_own_page(path: Path) -> bool:
    """Tell whether a file is a page with PAGE_GENERATOR in its head."""
    return PAGE_GENERATOR.encode() in _head(path)


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES)


# ---------------------------------------------------------------- folders


def check_root(name: str, root: Path, child: Path, inputs: Sequence[Input]) -> Path:
    """Allow a folder to get `child`, a folder of its own -> its path without `..`.

    It may hold the inputs in folders of their own, but be none of them and lie in none.

    Raises:
        ValueError: it may not, or cannot be written.
    """
    refuse_inputs(name, root, inputs, allowed=("contains",))
    refuse_inputs(name, child, inputs)
    refuse_parents(name, child)
    return real_path(root)
