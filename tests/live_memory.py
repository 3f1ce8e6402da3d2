"""How many bytes of tensors are alive, at each operation: what autograd keeps, and the peak of a
step."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operations made while it was on; memory inside an operation is not
    seen.

    Storages that live longer than their tensors (in a graph, in a function's saved tensors) and
    storages that are emptied and filled again count with what they hold. For one thread: a backward
    on a CPU runs in its caller's.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self.storages: dict[int, weakref.ref] = {}
        self._at_most = 0  # as if none was ever emptied

    @property
    def now(self) -> int:
        """Bytes alive."""
        return sum(
            storage.nbytes()
            for reference in list(self.storages.values())
            if (storage := reference())
        )

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        given = {
            id(x.untyped_storage())
            for x in tree_leaves((arguments, options))
            if isinstance(x, torch.Tensor)
        }
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and id(storage := tensor.untyped_storage()) not in given
            ):
                self._add(storage)
        if self._at_most > self.peak:
            self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        size = storage.nbytes()
        if key in self.storages:
            return

        def gone(_, key=key, size=size):
            del self.storages[key]
            self._at_most -= size

        self.storages[key] = weakref.ref(storage, gone)
        self._at_most += size
