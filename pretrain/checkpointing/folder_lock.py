"""One run per --save folder: the lock that keeps a second one out, and what was found before it."""

import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch.distributed as dist

from data.files import lock_file
from parallel.layout import Axis
from pretrain.checkpointing.damage import find_restart
from pretrain.config.load import warn
from pretrain.guards.rewinds import Rewind, read_rewinds

_SIGNATURE = re.compile(r"process \d+ on .*")


class FolderLock:
    """Keeps a second run out of a --save folder; the system releases it when the process ends."""

    def __init__(self, root: str | os.PathLike, world: Axis):
        """Take the lock; collective over `world`, global rank 0 holds it.

        Raises:
            ValueError: another run holds it, or the folder cannot be written; on all ranks.
        """
        self.file: IO[str] | None = None
        problem: list[str | None] = [None]
        if world.rank == 0:
            problem[0] = self._take(Path(root))
        dist.broadcast_object_list(problem, src=0, group=world.group)
        if problem[0]:
            self.release()
            raise ValueError(f"save = {root}: {problem[0]}")

    def _take(self, root: Path) -> str | None:
        """Lock the folder's .lock file and sign it; returns the problem, if there is one."""
        # "a+" keeps the content of a file that is there: it names the holder, or is not ours.
        try:
            root.mkdir(parents=True, exist_ok=True)
            file = open(root / ".lock", "a+", encoding="utf-8", errors="replace")
            self.file = file
        except OSError as error:
            return _unwritable(error)
        try:
            is_locked = lock_file(file)
            file.seek(0)
            holder = file.read()
            if not is_locked:
                # Many clusters mount theirs so: refusing would leave no folder to train into.
                last = f"; the last run here was {holder}" if _SIGNATURE.fullmatch(holder) else ""
                warn(
                    f"save = {root}: its file system has no locks, so that nothing keeps a second "
                    f"run out of the folder{last}"
                )
            # The file of another program keeps its content.
            if not holder or _SIGNATURE.fullmatch(holder):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            return f"{holder} is training into it. Fix: stop that run, or give another --save."
        except OSError as error:
            return _unwritable(error)
        return None

    def release(self) -> None:
        """Let another run have the folder."""
        if self.file is not None:
            self.file.close()


def _unwritable(error: OSError) -> str:
    return f"cannot be written ({error.strerror}). Fix: give another --save."


def same_start_on_all_ranks(
    root: str | os.PathLike, planned: Path | None, world: Axis, rewinds: Sequence[Rewind] = ()
) -> bool:
    """Tell whether every rank goes on from what is in the folder now; collective.

    Plans are made before the processes meet and before the folder is locked.

    Args:
        planned: the checkpoint of this rank's plan; None where there was none.
        rewinds: those of its plan. A run that has ended since may have noted another.
    """
    # Rank 0 looks, and every rank compares with its own plan.
    latest: list[tuple[Path | None, tuple[Rewind, ...]] | str | None] = [None]
    if world.rank == 0:
        try:
            latest[0] = (find_restart(root).folder, read_rewinds(str(root)))
        except ValueError as error:
            latest[0] = str(error)  # unlike any plan: the next start refuses it
    dist.broadcast_object_list(latest, src=0, group=world.group)
    answers = [False] * world.size
    dist.all_gather_object(answers, latest[0] == (planned, tuple(rewinds)), group=world.group)
    return all(answers)
