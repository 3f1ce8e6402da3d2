"""Become the process that exports a checkpoint beside training (exports.py): PARENT WORD...

It gets the lowest priority and ends with its parent; then tools.export_hf takes its place.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Linux's number for "the signal that this process gets when its parent ends"."""
LOWEST_PRIORITY = 19
"""The niceness of a process that gets what others leave, of CPUs as of the disk."""


def main(parent: int, words: list[str]) -> None:
    """Set what the new program inherits, and run it in this process."""
    os.setpriority(os.PRIO_PROCESS, 0, LOWEST_PRIORITY)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(1)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "tools.export_hf", *words])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
