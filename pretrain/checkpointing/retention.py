"""How a run's old checkpoints are deleted: after a newer one is published and was read again.

What stays is decided by retention_rules.py. What another run wrote, or anybody else, is never
deleted.
"""

import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from data.files import sync_path
from data.units import show_bytes
from pretrain.checkpointing import manifest
from pretrain.checkpointing.folders import (
    clear,
    complete_steps,
    is_checkpoint_folder,
    iteration_folder,
    read_pointer,
    step_of,
)
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.retention_rules import CheckpointFacts, Choice, what_to_delete
from pretrain.config.checkpoint_config import CheckpointConfig

SHOWN_FOLDERS = 8
"""Folders that a line names."""
READERS = 8
"""Threads that read a checkpoint's files again: checksums leave the interpreter free."""

END_SECONDS = 120.0
"""What the end of a run waits for its last deletion: other nodes wait for this one."""
MOST_SHARES = 256
"""Parts in which a checkpoint is read; between two of them a reader looks whether the run ends."""

_DELETED = re.compile(r"\.iter_\d{7,}\.deleted")

Report = Callable[[str, int, int, str], None]
"""Takes the kind of an event, its step, its clock and its text."""


def choose_run_id(*, is_restart: bool, stored: Progress | None) -> str:
    """Return the random id of a run: that of the checkpoint of a restart, else a new one."""
    if is_restart and stored is not None and stored.run_id is not None:
        return stored.run_id
    return uuid.uuid4().hex


# ---------------------------------------------------------------- the folders


def read_facts(root: Path) -> dict[int, CheckpointFacts]:
    """Read the facts of every published checkpoint under `root`, by step.

    One that cannot be read is left out, and so never deleted.
    """
    found = {}
    for step in complete_steps(root):
        folder = iteration_folder(root, step)
        progress = Progress.read_if_whole(folder)
        if progress is None or progress.step != step:
            continue  # damaged, or renamed by somebody
        found[progress.step] = CheckpointFacts(
            step=progress.step,
            clock=progress.clock,
            run_id=progress.run_id,
            phase_end=progress.phase_name if progress.ends_phase else None,
            score=progress.validation,
        )
    return found


def delete_checkpoint(folder: Path) -> int | None:
    """Delete a checkpoint so that a kill leaves it whole or gone -> bytes that this freed.

    Returns:
        None where the folder holds what no save wrote: then it stays.
    """
    if not is_checkpoint_folder(folder):
        return None
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    # From the renaming on no load finds it, however little of it is left.
    hidden = folder.with_name(f".{folder.name}.deleted")
    clear(hidden)
    os.rename(folder, hidden)
    sync_path(folder.parent)
    shutil.rmtree(hidden)
    return size


def remove_leftovers(root: Path) -> None:
    """Remove what is left of deletions that were cut short."""
    for folder in root.glob(".iter_*.deleted"):
        if _DELETED.fullmatch(folder.name) and is_checkpoint_folder(folder):
            shutil.rmtree(folder)


class Left(Exception):
    """The run ends, and what was being read is not waited for."""


def reread(folder: Path, leaving: threading.Event) -> list[str]:
    """Compare every file of a checkpoint with its checksum, from the disk itself.

    Returns:
        The problems found, each a sentence.

    Raises:
        Left: `leaving` was set meanwhile.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        _forget_cached(path)

    def check(share: int) -> list[str]:
        if leaving.is_set():
            raise Left
        return manifest.verify_files(folder, share, shares)

    shares = max(1, min(len(files), MOST_SHARES))
    with ThreadPoolExecutor(READERS, thread_name_prefix="retention-reader") as pool:
        return [problem for found in pool.map(check, range(shares)) for problem in found]


def _forget_cached(path: Path) -> None:
    """Ask the system to read a file from its disk: what was just written is still in memory."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------- the run's


class Retention:
    """Deletes a run's old checkpoints after each new one, in a thread of its own.

    Args:
        run_id: of the run, as its checkpoints have it.
        started_from: the checkpoint that this process began with.
        report: writes an event of the run.
        in_use: finds the steps of checkpoints that somebody is reading.
    """

    def __init__(
        self,
        root: Path,
        settings: CheckpointConfig,
        run_id: str,
        started_from: Path | None,
        report: Report,
        in_use: Callable[[], Collection[int]] = tuple,
    ):
        self.root = root
        self.settings = settings
        self.run_id = run_id
        self.report = report
        self.in_use = in_use
        self.started_from = _step_in(root, started_from)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retention")
        self._leaving = threading.Event()
        self._last: Future | None = None
        self._place = (0, 0)
        """Step and clock of the newest checkpoint, for events."""
        self._said: set[str] = set()

    def after_publish(self, folder: Path) -> None:
        """Look through the checkpoints, now that `folder` is published; returns at once."""
        if self.settings.keep_all:
            return
        # Where several were published meanwhile, the last one is enough.
        if self._last is not None:
            self._last.cancel()
        self._last = self._thread.submit(self._work, folder)

    def close(self, *, finish: bool) -> None:
        """End the thread.

        Args:
            finish: delete first what is due, as far as that takes no longer than a while, instead
                of leaving it to the next save.
        """
        if finish and self._last is not None:
            wait([self._last], timeout=END_SECONDS)
        self._leaving.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _work(self, folder: Path) -> None:
        """Do what follows from a published checkpoint; a failure is said and ends nothing."""
        try:
            self._delete_old(folder)
        except Left:
            pass
        except Exception as error:
            what = f"{error}" if isinstance(error, OSError | ValueError) else repr(error)
            self._say("retention", f"no older checkpoint is deleted: {what}")

    def _delete_old(self, folder: Path) -> None:
        """Delete what is due after a checkpoint was published."""
        step = step_of(folder)
        found = read_facts(self.root)
        if step not in found or read_pointer(self.root) != step:
            return  # somebody has set the run back meanwhile
        self._place = (step, found[step].clock)
        remove_leftovers(self.root)

        # Reading takes long: first see whether anything would go.
        choice = what_to_delete(
            found.values(),
            self.settings,
            run_id=self.run_id,
            published=step,
            verified={step},
            started_from=self.started_from,
            in_use=self.in_use(),
        )
        if choice.foreign:
            names = _shorten([f"iter_{old:07d}" for old in choice.foreign])
            self._say_once(f"{names}: not written by this run, and so never deleted")
        if not choice.delete:
            return
        if problems := reread(folder, self._leaving):
            damage = manifest.describe_damage(folder, problems)
            self._say("damaged", f"{damage}; so no older one is deleted")
            return
        self._delete(choice)

    def _delete(self, choice: Choice) -> None:
        """Delete what was chosen, the oldest first, and say what stays and why."""
        deleted = []
        freed = 0
        for step in choice.delete:
            if self._leaving.is_set():
                break
            folder = iteration_folder(self.root, step)
            size = delete_checkpoint(folder)
            if size is None:
                self._say_once(f"{folder} holds what no save wrote: it is kept")
                continue
            deleted.append(folder.name)
            freed += size
        if deleted:
            kept = [f"iter_{step:07d} ({reason})" for step, reason in choice.kept.items()]
            text = f"deleted {_shorten(deleted)}, {show_bytes(freed)}; kept {_shorten(kept)}"
            self._say("deleted", text)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say("retention", text)

    def _say(self, kind: str, text: str) -> None:
        print(text, flush=True)
        self.report(kind, *self._place, text)


def _step_in(root: Path, folder: Path | None) -> int | None:
    """Return the step of a checkpoint that lies under `root`; None for another place."""
    if folder is None or folder.parent.resolve() != root.resolve():
        return None
    return step_of(folder)


def _shorten(names: list[str]) -> str:
    """Join names, the last ones counted where there are many."""
    more = len(names) - SHOWN_FOLDERS
    return ", ".join(names[:SHOWN_FOLDERS]) + (f" and {more} more" if more > 0 else "")
