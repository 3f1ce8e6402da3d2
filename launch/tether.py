"""Tie a process to its parent, so that nothing goes on training once its launcher is gone.

The kernel kills the process when its parent ends, however that ends, also by a SIGKILL that no
handler sees.
"""

import ctypes
import os
import signal
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1
"""Linux's number for "the signal that this process gets when its parent ends"."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""The signals that ask a run to save and stop: pretrain/processes/stop.py handles the same ones."""


def end_with_parent(parent: int) -> bool:
    """Have the kernel kill this process when its parent ends; end now if it has ended already.

    The kernel watches the thread that started this process; that thread must live as long as its
    own process does.

    Returns:
        False if `parent` runs but is not the parent: another program is in between, and the kernel
        watches that one.
    """
    # use_errno keeps the error of the call where ctypes.get_errno finds it.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if os.getppid() == parent:
        return True
    if not _runs(parent):  # it ended before the kernel was asked
        text = f"train.sh: error: process {parent}, the launcher, is gone"
        print(text, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return False


def _runs(pid: int) -> bool:
    """Tell whether a process exists and has not ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state = file.read().rsplit(")", 1)[1].split()[0]  # a name may hold spaces and ")"
    except OSError:
        return False
    return state not in "ZX"  # a zombie, or dead


class StopAsked:
    """Notes the first stop signal of this process."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal; None while there was none."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
