"""Stop signals: noticed at once, and followed by all ranks at the same point of the program.

Before the first step there is nothing to save, so that a signal ends the process at once, wherever
it is: reading an index, waiting for another node, loading a checkpoint. From then on a signal only
sets a flag, and ranks ask each other between microbatches, of training and of evaluations, after
each step and after each save whether anybody's is set. Nothing is cut off inside a microbatch
(under pipeline parallelism: inside a batch) or inside a save.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from parallel.collectives import all_reduce
from parallel.layout import Axis

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

CHECK_SECONDS = 0.4
"""Time between two questions that ranks ask each other: less would slow training down, more would
be seen too late."""


class Interrupted(Exception):
    """Somebody asked to stop; raised on all ranks alike, between two microbatches."""


class StopSignals:
    """The stop signals of this process: first they end it at once, then they are only noted."""

    def __init__(self) -> None:
        self.asked = False
        """Has a signal come?"""
        self._end_at_once: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._handlers: dict[int, Any] = {}

    def listen(self, before_end: Callable[[], None]) -> None:
        """Hear the signals from now on; until `defer` each ends the process with exit code 0.

        Args:
            before_end: what remains to be done then.
        """
        self._end_at_once = before_end
        # A handler in Python waits for the main thread, which may be deep in a collective or in a
        # loop in C. The interpreter writes the signal's number to this socket at once, and a thread
        # of its own reads it.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._sockets = reader, writer
        self._handle()
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(
            target=self._watch, args=(reader,), name="stop-signals", daemon=True
        ).start()
        let_signals_through()

    def defer(self) -> None:
        """Only note the signals from now on: the steps begin, and ranks follow them together."""
        self._handle()
        with self._lock:
            self._end_at_once = None

    def close(self) -> None:
        """Leave the signals to whoever had them before."""
        if self._sockets is not None:
            signal.set_wakeup_fd(-1)
            reader, writer = self._sockets
            writer.close()  # ends the thread, which closes the other end
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self) -> None:
        for number in SIGNALS:
            before = signal.signal(number, self._on_signal)
            self._handlers.setdefault(number, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def _watch(self, reader: socket.socket) -> None:
        """End the process as soon as a signal's number can be read, unless that was deferred."""
        with reader:
            while received := reader.recv(16):
                with self._lock:
                    if self._end_at_once is not None and set(received) & set(SIGNALS):
                        self._end_at_once()
                        os._exit(0)


def let_signals_through() -> None:
    """Receive the signals that launch/tether.py held back until this process could answer."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def defer_together(signals: StopSignals, world: Axis) -> bool:
    """Only note the signals from now on, on all ranks; collective.

    A signal that comes in between finds some ranks here, waiting for others which it ends at once:
    the wait then fails, and the signal says why.

    Returns:
        False where a rank was ended by a signal before.
    """
    signals.defer()
    try:
        all_reduce(torch.zeros(1, device="cpu"), world)
    except RuntimeError:
        if not signals.asked:
            raise
        return False
    return True


class StopRequest:
    """Whether any rank got a signal, as all ranks know it at the same point of the program."""

    def __init__(self, signals: StopSignals, world: Axis, device: torch.device):
        self.signals = signals
        self.world = world
        self.device = device
        self.is_agreed = False
        self.restart()

    def restart(self) -> None:
        """Ask at the next call again, since from here on microbatches take another time."""
        # Calls of `check` since ranks asked each other, and how many of them go without asking.
        self._calls = 0
        self._skipped = 0
        self._has_measured = False
        self._since = time.monotonic()

    def agreed(self) -> bool:
        """Ask all ranks now; collective. Once it is true it remains so."""
        if not self.is_agreed:
            self._ask()
        return self.is_agreed

    def check(self) -> None:
        """Ask all ranks if the last time is long enough ago; every rank calls it equally often.

        Raises:
            Interrupted: on all ranks.
        """
        if self.is_agreed:
            raise Interrupted
        self._calls += 1
        if self._calls <= self._skipped:
            return
        seconds = self._ask()
        if self.is_agreed:
            raise Interrupted
        # From the time of these calls follows how many may go without asking. The first interval
        # after a restart is not typical; then the number at most doubles each time.
        if self._has_measured:
            # The same on all ranks, since the seconds are those of the slowest.
            fitting = int(self._calls * CHECK_SECONDS / max(seconds, 1e-6))
            self._skipped = min(fitting, 2 * self._calls) - 1
        self._has_measured = True
        self._calls = 0

    def _ask(self) -> float:
        """Ask all ranks -> seconds since the last time, on the slowest of them."""
        values = [float(self.signals.asked), time.monotonic() - self._since]
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        asked, seconds = all_reduce(own, self.world, dist.ReduceOp.MAX).tolist()
        self._since = time.monotonic()
        self.is_agreed = asked > 0
        return seconds
