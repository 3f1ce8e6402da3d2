"""Counts the bytes of tensors that are alive, at each operation.

It measures what autograd keeps and the peak of a step, on any device; on device meta the tensors
have sizes and no memory.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operations made while it was on.

    Memory inside an operation is not seen. Storages that live longer than their tensors (in a
    graph, in a function's saved tensors) and storages that are emptied and filled again count with
    what they hold. For one thread: a backward on a CPU or on meta runs in its caller's.
    """

    def __init__(self, listen: Callable[..., None] | None = None):
        """
        Args:
            listen: is called with the operator and the arguments of each operation.
        """
        super().__init__()
        self.listen = listen
        self.peak = 0
        self.now = 0
        """Bytes alive."""
        self.operations = 0
        self._sizes: dict[int, int] = {}
        """Bytes of each storage, by its id."""
        self._references: dict[int, weakref.ref] = {}
        self._is_paused = False
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self):
        # Nothing is dispatched where a storage is emptied or filled.
        resize = self._resize

        def counted(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            self._update(storage)
            return result

        torch.UntypedStorage.resize_ = counted  # pyrefly: ignore[bad-assignment]
        return super().__enter__()

    def __exit__(self, exc_type, exc_val, exc_tb):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(exc_type, exc_val, exc_tb)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing that is made and freed inside; `add` counts what stays."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def add(self, tree: object) -> None:
        """Count the tensors of nested lists that are not counted yet."""
        for storage in _storages(tree):
            self._add(storage)
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        if self.listen is not None:
            self.listen(func, args)
        if self._is_paused:
            return func(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages(args)}
        if kwargs:
            given.update(id(storage) for storage in _storages(tuple(kwargs.values())))
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in given:
                self._add(storage)
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._sizes:
            return

        def gone(_, key=key):
            del self._references[key]
            self.now -= self._sizes.pop(key)

        self._references[key] = weakref.ref(storage, gone)
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()

    def _update(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._sizes:
            self.now += storage.nbytes() - self._sizes[key]
            self._sizes[key] = storage.nbytes()
            self.peak = max(self.peak, self.now)


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    """Yield the storages under the tensors of nested lists, those that DTensors wrap among them."""
    if isinstance(tree, torch.Tensor):
        if is_traceable_wrapper_subclass(tree):
            names, _ = tree.__tensor_flatten__()
            for name in names:
                yield from _storages(getattr(tree, name))
        else:
            yield tree.untyped_storage()
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _storages(part)
