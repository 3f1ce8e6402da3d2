"""Say how a launch ends: to the user in a line, to train.sh by a word in the outcome file.

train.sh names the file in the environment; without it nobody wants to know. The words are those of
launch/README.md, "How a run ends".
"""

import os
import sys
from pathlib import Path

UNSTARTED = "unstarted"
"""The outcome of processes that a signal ended before their first step."""


class NotMet(Exception):
    """Reports a node that did not come in time; another try may find it."""


def say(text: str) -> None:
    """Print a line for the user."""
    # The user started train.sh and need not know who speaks for it.
    print(f"train.sh: {text}", file=sys.stderr, flush=True)


def give_up(error: Exception) -> int:
    """Say why nothing was started, and tell train.sh -> the exit code."""
    for line in str(error).splitlines():
        say(f"error: {line}")
    if isinstance(error, NotMet):
        write_outcome("unmet")
        return 1
    write_outcome("refused")
    return 2


def write_outcome(outcome: str) -> None:
    """Tell train.sh how the launch ended."""
    path = _outcome_path()
    if path is not None:
        path.write_text(outcome)


def read_outcome() -> str | None:
    """Return the outcome that a process of this launch has written; None if none has."""
    path = _outcome_path()
    return path.read_text() if path is not None and path.exists() else None


def write_signature(signature: str) -> None:
    """Tell train.sh what failed, to be compared with the failure before."""
    path = _outcome_path()
    if path is not None and signature:
        path.with_name(f"{path.name}.error").write_text(signature)


def say_that_it_hears() -> None:
    """Tell train.sh that a signal no longer ends this process."""
    path = _outcome_path()
    if path is not None:
        path.with_name(f"{path.name}.hears").touch()


def _outcome_path() -> Path | None:
    path = os.environ.get("ITHACA_OUTCOME_FILE")
    return Path(path) if path else None
