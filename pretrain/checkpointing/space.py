"""Bytes that a checkpoint takes on a disk, and whether they are free there."""

import errno
import math
import os
import shutil
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, Replicate


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return a tensor's bytes on this rank, divided by the number of ranks that hold the same.

    One of them writes it. A plain tensor is a scalar of the optimizer, and counts whole.
    """
    if not isinstance(tensor, DTensor):
        return tensor.nbytes
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    copies = math.prod(size for placement, size in sizes if isinstance(placement, Replicate))
    return -(-tensor.to_local().nbytes // copies)


def free_bytes(folder: Path) -> int:
    """Return the bytes that this process may still write to the file system of a folder."""
    # The folder itself may not be there yet.
    folder = Path(os.path.realpath(folder))
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(existing).free


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise OSError, as a full disk does, where a checkpoint's tensors do not fit."""
    if free_bytes(folder) < needed_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.parent))
