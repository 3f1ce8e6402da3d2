"""Where a run starts, decided before anything is allocated.

A published checkpoint in --save always wins: this is a restart, from the newest one that is not
damaged (checkpointing/damage.py). Otherwise --load,
--pretrained-checkpoint or nothing (fresh weights). --load equal to an empty --save is a fresh
start; any other missing source is an error. What the run may then change is said by
checkpointing/resume_contract.py.
"""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpointing.damage import Damage, find_restart, find_verified, notes_about
from pretrain.checkpointing.folders import LATEST, complete_steps, step_of
from pretrain.config.config import CheckpointConfig


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from, and what it takes of it."""

    folder: Path | None
    """Published checkpoint to read; None = fresh weights."""
    weights_only: bool = False
    """Clock 0 and a fresh optimizer on the checkpoint's weights."""
    reason: str = "fresh weights"
    is_restart: bool = False
    """From --save itself: the same run goes on."""
    damaged: tuple[Damage, ...] = ()
    """Later checkpoints in --save that cannot be used, to be kept aside."""
    needs_mending: bool = False
    """Does the text file in --save name another checkpoint than this one?"""
    notes: tuple[str, ...] = ()
    """What the user must hear of the checkpoint."""


def find_start(settings: CheckpointConfig) -> Start:
    """Find the checkpoint that the run starts from, by the rules above.

    Raises:
        ValueError: a source that is missing, incomplete, damaged or of another kind.
    """
    # 1. A restart, whatever else is given.
    restart = find_restart(settings.save)
    if restart.folder:
        return Start(
            restart.folder,
            reason=f"continuing {restart.folder}",
            is_restart=True,
            damaged=restart.damaged,
            needs_mending=bool(restart.damaged) or restart.is_pointer_wrong,
            notes=restart.notes,
        )
    # 2. Another folder's run, or only its weights.
    if settings.load:
        found = find_verified(settings.load, settings.ckpt_step)
        if found:
            reason = f"{'weights of' if settings.finetune else 'loading'} {found}"
            notes = tuple(notes_about(found))
            return Start(found, weights_only=settings.finetune, reason=reason, notes=notes)
        if settings.save and os.path.abspath(settings.load) == os.path.abspath(settings.save):
            return Start(None, reason="fresh weights (--load is the empty --save)")
        _refuse_huggingface("load", settings.load)
        raise ValueError(
            f"load = {settings.load}: no checkpoint is published there (no {LATEST}). Fix: "
            f"{_nearest_source(Path(settings.load))}, or remove --load to start from fresh weights."
        )
    # 3. The weights of an import or another run.
    if settings.pretrained_checkpoint:
        found = find_verified(settings.pretrained_checkpoint)
        if found:
            notes = tuple(notes_about(found))
            return Start(found, weights_only=True, reason=f"weights of {found}", notes=notes)
        _refuse_huggingface("pretrained_checkpoint", settings.pretrained_checkpoint)
        raise ValueError(
            f"pretrained_checkpoint = {settings.pretrained_checkpoint}: no checkpoint is published "
            "there. Fix: give a folder that holds one."
        )
    return Start(None)


def _nearest_source(folder: Path) -> str:
    """Say how to name a checkpoint that is there, though none is published in the folder."""
    step = step_of(folder)
    if step is not None:
        return f"--load {shlex.quote(str(folder.parent))} --ckpt-step {step}"
    complete = complete_steps(folder)
    return f"--ckpt-step {complete[0]}" if complete else "give a folder that holds one"


def _refuse_huggingface(name: str, folder: str) -> None:
    """Raise ValueError if the folder holds a Hugging Face model."""
    path = Path(folder)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        raise ValueError(
            f"{name} = {folder}: is a Hugging Face folder. Fix: bash launch/ithaca.sh import "
            f"--hf {shlex.quote(folder)} --save DIR, then --pretrained-checkpoint DIR."
        )
