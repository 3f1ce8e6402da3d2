"""Find the files that the inputs name, say what is left out and why, and write a table of both."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.idx_format import read_side_file
from tools.preprocessing.input_kinds import (
    EXTENSIONS,
    PARQUET_EXTENSION,
    is_compressed,
    kind_of,
    without_compression,
)

# Reasons to leave something out, as the table at the end names them.
HIDDEN = "hidden (name begins with a dot)"
UNKNOWN = "unknown ending (--plain-text reads it as text)"
NOT_WANTED = "not among --extensions"
REACHED_TWICE = "read already under another name"
DANGLING = "link that leads nowhere"
SPECIAL = "not a regular file"
TOKEN_FILES = "token files of these tools"
COMPRESSED_PARQUET = "Parquet in another compression (unpack it)"
SHOWN_NAMES = 3
"""Names of files that a message shows; of more it says how many."""

Identity = tuple[int, int, int, int] | str
"""Identifies a file or folder under each of its names."""


@dataclass
class Found:
    """Lists the files to read, in order, and the names of what is left out, by reason."""

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def find_files(
    inputs: Sequence[str], extensions: Sequence[str], *, plain_text: bool = False
) -> Found:
    """Find the files that the inputs name, in their order; those of a folder sorted by path.

    Linked folders are followed. What is reached under two names counts once, under one that is not
    a link if there is one. Hidden files and folders inside a folder are left out.

    Args:
        extensions: endings of the files to take from folders, as `.txt`, compressed ones as well.
            One that is not known otherwise makes its files plain text.
        plain_text: files of unknown endings are plain text.

    Raises:
        ValueError: an input does not exist, or does not say what it holds; there is no file at all;
            a folder cannot be read, or has a file and its compressed copy.
    """
    # What is wrong with the inputs themselves, before anything is walked.
    missing = [name for name in inputs if not Path(name).exists()]
    if missing:
        raise ValueError(f"input = {_join(missing)}: no such file or folder. Fix: the path.")
    endings = tuple("." + ending.lstrip(".").lower() for ending in extensions)
    search = _Search(endings, plain_text=plain_text)
    _check_given([name for name in inputs if not Path(name).is_dir()], search)
    # In the order of the inputs: what a later one reaches again is left out there.
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            search.take(search.walk(path))
        else:
            search.take([(False, path)])
    if not search.found.files:
        there = "; ".join(describe_left_out(search.found)) or "nothing at all"
        raise ValueError(
            f"input = {_join(inputs)}: no file to read that ends in {', '.join(endings)}; there "
            f"is: {there}. Fix: give files, other --extensions, or --plain-text."
        )
    return search.found


def _check_given(names: Sequence[str], search: "_Search") -> None:
    """Raise ValueError for files named as inputs that are not read as what they are."""
    # Pipes and devices.
    special = [name for name in names if not Path(name).is_file()]
    if special:
        raise ValueError(
            f"input = {_join(special)}: not a regular file; its size and end are not known. Fix: "
            "write it to a file first."
        )
    packed = [name for name in names if _is_compressed_parquet(name)]
    if packed:
        raise ValueError(
            f"input = {_join(packed)}: {PARQUET_EXTENSION} files have a compression of their own, "
            "and are not read through another. Fix: unpack it."
        )
    unknown = [name for name in names if search.is_unknown(name)]
    if unknown:
        raise ValueError(
            f"input = {_join(unknown)}: the ending does not say what it holds (known: "
            f"{', '.join(EXTENSIONS)}). Fix: --plain-text to read it as text, one document; or a "
            "name with the ending of what it is; other formats have to be converted."
        )


class _Search:
    """Walks folders, and remembers the files and folders that were reached before."""

    def __init__(self, endings: tuple[str, ...], *, plain_text: bool):
        self.found = Found()
        self._endings = endings
        self._plain_text = plain_text
        self._files: dict[Identity, Path] = {}
        self._folders: dict[Identity, Path] = {}

    def is_unknown(self, name: str) -> bool:
        """Tell whether nothing says what a file of this name holds."""
        return kind_of(name) is None and not self._plain_text and not self._is_wanted(name)

    def take(self, paths: Iterable[tuple[bool, Path]]) -> None:
        """Add files, sorted by path; `paths`: (it was reached through a link, path)."""
        chosen = []
        for _, path in sorted(paths):  # links last
            first = self._files.setdefault(_identity(path), path)
            if first is path:
                chosen.append(path)
            else:
                self._leave_out(REACHED_TWICE, f"{path} = {first}")
        self.found.files += sorted(chosen)

    def walk(self, root: Path) -> list[tuple[bool, Path]]:
        """Return (it was reached through a link, path) of the files to read below a folder."""
        found: list[tuple[bool, Path]] = []
        linked: list[Path] = []
        self._walk_tree(root, found, linked, through_link=False)
        # Afterwards: a folder that has a place of its own is named by that.
        for folder in linked:
            self._walk_tree(folder, found, linked, through_link=True)
        _refuse_copies(path for _, path in found)
        return found

    def _walk_tree(
        self,
        root: Path,
        found: list[tuple[bool, Path]],
        linked: list[Path],
        *,
        through_link: bool,
    ) -> None:
        """Add the files below a folder to `found`, and the linked folders to `linked`."""
        waiting = [root]
        while waiting:
            folder = waiting.pop()
            first = self._folders.setdefault(_identity(folder), folder)
            if first is not folder:
                self._leave_out(REACHED_TWICE, f"{folder} = {first}")
                continue
            for entry in _list_folder(folder):
                path = Path(entry.path)
                reason = self._reason_to_leave_out(entry)
                if reason is not None:
                    self._leave_out(reason, entry.path)
                elif not entry.is_dir():
                    found.append((through_link or entry.is_symlink(), path))
                elif entry.is_symlink():
                    linked.append(path)
                else:
                    waiting.append(path)

    def _reason_to_leave_out(self, entry: os.DirEntry) -> str | None:
        """Say why something in a folder is not read; None where it is."""
        if entry.name.startswith("."):
            return HIDDEN
        if not os.path.exists(entry.path):  # a circle of links, too, where entry.is_dir() raises
            return DANGLING
        if entry.is_dir():
            return None
        if not entry.is_file():
            return SPECIAL
        if _is_token_file(entry.path):
            return TOKEN_FILES
        if _is_compressed_parquet(entry.path):
            return COMPRESSED_PARQUET
        if self._is_wanted(entry.name):
            return None
        if kind_of(entry.name) is not None:
            return NOT_WANTED
        return None if self._plain_text else UNKNOWN

    def _is_wanted(self, name: str) -> bool:
        """Tell whether a name has one of the endings, also before that of a compression."""
        plain = without_compression(name)
        return name.lower().endswith(self._endings) or plain.endswith(self._endings)

    def _leave_out(self, reason: str, name: str) -> None:
        """Note something that is not read."""
        self.found.left_out[reason].append(name)


def _list_folder(folder: Path) -> list[os.DirEntry]:
    """Return what is in a folder, by name; an unreadable one is an error, not empty."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"input = {folder}: cannot be listed ({error.strerror}). Fix: its permissions, or "
            "other inputs."
        ) from None


def _identity(path: Path) -> Identity:
    """Identify a file by device and number.

    By size and time, too: some network file systems give a number twice.
    """
    status = path.stat()
    if status.st_ino == 0:  # a file system without numbers
        return os.path.realpath(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_compressed_parquet(name: str) -> bool:
    """Tell whether a name is that of Parquet in another compression, which cannot be read."""
    return is_compressed(name) and without_compression(name).endswith(PARQUET_EXTENSION)


def _is_token_file(path: str) -> bool:
    """Tell whether a file belongs to a pair of .bin and .idx, or to the progress of one."""
    # .json beside them is ours only if it says so: a corpus may have such a name.
    stem, ending = os.path.splitext(path)
    if ending not in (".bin", ".idx", ".json"):
        return False
    if stem.endswith(".progress"):
        return os.path.exists(f"{stem.removesuffix('.progress')}.lengths.partial")
    if not (os.path.exists(f"{stem}.bin") and os.path.exists(f"{stem}.idx")):
        return False
    return ending != ".json" or read_side_file(stem) is not None


def _refuse_copies(paths: Iterable[Path]) -> None:
    """Raise ValueError where a file and its compressed copy would both be read."""
    # By the name that the file has without its compression.
    plain: dict[str, Path] = {}
    for path in sorted(paths):
        name = without_compression(path)
        first = plain.setdefault(name, path)
        if first is not path and (is_compressed(first) or is_compressed(path)):
            raise ValueError(
                f"{path}: {first.name} stands beside it: the same text twice? Fix: move one of "
                "them away, or name the files as --input."
            )


def describe_inputs(found: Found, *, documents: int, empty: int, bad: int) -> list[str]:
    """Return a table of what was read and what was left out, by kind and by reason."""
    # Rows are (name, files, documents, names of files), None for an empty cell.
    rows: list[tuple[str, int | None, int | None, str]] = []
    rows.append(("read", len(found.files), documents, ""))
    kinds = Counter(kind_of(path) or "text of other endings" for path in found.files)
    rows += [(f"  {kind}", count, None, "") for kind, count in sorted(kinds.items())]
    left_out: list[tuple[str, int | None, int | None, str]] = []
    if empty:
        left_out.append(("  empty documents", None, empty, ""))
    if bad:
        left_out.append(("  bad lines, rows or texts (--skip-bad-lines)", None, bad, ""))
    for reason, names in sorted(found.left_out.items()):
        left_out.append((f"  {reason}", len(names), None, _shorten(names)))
    title = "left out" if left_out else "left out: nothing"
    rows += [(title, None, None, ""), *left_out]
    # As wide as the longest name.
    width = max(len(row[0]) for row in rows)
    lines = [f"{'inputs':<{width}}{'files':>12}{'documents':>14}"]
    for name, files, count, names in rows:
        cells = f"{_number(files):>12}{_number(count):>14}"
        lines.append(f"{name:<{width}}{cells}  {names}".rstrip())
    return lines


def describe_left_out(found: Found) -> list[str]:
    """Return how many files were left out and their first names, a line for each reason."""
    return [
        f"{len(names):,} {reason}: {_shorten(names)}"
        for reason, names in sorted(found.left_out.items())
    ]


def _number(count: int | None) -> str:
    """Write a cell of the table."""
    return "" if count is None else f"{count:,}"


def _shorten(names: Sequence[str]) -> str:
    """Return the first names by the alphabet, and how many more there are."""
    return _join(sorted(names))


def _join(names: Sequence[str]) -> str:
    """Return the first names in their order, and how many more there are."""
    more = len(names) - SHOWN_NAMES
    shown = ", ".join(names[:SHOWN_NAMES])
    return f"{shown} and {more:,} more" if more > 0 else shown
