"""The folders of a run's checkpoints: their names, which is the latest, and what may be removed.

DIR/iter_0000100/                      DCP files, manifest.json, config.yaml, progress.json,
                                       tokenizer/; huggingface/ if the model was imported
DIR/latest_checkpointed_iteration.txt  100
"""

import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

LATEST = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
CARRIED = "huggingface"
"""Folder in a checkpoint for the files of its Hugging Face source that are no weights
(checkpointing/model_files.py)."""
TOKENIZER = "tokenizer"
"""Folder in a checkpoint for the files of its tokenizer."""

_FILES_OF_A_SAVE = re.compile(
    rf"config\.yaml|progress\.json|{re.escape(MANIFEST)}|\.metadata(\.tmp)?|__\d+_\d+\.distcp"
    rf"|{TOKENIZER}/[^/]+|{CARRIED}/.+"
)
"""Files of a checkpoint that is not finished."""


def iteration_folder(root: str | os.PathLike, step: int) -> Path:
    """Name the folder of iteration `step`."""
    return Path(root) / f"iter_{step:07d}"


def find_published(root: str | os.PathLike | None, step: int | None = None) -> Path | None:
    """Find the latest published checkpoint under `root`, or that of iteration `step`.

    Returns:
        Its folder; None where none was published.

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
        step = _read_step(latest)
    folder = iteration_folder(root, step)
    # The manifest is written last: without it a folder is not whole.
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"checkpoint {folder}: missing or not complete (no {MANIFEST}). Fix: write the number "
            f"of a complete one into {Path(root) / LATEST}, or name it with --ckpt-step."
        )
    return folder


def _read_step(latest: Path) -> int:
    text = latest.read_text().strip()
    if not text.isdigit():
        raise ValueError(
            f"{latest} = {text!r}: must hold an iteration number. Fix: write the number of a "
            "complete iter_ folder into it."
        )
    return int(text)


def is_checkpoint_folder(folder: Path) -> bool:
    """Tell whether a folder holds nothing but what a save wrote there, whole or in part.

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
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {*manifest["files"], MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        # A save that was cut short: no list, so that the names must do.
        return all(_FILES_OF_A_SAVE.fullmatch(file) for file in files)
    return files <= listed


def clear(folder: Path) -> None:
    """Remove what an earlier save left at `folder`; move anything else aside, and say so."""
    if not os.path.lexists(folder):
        return
    if is_checkpoint_folder(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    # Somebody's own files: keep them under the first free name.
    visible = folder.name.lstrip(".")
    names = (folder.with_name(f"{visible}.kept{number}") for number in itertools.count(1))
    kept = next(name for name in names if not os.path.lexists(name))
    os.rename(folder, kept)
    print(
        f"warning: {folder} holds what no save wrote: kept as {kept}", file=sys.stderr, flush=True
    )
