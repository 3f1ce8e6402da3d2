"""The checkpoints of a run's folder: a line for each, and what is wrong with them."""

import time
from collections.abc import Iterator
from pathlib import Path

from pretrain.checkpointing.damage import is_aside, notes_about
from pretrain.checkpointing.folders import (
    LATEST,
    MANIFEST,
    find_published,
    is_complete,
    iteration_folder,
    read_pointer,
    step_of,
)
from pretrain.checkpointing.manifest import verify_files, verify_small_files
from pretrain.checkpointing.progress import Progress
from tools.shared.message_text import count_of
from tools.shared.number_text import NOTHING

Finding = tuple[str, bool]
"""A line, and whether it tells of damage."""

HEADER = f"{'step':>10}{'tokens':>20}  {'phase':<14}{'saved':<21}{'bytes':>18}  state"


def find_folder(name: str, path: str, step: int | None) -> Path:
    """Find one checkpoint: of a step, the latest of a run, or the one that `path` is itself.

    Args:
        name: the argument, for the message.

    Raises:
        ValueError: there is none.
    """
    folder = Path(path)
    if step is None and step_of(folder) is not None and is_complete(folder):
        return folder
    found = find_published(folder, step)
    if found is None:
        raise ValueError(
            f"{name} = {path}: no checkpoint is published there (no {LATEST}). Fix: give the "
            "--save folder of a run, or the folder of a checkpoint."
        )
    return found


def describe_checkpoints(path: str, step: int | None, *, all_files: bool) -> Iterator[Finding]:
    """Describe each checkpoint under `path`, the oldest first.

    Args:
        step: only this one.
        all_files: compare every file with its checksum, not only the small ones.

    Raises:
        ValueError: there is no checkpoint.
    """
    root = Path(path)
    if step is not None or step_of(root) is not None:
        folders = [find_folder("load", path, step)]
        root = folders[0].parent
    else:
        folders = sorted(
            folder
            for folder in (root.glob("iter_*") if root.is_dir() else [])
            if folder.is_dir() and (step_of(folder) is not None or is_aside(folder))
        )
    if not folders:
        raise ValueError(
            f"load = {path}: no checkpoint is there. Fix: give the --save folder of a run."
        )
    yield f"{root}: {count_of(len(folders), 'checkpoint')}", False
    yield HEADER, False
    for folder in folders:
        yield from _describe(folder, all_files=all_files)
    yield _describe_pointer(root)


def _describe(folder: Path, *, all_files: bool) -> Iterator[Finding]:
    """Describe one checkpoint in a line, then say what is wrong with it."""
    if is_aside(folder):
        yield _row(folder, None, "kept aside, since it was found damaged"), False
        return
    if not is_complete(folder):
        yield _row(folder, None, f"not complete (no {MANIFEST})"), False
        return
    try:
        problems = verify_files(folder) if all_files else verify_small_files(folder)
        notes = notes_about(folder) if not problems else []
    except ValueError as error:
        problems = [str(error)]
        notes = []
    state = "damaged" if problems else f"{'all' if all_files else 'small'} files verified"
    progress = Progress.read_if_whole(folder)
    if progress is not None and progress.ends_phase:
        state += f"; the end of phase {progress.phase_name}"
    yield _row(folder, progress, state), bool(problems)
    for problem in problems:
        yield f"  {problem}", True
    for note in notes:
        yield f"  {note}", False


def _row(folder: Path, progress: Progress | None, state: str) -> str:
    """Write one line of the table; what cannot be read is a dash."""
    step = step_of(folder)
    name = folder.name if step is None else f"{step:,}"
    tokens = NOTHING if progress is None else f"{progress.clock:,}"
    phase = NOTHING if progress is None else str(progress.phase.get("name", NOTHING))
    newest = folder / MANIFEST
    written = (newest if newest.is_file() else folder).stat().st_mtime
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{name:>10}{tokens:>20}  {phase:<14}{saved:<21}{size:>18,}  {state}"


def _describe_pointer(root: Path) -> Finding:
    """Say which checkpoint is the latest, and whether it is there."""
    try:
        step = read_pointer(root)
    except ValueError as error:
        return str(error), True
    if step is None:
        return f"{root / LATEST}: missing, so that no checkpoint is published", True
    is_there = is_complete(iteration_folder(root, step))
    return f"latest: {step:,}{'' if is_there else ', which is not there'}", not is_there
