"""The newest checkpoint that can be used: where the latest is damaged, the one before it.

What a plan is made from (manifest, progress.json, config.yaml, tokenizer) is verified before
anything follows from it, on every rank alike. The tensors are verified when they are loaded; what
is found then leads to a new start (checkpointing/set_aside.py). Only a restart falls back: another
folder was chosen by somebody, who is told.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from pretrain.checkpointing.folders import (
    LATEST,
    complete_steps,
    existing_path,
    find_published,
    iteration_folder,
    read_pointer,
    restore_replaced,
)
from pretrain.checkpointing.manifest import (
    describe_damage,
    read_manifest,
    refuse_damage,
    unlisted_files,
    verify_small_files,
)

ASIDE = ".damaged"
"""What the name of a damaged checkpoint gets when it is kept aside; a number may follow."""
SHOWN_FILES = 3


@dataclasses.dataclass(frozen=True)
class Damage:
    """Says what is wrong with one checkpoint."""

    folder: Path
    problems: list[str]

    def __str__(self) -> str:
        return describe_damage(self.folder, self.problems)


@dataclasses.dataclass(frozen=True)
class Restart:
    """The checkpoint that a run goes on from, and what is wrong with later ones."""

    folder: Path | None
    """None = the run begins here."""
    damaged: tuple[Damage, ...] = ()
    """Checkpoints that were to be taken before this one, the newest first."""
    notes: tuple[str, ...] = ()
    """What the user must hear of."""
    is_pointer_wrong: bool = False
    """Does the text file name another checkpoint, or none?"""


def find_restart(save: str | os.PathLike | None) -> Restart:
    """Find the newest checkpoint in a --save folder whose small files are what was saved.

    Raises:
        ValueError: there are checkpoints, and none can be used; or a newer version wrote one.
    """
    if save is None:
        return Restart(None)
    root = existing_path(save)
    restore_replaced(root)
    steps = complete_steps(root)
    latest, problem = _read_latest(root, steps)
    if not steps:
        aside = sorted(path for path in root.glob("iter_*") if is_aside(path))
        if problem is None and not aside:
            return Restart(None)
        raise _nothing_left(root, [problem] if problem else [], aside)

    # Later ones than the text file says are not published, or somebody went back before them.
    if latest is not None:
        steps = [step for step in steps if step <= latest]
    folder, damaged = newest_usable(root, steps)
    if folder is None:
        raise nothing_usable(root, damaged)
    notes = [f"{damage}. The one before it is taken: {folder}" for damage in damaged]
    if problem is not None:
        notes.insert(0, f"{problem}. The newest complete checkpoint is taken: {folder}")
    notes += notes_about(folder)
    return Restart(folder, tuple(damaged), tuple(notes), is_pointer_wrong=problem is not None)


def _read_latest(root: Path, steps: list[int]) -> tuple[int | None, str | None]:
    """Read which iteration is the latest -> it, where it is one of `steps`; and what is wrong."""
    try:
        latest = read_pointer(root)
    except ValueError as error:
        return None, str(error)
    if latest is None:
        # A first save that was killed just before its end, or somebody's hand.
        return None, f"{root / LATEST} is missing" if steps else None
    if latest not in steps:
        folder = iteration_folder(root, latest)
        return None, f"{root / LATEST} names {folder.name}, which is missing or not complete"
    return latest, None


def newest_usable(root: Path, steps: Sequence[int]) -> tuple[Path | None, list[Damage]]:
    """Find the first of `steps` whose small files are what was saved -> it, and those before it."""
    damaged = []
    for step in steps:
        folder = iteration_folder(root, step)
        problems = verify_small_files(folder)
        if not problems:
            return folder, damaged
        damaged.append(Damage(folder, problems))
    return None, damaged


def nothing_usable(root: Path, damaged: Sequence[Damage]) -> ValueError:
    """Make the error for a folder in which every checkpoint is damaged."""
    aside = sorted(path for path in root.glob("iter_*") if is_aside(path))
    return _nothing_left(root, [str(damage) for damage in damaged], aside)


def _nothing_left(root: Path, problems: list[str], aside: list[Path]) -> ValueError:
    problems = problems + [f"{path.name} was found damaged before" for path in aside]
    return ValueError(
        f"save = {root}: holds no checkpoint that can be used: {'; '.join(problems)}. Fix: put a "
        "good copy of one of them back, or give another --save."
    )


def is_aside(path: Path) -> bool:
    """Tell whether a folder's name is that of a damaged checkpoint kept aside."""
    return re.fullmatch(rf"iter_\d{{7,}}{re.escape(ASIDE)}\d*", path.name) is not None


def find_verified(root: str | os.PathLike, step: int | None = None) -> Path | None:
    """Find a published checkpoint as `find_published` does, its small files being verified.

    Raises:
        ValueError: it is missing or damaged, or a newer version wrote it.
    """
    folder = find_published(root, step)
    if folder is not None:
        refuse_damage(folder, verify_small_files(folder))
    return folder


def notes_about(folder: Path) -> list[str]:
    """List what cannot be verified of a good checkpoint, and what no save wrote there."""
    manifest = read_manifest(folder)
    notes = []
    if not manifest.is_sealed:
        notes.append(
            f"{folder}: an older version saved it, whose list of checksums has none of its own"
        )
    extra = unlisted_files(folder, manifest)
    if extra:
        more = len(extra) - SHOWN_FILES
        shown = ", ".join(extra[:SHOWN_FILES]) + (f" and {more} more" if more > 0 else "")
        notes.append(f"{folder}: holds what no save wrote, and what is not read: {shown}")
    return notes
