"""Damaged checkpoints of a run are kept aside, and the text file names the good one before them.

Nothing is deleted: the folder gets another name, which no start and no save looks at. It happens
under the lock of the --save folder. Damage that only the load of the tensors could find ends the
processes in order: the plan followed from that checkpoint's clock, so the next start makes another.
"""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from data.files import sync_path
from parallel.layout import Axis
from pretrain.checkpointing.damage import ASIDE, Damage, newest_usable, nothing_usable
from pretrain.checkpointing.folders import complete_steps, step_of, write_pointer
from pretrain.checkpointing.manifest import DamagedCheckpoint
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.start import Start
from pretrain.logs.metrics import append_event


def mend_save_folder(start: Start, world: Axis) -> None:
    """Keep what the plan found damaged aside, and name the checkpoint that it took; on rank 0."""
    if world.rank == 0 and start.folder is not None and start.needs_mending:
        _set_aside(start.damaged, start.folder)


def fall_back(damage: DamagedCheckpoint, start: Start, world: Axis) -> None:
    """Let the next start take the checkpoint before the damaged one; collective over `world`.

    Args:
        damage: as every rank has it.

    Raises:
        DamagedCheckpoint: the damaged checkpoint is not the run's own, but one that was chosen.
        ValueError: there is no earlier one that can be used.
    """
    if not start.is_restart:
        raise damage
    problem: list[str | None] = [None]
    if world.rank == 0:
        problem[0] = _take_earlier(damage)
    dist.broadcast_object_list(problem, src=0, group=world.group)
    if problem[0] is not None:
        raise ValueError(problem[0])


def _take_earlier(damage: DamagedCheckpoint) -> str | None:
    """Keep a checkpoint aside, and name the one before it -> why that is not possible."""
    root = damage.folder.parent
    own = step_of(damage.folder) or 0
    earlier = [step for step in complete_steps(root) if step < own]
    try:
        good, more = newest_usable(root, earlier)
        damaged = [Damage(damage.folder, damage.problems), *more]
        if good is None:
            return str(nothing_usable(root, damaged))
        _set_aside(damaged, good)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _set_aside(damaged: Sequence[Damage], good: Path) -> None:
    """Rename damaged checkpoints, name the good one as the latest, and say so."""
    root = good.parent
    progress = Progress.read(good)
    # First the names: a checkpoint that is not there any more is passed over, whoever looks.
    texts = []
    for damage in damaged:
        kept = _free_name(damage.folder)
        os.rename(damage.folder, kept)
        texts.append(f"{damage}. Kept as {kept.name}; the run goes on from {good}")
    sync_path(root)
    step = step_of(good)
    assert step is not None, f"{good} is no name of a checkpoint"
    write_pointer(root, step)
    for text in texts or [f"the name of the latest checkpoint was wrong; it is {good} again"]:
        print(f"warning: {text}", flush=True)
        append_event(root, "damaged", progress.step, progress.clock, text)


def _free_name(folder: Path) -> Path:
    """Choose a name for a damaged checkpoint that nothing has yet."""
    names = (f"{folder.name}{ASIDE}{number}" for number in itertools.count(2))
    for name in itertools.chain([f"{folder.name}{ASIDE}"], names):
        if not os.path.lexists(folder.with_name(name)):
            return folder.with_name(name)
    raise AssertionError("numbers do not end")
