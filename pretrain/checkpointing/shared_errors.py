"""Errors of one rank's disk that end a save on all ranks, in one line with what to do.

A rank that fails alone would leave the others waiting, and a disk that is full needs no traceback
but the path, the bytes and the fix.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from data.units import show_bytes
from parallel.layout import Axis
from pretrain.processes.agreement import Refused

T = TypeVar("T")

FINAL_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
)
"""What a file system says that another try cannot mend."""


@dataclass(frozen=True)
class Failure:
    """What ended a rank's part of a save; goes from rank to rank."""

    rank: int
    text: str
    number: int | None = None
    """errno, where the file system said it."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written, for a reason that another try may mend."""


@dataclass(frozen=True)
class SavePlace:
    """Where a save writes and how much, for the words of its errors."""

    folder: Path
    needed_bytes: int
    free_bytes: int | None
    """When the save began; None = the file system did not say."""

    def error_of(self, failures: list[Failure]) -> Exception:
        """Make the error that all ranks raise, of what ended some of them."""
        first = next((each for each in failures if each.number in FINAL_ERRORS), failures[0])
        ranks = f"rank {first.rank}" + (f" and {len(failures) - 1} more" if failures[1:] else "")
        if first.number not in FINAL_ERRORS:
            return SaveFailed(f"checkpoint {self.folder}: not written ({ranks}: {first.text})")
        free = "?" if self.free_bytes is None else show_bytes(self.free_bytes)
        return Refused(
            f"checkpoint {self.folder}: not written ({ranks}: {first.text}); it needs "
            f"{show_bytes(self.needed_bytes)}, and {free} were free. The "
            "checkpoints before it are untouched. Fix: free space there, or give --save another "
            "folder."
        )


def run_together(action: Callable[[], None], place: SavePlace, world: Axis) -> None:
    """Run each rank's `action`, and end it on all ranks where it fails on one; collective.

    Raises:
        Refused: a file system failed in a way that another try cannot mend.
        SaveFailed: anything else failed.
    """
    own: list[Failure] = []
    try:
        action()
    except CheckpointException as error:
        # DCP collects the errors of all ranks itself, with their tracebacks.
        own = [_describe(rank, cause) for rank, (cause, _) in sorted(error.failures.items())]
    except Exception as error:
        own = [_describe(world.rank, error)]
    failures = {failure.rank: failure for part in gather(own, world) for failure in part}
    if failures:
        raise place.error_of(list(failures.values()))


def _describe(rank: int, error: BaseException) -> Failure:
    if isinstance(error, OSError) and error.strerror:
        at = f" at {error.filename}" if error.filename else ""
        return Failure(rank, f"{error.strerror}{at}", error.errno)
    return Failure(rank, f"{type(error).__name__}: {error}")


def gather(own: T, world: Axis) -> list[T]:
    """Collect a value of every rank, in the order of the ranks; collective over `world`."""
    gathered = [own] * world.size
    if world.size > 1:
        dist.all_gather_object(gathered, own, group=world.group)
    return gathered
