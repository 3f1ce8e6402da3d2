"""Whether the tensors in a checkpoint are those of a run."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from model.hf.architecture import VOCABULARY_ROWS
from parallel.collectives import all_reduce
from parallel.layout import Axis

SHOWN_TENSORS = 4
"""Tensors that a message names."""

Stored = Mapping[str, TensorStorageMetadata]
"""Name -> what the checkpoint's table says of a tensor."""


def find_repadded(
    stored: Stored, tensors: dict[str, torch.Tensor], vocab_size: int | None
) -> dict[str, torch.Tensor]:
    """Pick the tensors that differ from the stored ones in rows of padding only."""
    if vocab_size is None:
        return {}
    found = {}
    for name, tensor in tensors.items():
        # Moments of a parameter have its shape: optimizer.output.weight.exp_avg.
        parameter = name.removeprefix("model.").removeprefix("optimizer.")
        if name not in stored or not parameter.startswith(VOCABULARY_ROWS):
            continue
        theirs = stored[name].size
        same_width = theirs[1:] == tensor.shape[1:]
        if theirs != tensor.shape and same_width and min(theirs[0], tensor.shape[0]) >= vocab_size:
            found[name] = tensor
    return found


def list_misfits(stored: Stored, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Name the tensors that the checkpoint lacks, or holds in another shape."""
    problems = []
    for name, tensor in tensors.items():
        if name not in stored:
            problems.append(f"{name} is not in it")
        elif tuple(stored[name].size) != tuple(tensor.shape):
            problems.append(
                f"{name} has shape {tuple(stored[name].size)}, this model needs "
                f"{tuple(tensor.shape)}"
            )
    return problems


def list_surplus(stored: Stored, tensors: dict[str, torch.Tensor], world: Axis) -> list[str]:
    """Name the tensors of the checkpoint that no rank asks for; collective over `world`.

    A kind of which nobody asks for any is left out on purpose: the optimizer's, where a run takes
    weights alone.
    """
    names = sorted(stored)
    asked = torch.tensor([name in tensors for name in names], dtype=torch.int32, device="cpu")
    is_asked = dict(zip(names, all_reduce(asked, world, dist.ReduceOp.MAX).tolist(), strict=True))
    kinds = {_kind_of(name) for name in names if is_asked[name]}
    return [
        f"{name} is in it, and not in this model"
        for name in names
        if not is_asked[name] and _kind_of(name) in kinds
    ]


def _kind_of(name: str) -> str:
    """Return "model" or "optimizer"."""
    return name.partition(".")[0]


def refuse_misfits(folder: Path, problems: list[str]) -> None:
    """Raise ValueError if there are problems, which several ranks may have found."""
    found = list(dict.fromkeys(problems))
    if not found:
        return
    more = len(found) - SHOWN_TENSORS
    raise ValueError(
        f"checkpoint {folder}: does not fit this run: {'; '.join(found[:SHOWN_TENSORS])}"
        f"{f' and {more} more' if more > 0 else ''}. Fix: load it with the model settings in "
        "its config.yaml (--no-load-optim if only optimizer state is missing)."
    )
