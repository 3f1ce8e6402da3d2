"""Work that goes on in a thread beside training, one piece at a time."""

import threading
import time
from collections.abc import Callable


class Background:
    """Runs one piece of work in a thread, and hands its error on to whoever waits for it."""

    def __init__(self, name: str):
        self.name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Start `work`; the one before must have been waited for."""
        assert self._thread is None, f"{self.name} is still at work"
        # A daemon: a process that fails does not stay for it.
        self._thread = threading.Thread(target=self._run, args=(work,), name=self.name, daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error

    @property
    def is_at_work(self) -> bool:
        """Is there work that has not ended yet?"""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Has the last work ended with an error that nobody has been told of?"""
        return self._error is not None

    def wait(self, timeout: float | None = None) -> float:
        """Wait for the work to end -> seconds waited.

        Args:
            timeout: seconds after which it is left to itself.

        Raises:
            BaseException: what ended the work, once.
        """
        began = time.perf_counter()
        if self._thread is not None:
            self._thread.join(timeout)
            if not self._thread.is_alive():
                self._thread = None
        error = self._error
        self._error = None
        if error is not None:
            raise error
        return time.perf_counter() - began
