"""Folders that appear whole or not at all, and replace only what the same tool wrote.

`NewFolder` writes a folder beside its place and renames it there when it is whole. A file in it,
MARKER, says which tool made it and lists its files: only a folder with that file, and with nothing
else in it, is ever replaced.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from data.files import checksum, lock_if_possible, sync_file, sync_path
from tools.outputs.files import Input, real_path, refuse_inputs, refuse_parents, relation

MARKER = "ithaca_made.json"
"""Name of the file in each folder that a tool makes: {"made_by": tool, "files": {name: bytes},
"checksums": {}}; `files` is null until the folder is whole, `checksums` are of small files."""
CHECKSUMMED_BYTES = 1 << 20
"""Largest file that is compared by checksum: people edit settings, and the size may stay."""


def _read_marker(folder: Path, maker: str) -> dict | None:
    """Read a folder's MARKER; None where `maker` did not make the folder."""
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("made_by") != maker:
        return None
    has_files = isinstance(content.get("files", 0), dict | None)
    return content if has_files and isinstance(content.get("checksums", {}), dict) else None


def foreign_content(folder: Path, maker: str) -> str | None:
    """Say why `folder` is not, or not only, what `maker` published there; None where it is."""
    content = _read_marker(folder, maker)
    if content is None or content["files"] is None:
        return f"was not made by {maker} (no {MARKER} that says so)"
    listed = content["files"]
    checksums = content.get("checksums", {})
    for place, folders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        # Files that were added or changed.
        for file in files:
            path = (inside / file).as_posix()
            if path != MARKER and path not in listed:
                return f"holds {path}, which {maker} did not write"
            if path == MARKER:
                continue
            is_changed = os.lstat(folder / path).st_size != listed[path]
            if not is_changed and path in checksums:
                is_changed = checksum(folder / path) != checksums[path]
            if is_changed:
                return f"holds {path}, which has changed since {maker} wrote it"
        # Folders that were added, and links to others.
        for child in folders:
            path = (inside / child).as_posix()
            is_listed = any(name.startswith(f"{path}/") for name in listed)
            if not is_listed or (folder / path).is_symlink():
                return f"holds {path}, which {maker} did not write"
    return None


def _is_leftover(folder: Path, maker: str) -> bool:
    """Tell whether `folder` is what an interrupted run of `maker` left: marked by it, or empty."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return _read_marker(folder, maker) is not None or not any(folder.iterdir())


def _remove_made(folder: Path, maker: str) -> None:
    """Remove the files that the marker lists, and the folder if nothing else is in it."""
    content = _read_marker(folder, maker)
    # A marker is a file that anyone may edit: only what lies in the folder is removed.
    for file in (content or {}).get("files") or {}:
        if ".." not in Path(file).parts and not Path(file).is_absolute():
            (folder / file).unlink(missing_ok=True)
    for place, _, _ in os.walk(folder, topdown=False):
        if Path(place) != folder:
            with contextlib.suppress(OSError):
                os.rmdir(place)
    if {path.name for path in folder.iterdir()} <= {MARKER}:
        (folder / MARKER).unlink(missing_ok=True)  # last, so that an interruption leaves it
        folder.rmdir()
    else:
        print(f"kept {folder}: {maker} did not write all that is in it")


class NewFolder:
    """A folder that appears whole at `publish`, or not at all.

        with NewFolder("output", path, "tools.x", inputs=inputs, overwrite=False) as new:
            write_into(new.path)
            new.publish()

    An earlier folder of the same tool is renamed away, replaced and then removed, so that an
    interruption leaves the old or the new one; the next run takes up what it left.
    """

    def __init__(
        self,
        name: str,
        output: Path,
        maker: str,
        *,
        inputs: Sequence[Input],
        overwrite: bool,
    ):
        """Raise ValueError where the folder may not be written; nothing was changed."""
        self.name = name
        self.output = output
        self.maker = maker
        self._inputs = list(inputs)
        self._overwrite = overwrite
        self._check_links()
        # The kernel's own reading of the path, so that a link made later does not move it.
        whole = output.name in ("", "..")
        self._final = real_path(output) if whole else real_path(output.parent) / output.name
        self.path = self._final.with_name(f".{self._final.name}.partial")
        """Folder to write into until `publish`."""
        self._replaced = self._final.with_name(f".{self._final.name}.replaced")
        self._made_parents: list[Path] = []
        self._lock: TextIO | None = None
        self._is_begun = False
        self._check_place()

    def _fail(self, reason: str, fix: str) -> ValueError:
        """Make the error that names the setting, its value, the reason and the fix."""
        return ValueError(f"{self.name} = {self.output}: {reason}. Fix: {fix}.")

    def _check_links(self) -> None:
        """Raise ValueError where the path is a link, an input, or holds the current folder."""
        if self.output.is_symlink():
            raise self._fail("is a link", "give the name of a folder")
        refuse_inputs(self.name, self.output, self._inputs)
        if relation(self.output, Path.cwd()) in ("is", "contains"):
            raise self._fail("is the current folder, or holds it", "give a folder of its own")
        refuse_parents(self.name, self.output)

    def refuse_inputs(self, inputs: Sequence[Input]) -> None:
        """Add inputs that are known only now; raises ValueError as the constructor does."""
        self._inputs += inputs
        refuse_inputs(self.name, self.output, inputs)

    def _check_place(self) -> None:
        """Raise ValueError where something is in the way, or the folder may not be replaced."""
        for beside in (self.path, self._replaced):
            if beside == self.path and self._is_begun:
                continue
            if os.path.lexists(beside) and not _is_leftover(beside, self.maker):
                raise self._fail(
                    f"{beside} is in the way, and was not made by {self.maker}", "move it away"
                )
        if not os.path.lexists(self._final):
            return
        if not self._final.is_dir() or self._final.is_symlink():
            raise self._fail("is not a folder", "give the name of a folder")
        if os.path.ismount(self._final):
            raise self._fail("is a mount point", "give a folder in it")
        problem = foreign_content(self._final, self.maker)
        if problem is not None and any(self._final.iterdir()):
            raise self._fail(problem, "give another folder, or move what is there away")
        if not self._overwrite:
            raise self._fail("exists already", "give another folder, or --overwrite")

    def __enter__(self) -> "NewFolder":
        try:
            self._begin()
        except OSError as error:
            self.__exit__()
            reason = f"cannot be written ({error.strerror})"
            raise self._fail(reason, "give another place") from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        # Folders that are made on the way are removed again if this fails.
        parents = [self._final.parent, *self._final.parent.parents]
        self._made_parents = [parent for parent in parents if not parent.exists()]
        self._final.parent.mkdir(parents=True, exist_ok=True)
        self._take_up()
        self.path.mkdir()
        self._is_begun = True
        self._lock = open(self.path / MARKER, "w", encoding="utf-8")
        self._write_marker(None)
        lock_if_possible(self._lock)

    def _take_up(self) -> None:
        """Finish or remove what an interrupted run of this tool left."""
        if self.path.exists():
            with self._locked_leftover():
                shutil.rmtree(self.path)
            print(f"removed {self.path}, which an interrupted {self.maker} had left")
        if not self._replaced.exists():
            return
        # It was replacing a folder: either the new one is in place, or the old one goes back.
        if os.path.lexists(self._final):
            _remove_made(self._replaced, self.maker)
            return
        os.rename(self._replaced, self._final)
        print(f"put {self._final} back, which an interrupted {self.maker} was replacing")
        self._check_place()

    @contextlib.contextmanager
    def _locked_leftover(self) -> Iterator[None]:
        """Hold the lock of what an interrupted run left; ValueError where that run still writes."""
        if not (self.path / MARKER).exists():  # interrupted before its first file
            yield
            return
        try:
            with open(self.path / MARKER, "r+", encoding="utf-8") as file:
                lock_if_possible(file)
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(self.path / MARKER)):
                    raise BlockingIOError  # it went and came again meanwhile
                yield
        except (BlockingIOError, FileNotFoundError):
            raise self._fail(
                f"another {self.maker} is writing it now", "wait for it, or give another folder"
            ) from None

    def _write_marker(self, files: dict[str, int] | None) -> None:
        """Write MARKER into the open, locked file."""
        assert self._lock is not None, "the folder is not begun"
        small = [name for name, size in (files or {}).items() if size <= CHECKSUMMED_BYTES]
        content = {
            "made_by": self.maker,
            "files": files,
            "checksums": {name: checksum(self.path / name) for name in small},
        }
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(json.dumps(content, indent=1) + "\n")
        sync_file(self._lock)

    def publish(self) -> None:
        """Rename the folder into its place.

        Raises:
            ValueError: something that this tool did not make came there meanwhile.
        """
        # Make all durable, and last the list of it.
        files = {}
        for path in sorted(self.path.rglob("*")):
            if path.is_file() and path.name != MARKER:
                files[path.relative_to(self.path).as_posix()] = path.stat().st_size
                sync_path(path)
        self._write_marker(files)
        sync_path(self.path)
        # Others may have come there while this one was written.
        self._check_links()
        self._check_final_again()
        # An empty folder is replaced by the renaming itself.
        replaces = os.path.lexists(self._final) and any(self._final.iterdir())
        if replaces:
            os.rename(self._final, self._replaced)
        try:
            os.rename(self.path, self._final)
        except OSError:
            if replaces:
                os.rename(self._replaced, self._final)
            raise
        self._is_begun = False
        self._made_parents = []
        sync_path(self._final.parent)
        if replaces:
            _remove_made(self._replaced, self.maker)

    def _check_final_again(self) -> None:
        """Raise ValueError where a folder came there that may not be replaced."""
        if not os.path.lexists(self._final):
            return
        if not self._overwrite:
            raise self._fail("was made by another meanwhile", "give another folder")
        self._check_place()

    def __exit__(self, *exception) -> None:
        if self._is_begun:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
        for parent in self._made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
