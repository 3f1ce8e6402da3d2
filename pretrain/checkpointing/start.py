"""Where a run starts, decided before anything is allocated.

A published checkpoint in --save always wins: this is a restart. Otherwise --load,
--pretrained-checkpoint or nothing (fresh weights). --load equal to an empty --save is a fresh
start; any other missing source is an error. What the run may then change is said by
checkpointing/resume_contract.py.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpointing.folders import LATEST, find_published
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


def find_start(settings: CheckpointConfig) -> Start:
    """Find the checkpoint that the run starts from, by the rules above.

    Raises:
        ValueError: a source that is missing, incomplete or of another kind.
    """
    # 1. A restart, whatever else is given.
    found = find_published(settings.save)
    if found:
        return Start(found, reason=f"continuing {found}", is_restart=True)
    # 2. Another folder's run, or only its weights.
    if settings.load:
        found = find_published(settings.load, settings.ckpt_step)
        if found:
            reason = f"{'weights of' if settings.finetune else 'loading'} {found}"
            return Start(found, weights_only=settings.finetune, reason=reason)
        if settings.save and os.path.abspath(settings.load) == os.path.abspath(settings.save):
            return Start(None, reason="fresh weights (--load is the empty --save)")
        _refuse_huggingface("load", settings.load)
        raise ValueError(
            f"load = {settings.load}: no checkpoint is published there (no {LATEST}). "
            "Fix: give a folder that holds one, or remove --load to start from fresh weights."
        )
    # 3. The weights of an import or another run.
    if settings.pretrained_checkpoint:
        found = find_published(settings.pretrained_checkpoint)
        if found:
            return Start(found, weights_only=True, reason=f"weights of {found}")
        _refuse_huggingface("pretrained_checkpoint", settings.pretrained_checkpoint)
        raise ValueError(
            f"pretrained_checkpoint = {settings.pretrained_checkpoint}: no checkpoint is published "
            "there. Fix: give a folder that holds one."
        )
    return Start(None)


def _refuse_huggingface(name: str, folder: str) -> None:
    """Raise ValueError if the folder holds a Hugging Face model."""
    path = Path(folder)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        raise ValueError(
            f"{name} = {folder}: is a Hugging Face folder. Fix: python -m tools.import_hf "
            f"--hf {folder} --save DIR, then --pretrained-checkpoint DIR."
        )
