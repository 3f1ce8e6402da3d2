"""Tensors that are read only when they are written, so that a save holds one of them at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

ReadTensor = Callable[[str], torch.Tensor]
"""Reads a tensor by its name, into memory that nobody else uses."""


class LatePlanner(DefaultSavePlanner):
    """Plans a save of tensors on device `meta`, and reads each one when its turn comes.

    The one before is freed then: DCP's writer keeps what it wrote until its file is closed. So
    tensors must be written one after the other, never copied ahead.
    """

    def __init__(self, read: ReadTensor):
        super().__init__()
        self._read = read
        self._last: torch.Tensor | None = None

    def lookup_object(self, index: MetadataIndex) -> Any:
        if self._last is not None:
            self._last.untyped_storage().resize_(0)
        self._last = self._read(index.fqn)
        return self._last
