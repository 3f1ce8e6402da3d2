"""Threads that read files before their turn: decompression does not hold the interpreter, and files
are independent."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
ITEMS_AHEAD = 4
"""Per reader; with pieces of a task's size this bounds the memory."""


class _Reader(Generic[Item]):
    """An iterator that a thread runs, up to ITEMS_AHEAD items ahead."""

    def __init__(self, items: Iterable[Item]):
        self._queue: queue.Queue = queue.Queue(ITEMS_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self._thread.start()

    def _run(self, items: Iterable[Item]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    return
            self._put((None, None))
        except BaseException as error:  # raised where the items are wanted
            self._put((None, error))

    def _put(self, entry: tuple) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[Item]:
        while True:
            item, error = self._queue.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def read_ahead(
    sources: Iterable[tuple[int, Callable[[], Iterable[Item]], bool]], readers: int
) -> Iterator[tuple[int, Item]]:
    """(number of its source, item) of all sources, in order.

    Args:
        sources: (number, what gives its items, none of which is None; whether a thread shall run
            it).
        readers: sources whose turn is now or next, whose threads run.
    """
    waiting: deque = deque()
    sources = iter(sources)
    try:
        while True:
            while len(waiting) < readers and (source := next(sources, None)) is not None:
                number, items, threaded = source
                waiting.append((number, _Reader(items()) if threaded else items()))
            if not waiting:
                return
            number, items = waiting[0]
            for item in items:
                yield number, item
            waiting.popleft()
    finally:
        for _, items in waiting:
            if isinstance(items, _Reader):
                items.stop()
