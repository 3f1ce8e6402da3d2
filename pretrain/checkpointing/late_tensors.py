"""Tensors that are read only when they are written, so that a save holds one of them at a time."""

import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

FillTensor = Callable[[str, torch.Tensor], None]
"""Reads what a tensor holds, by its name, into the tensor."""


class LatePlanner(DefaultSavePlanner):
    """Plans a save of tensors on device `meta`, and has each one filled when its turn comes.

    The memory of the one before is given back then: DCP's writer keeps its tensors until their file
    is closed. So they must be written one after the other, never copied ahead.
    """

    def __init__(self, fill: FillTensor):
        super().__init__()
        self._fill = fill
        self._memory: mmap.mmap | None = None

    def lookup_object(self, index: MetadataIndex) -> Any:
        if self._memory is not None:
            self._memory.madvise(mmap.MADV_DONTNEED)
        described = super().lookup_object(index)
        # Pages of its own, which go back to the system whatever else lies around them.
        self._memory = mmap.mmap(-1, described.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(self._memory, dtype=described.dtype).view(described.shape)
        self._fill(index.fqn, tensor)
        return tensor
