"""Tie a process to its parent, so that nothing goes on training once its launcher is gone.

As a program, run by its file, it replaces itself: `python tether.py PARENT COMMAND [ARGUMENTS]`
runs the command, which the kernel kills when the process PARENT ends. The kernel keeps that promise
over exec, and however the parent ends, also by a SIGKILL that no handler sees. Stop signals wait
until the command unblocks them: a trainer needs seconds to import torch before it can answer one.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Held back until pretrain/processes/stop.py, which names the same ones, handles them."""


def end_with_parent(parent: int) -> bool:
    """Have the kernel kill this process when its parent ends; end now if it has ended already.

    The kernel looks at the thread that started this one, which must live as long as its process.

    Returns:
        False if `parent` is not the parent, but runs: another program is in between, whose end is
        then this one's.
    """
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
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state = file.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # stays over exec
    os.execvp(sys.argv[2], sys.argv[2:])
