"""Whether a prefix may be written: what these tools made is replaced when asked, nothing else."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from data.idx_format import HEADER, MAGIC, read_side_file

ENDS = ("bin", "idx", "json")
"""Files of a finished pair. The .idx proves that it is whole: it goes first and comes last."""


def prefix_files(prefix: str) -> list[Path]:
    """List the files of a finished pair."""
    return [Path(f"{prefix}.{end}") for end in ENDS]


def check_output(prefix: str, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Check, before anything is read or written, that a pair may be written at a prefix.

    A pair that replaces another does so by rename: a process that has the old files open keeps
    them.

    Args:
        overwrite: replace a pair that is there.
        inputs: files that are read for it.

    Raises:
        ValueError: the prefix is a folder or an input, or holds files that these tools did not
            make; or a pair is there, and `overwrite` is not set.
    """
    name = f"output_prefix = {prefix}"
    if prefix.endswith("/") or Path(prefix).is_dir():
        raise ValueError(
            f"{name}: is a folder; the files are named PREFIX.bin and PREFIX.idx. Fix: for example "
            f"{Path(prefix) / 'corpus'}."
        )
    progress = _progress_file(prefix)
    if os.path.lexists(progress) and not _is_progress(progress):
        raise _foreign(name, progress)
    # Nothing is there: nothing can be lost.
    present = [path for path in prefix_files(prefix) if os.path.lexists(path)]
    if not present:
        return
    _refuse_inputs(name, present, inputs)
    _refuse_foreign(name, prefix, present)
    # What a stopped run left is taken up by the next one, without being asked.
    unfinished = is_unfinished(prefix)
    if not overwrite and not unfinished:
        side = read_side_file(prefix)
        held = f" ({side['documents']:,} documents, {side['tokens']:,} tokens)" if side else ""
        raise ValueError(
            f"{name}: {present[0]} exists{held}. Fix: another prefix, or --overwrite to replace it."
        )


def is_unfinished(prefix: str) -> bool:
    """Tell whether a stopped run left its progress here, and no finished pair is beside it."""
    return _is_progress(_progress_file(prefix)) and not os.path.lexists(f"{prefix}.idx")


def _progress_file(prefix: str) -> Path:
    return Path(f"{prefix}.progress.json")


def _is_progress(path: Path) -> bool:
    """Tell whether a file is one that data/writers/resumable_writer.py saved."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and {"bytes", "sequences", "documents", "note"} <= state.keys()


def _refuse_inputs(name: str, present: list[Path], inputs: Iterable[Path]) -> None:
    """Raise ValueError where an output is the same file as an input, under whatever name."""
    outputs = {_identity(path): path for path in present if path.exists()}
    for path in inputs:
        same = outputs.get(_identity(path)) if path.exists() else None
        if same is not None:
            raise ValueError(f"{name}: {same} would replace the input {path}. Fix: another prefix.")


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _refuse_foreign(name: str, prefix: str, present: list[Path]) -> None:
    """Raise ValueError for files that have the names of ours by chance, such as a model's P.bin."""
    # Each file is known by its content, whatever its name says.
    bin_file, idx, side = prefix_files(prefix)
    ours = {idx: _is_index(idx), side: read_side_file(prefix) is not None}
    # Without an index, a .bin is ours where our .json or the progress of a run says so.
    ours[bin_file] = any(ours.values()) or is_unfinished(prefix)
    for path in present:
        if not ours[path]:
            raise _foreign(name, path)


def _foreign(name: str, path: Path) -> ValueError:
    return ValueError(
        f"{name}: {path} is no file that these tools wrote, and is not replaced. Fix: another "
        "prefix, or move it away."
    )


def _is_index(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(HEADER.size).startswith(MAGIC)
    except OSError:
        return False
