"""Whether two runs are the same, bit for bit: their steps, weights, optimizer state and data."""

import json
from pathlib import Path

import torch

from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.progress import FILE as PROGRESS_FILE
from pretrain.checkpointing.stored_tensors import read_whole_tensors, tensor_names

COMPARED_OF_A_STEP = ("tokens", "phase", "data_digest", "loss", "grad_norm", "lr", "sources")
COMPARED_OF_PROGRESS = (
    "step",
    "clock",
    "phase",
    "data",
    "seed",
    "real_tokens",
    "last_batch_tokens",
    "skipped_in_a_row",
    "steps_of_run",
    "steps_of_phase",
    "evaluation_due",
)
"""What progress.json says of the run and not of its processes: the seed and the position in the
data are all the random state that there is."""


def read_steps(folder: Path) -> list[dict]:
    """Read the whole lines of metrics.jsonl; none where there is no file."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # the end that a kill cut short
    return found


def differences(one: Path, other: Path) -> list[str]:
    """List what differs between two runs' steps and last checkpoints."""
    mine = read_steps(one)
    theirs = read_steps(other)
    found = []
    if [line["step"] for line in mine] != [line["step"] for line in theirs]:
        found.append(f"{len(mine)} and {len(theirs)} steps")
    for key in COMPARED_OF_A_STEP:
        steps = [a["step"] for a, b in zip(mine, theirs, strict=False) if a[key] != b[key]]
        if steps:
            found.append(f"{key} of {len(steps)} steps, first of {steps[0]}")

    folders = []
    for folder in (one, other):
        published = find_published(folder)
        if published is None:
            return [*found, f"no checkpoint in {folder}"]
        folders.append(published)
    return found + _differences_of_checkpoints(folders[0], folders[1])


def _differences_of_checkpoints(one: Path, other: Path) -> list[str]:
    """List what differs between two checkpoints: progress, weights, optimizer state."""
    mine = json.loads((one / PROGRESS_FILE).read_text())
    theirs = json.loads((other / PROGRESS_FILE).read_text())
    found = [
        f"{key} of {PROGRESS_FILE}"
        for key in COMPARED_OF_PROGRESS
        if mine.get(key) != theirs.get(key)
    ]
    names = tensor_names(one, "")
    if names != tensor_names(other, ""):
        return [*found, "the checkpoints' tensors"]
    for name in names:
        left = read_whole_tensors(one, [name])[name]
        right = read_whole_tensors(other, [name])[name]
        if not torch.equal(left, right):
            found.append(f"{name} by up to {float((left - right).abs().max()):.1e}")
    return found
