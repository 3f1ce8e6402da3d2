"""Read files on threads before their turn.

Decompression runs without the interpreter's lock, and files are independent of each other.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
ITEMS_AHEAD = 4
"""Items that a thread reads before they are wanted; pieces of a task's size bound the memory."""


@dataclass(frozen=True)
class Producer(Generic[Item]):
    """Gives items in order, like the pieces of a file."""

    number: int
    items: Callable[[], Iterable[Item]]
    """Begins to give the items, none of which is None."""
    in_thread: bool
    """Whether a thread reads the items before their turn."""


class _ReadingThread(Generic[Item]):
    """Iterates over items that a thread reads, up to ITEMS_AHEAD items ahead."""

    def __init__(self, items: Iterable[Item]):
        self._queue: queue.Queue = queue.Queue(ITEMS_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self._thread.start()

    def _run(self, items: Iterable[Item]) -> None:
        """Fill the queue with (item, error); None for both at the end."""
        try:
            for item in items:
                if not self._put((item, None)):
                    return
            self._put((None, None))
        except BaseException as error:  # raised where the items are wanted
            self._put((None, error))

    def _put(self, entry: tuple) -> bool:
        """Wait for room in the queue -> False where nobody wants the items any more."""
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
        """End the thread; items that it has read are lost."""
        # A thread that waits for room sees this within 0.1 s.
        self._stopped.set()
        self._thread.join()


def read_ahead(producers: Iterable[Producer[Item]], readers: int) -> Iterator[tuple[int, Item]]:
    """Give (number of its producer, item) for all producers, in order.

    Args:
        readers: producers whose turn is now or next, whose threads run.
    """
    waiting: deque[tuple[int, Iterable[Item]]] = deque()
    producers = iter(producers)
    try:
        while True:
            # Start the threads of the next ones, then drain the first.
            while len(waiting) < readers and (producer := next(producers, None)) is not None:
                items = producer.items()
                ahead = _ReadingThread(items) if producer.in_thread else items
                waiting.append((producer.number, ahead))
            if not waiting:
                return
            number, items = waiting[0]
            for item in items:
                yield number, item
            waiting.popleft()
    finally:
        # The caller has stopped early: no thread may wait for room forever.
        for _, items in waiting:
            if isinstance(items, _ReadingThread):
                items.stop()
