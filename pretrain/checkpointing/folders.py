"""The folders of a run's checkpoints: their names, which is the latest, and what may be removed.

DIR/iter_0000100/                      DCP files, manifest.json, config.yaml, progress.json,
                                       tokenizer/; huggingface/ if the model was imported
DIR/iter_0000050.damaged/              one that was found damaged, kept (checkpointing/damage.py)
DIR/hf/step_00000100/                  an export to Hugging Face (checkpointing/exports.py)
DIR/latest_checkpointed_iteration.txt  100
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import xxhash

from data.files import write_atomically

LATEST = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
CARRIED = "huggingface"
"""Folder in a checkpoint for the files of its Hugging Face source that are no weights
(checkpointing/model_files.py)."""
EXPORTS = "hf"
"""Folder in --save for exports to Hugging Face, unless --hf-export-dir names another
(checkpointing/exports.py)."""
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


def tokenizer_model_in(folder: Path, tokenizer_type: str) -> str | None:
    """Find what --tokenizer-model is for the tokenizer beside a checkpoint's weights; None where
    the run had none."""
    files = sorted((folder / TOKENIZER).glob("*"))
    if not files:
        return None
    # SentencePiece is one file; a Hugging Face tokenizer is its folder.
    is_one_file = len(files) == 1 and tokenizer_type != "HuggingFaceTokenizer"
    return str(files[0] if is_one_file else folder / TOKENIZER)


def replaced_folder(folder: Path) -> Path:
    """Name the place of a checkpoint while another of the same step takes its name."""
    return folder.with_name(f".{folder.name}.replaced")


def step_of(folder: Path) -> int | None:
    """Read the iteration off a folder's name; None where it is no name of a checkpoint."""
    name = re.fullmatch(r"iter_(\d{7,})", folder.name, re.ASCII)
    return int(name[1]) if name else None


def is_complete(folder: Path) -> bool:
    """Tell whether a save came to its end: the manifest is written last."""
    return (folder / MANIFEST).is_file()


def complete_steps(root: Path) -> list[int]:
    """List the iterations whose folders are complete, the newest first."""
    if not root.is_dir():
        return []
    steps = [step_of(path) for path in root.iterdir() if is_complete(path)]
    return sorted((step for step in steps if step is not None), reverse=True)


def find_published(root: str | os.PathLike | None, step: int | None = None) -> Path | None:
    """Find the latest published checkpoint under `root`, or that of iteration `step`.

    Returns:
        Its folder; None where none was published.

    Raises:
        ValueError: the text file names a checkpoint that is not there or not complete, or is
            damaged itself.
    """
    if root is None:
        return None
    root = existing_path(root)
    if step is None:
        try:
            step = read_pointer(root)
        except ValueError as error:
            newest = complete_steps(root)
            fix = f"write {newest[0]} into it" if newest else "give another folder"
            raise ValueError(f"{error}. Fix: {fix}, or choose with --ckpt-step.") from None
        if step is None:
            return None
    folder = iteration_folder(root, step)
    if not is_complete(folder):
        raise ValueError(
            f"checkpoint {folder}: missing or not complete (no {MANIFEST}). Fix: write the number "
            f"of a complete one into {root / LATEST}, or name it with --ckpt-step."
        )
    return folder


def existing_path(root: str | os.PathLike) -> Path:
    """Return `root` without `..`: the system finds nothing at x/.. before x is there."""
    return Path(os.path.realpath(root)) if ".." in Path(root).parts else Path(root)


# ---------------------------------------------------------------- the pointer


def pointer_text(step: int) -> str:
    """Write the content of the file that names the latest checkpoint.

    Programs that know this file strip white space and read a number. So its checksum is a second
    line of 32 spaces and tabs: no bit of the file can change unnoticed. A number without that line
    was written by a person.
    """
    number = str(step)
    bits = f"{xxhash.xxh32_intdigest(number.encode()):032b}"
    return f"{number}\n{bits.replace('0', ' ').replace('1', chr(9))}\n"


def write_pointer(root: Path, step: int) -> None:
    """Name iteration `step` as the latest."""
    write_atomically(root / LATEST, pointer_text(step))


def read_pointer(root: Path) -> int | None:
    """Read which iteration is the latest; None where no file says so.

    Raises:
        ValueError: the file is damaged; the message says how, without a fix.
    """
    path = root / LATEST
    if not path.is_file():
        return None
    content = path.read_bytes()
    number = re.match(rb" *(\d+)", content)
    if number is None:
        shown = content[:20].decode(errors="replace").strip()
        raise ValueError(f"{path} = {shown!r}: must hold an iteration number")
    step = int(number[1])
    by_hand = re.fullmatch(rb" *\d+[ \r]*\n?", content)
    if not by_hand and content != pointer_text(step).encode():
        raise ValueError(
            f"{path} = {step}: does not fit the checksum in its second line (it is damaged, or "
            f"was edited; to choose an iteration write its number alone: echo {step} > {path})"
        )
    return step


# ---------------------------------------------------------------- what may be removed


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


def clear_unfinished(root: str | os.PathLike) -> None:
    """Remove what saves left under `root` that were cut short by a kill."""
    for partial in Path(root).glob(".iter_*.partial"):
        clear(partial)
    for folder in Path(root).glob("iter_*"):
        if step_of(folder) is not None and is_complete(folder):
            clear(replaced_folder(folder))


# ---------------------------------------------------------------- what a kill left without a name


def restore_replaced(root: Path) -> None:
    """Give a checkpoint its name back, where a kill struck before another could take it.

    All processes of a start may do so at once: one of them is first.
    """
    for moved in root.glob(".iter_*.replaced"):
        folder = moved.with_name(moved.name.removeprefix(".").removesuffix(".replaced"))
        if step_of(folder) is None or os.path.lexists(folder) or not is_complete(moved):
            continue
        with contextlib.suppress(FileNotFoundError):
            os.rename(moved, folder)
            print(
                f"warning: {folder} has its name back: a save of the same step was killed while "
                "it was to take it",
                file=sys.stderr,
                flush=True,
            )
