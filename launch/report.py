"""Say what becomes of a launch: to the user a line, to train.sh a word in the outcome file."""

import os
import sys
from pathlib import Path

UNSTARTED = "unstarted"
"""Outcome of processes that a signal ended before their first step, whoever sent it."""


class NotMet(Exception):
    """A node did not come in time; another try may find it."""


def say(text: str) -> None:
    print(f"train.sh: {text}", file=sys.stderr, flush=True)


def give_up(error: Exception) -> int:
    """Say why nothing was started, and tell train.sh -> the exit code."""
    may_come = isinstance(error, NotMet)
    say(f"error: {error}")
    write_outcome("unmet" if may_come else "refused")
    return 1 if may_come else 2


def write_outcome(outcome: str) -> None:
    """Tell train.sh how the launch ended."""
    path = _outcome_path()
    if path is not None:
        path.write_text(outcome)


def read_outcome() -> str | None:
    """Return how a process of this launch has said that it ended."""
    path = _outcome_path()
    return path.read_text() if path is not None and path.exists() else None


def read_outcome_of_failure() -> str | None:
    """Return how a process has said that it ended, where another one has failed.

    Processes before their first step that a signal ended because of that failure were not asked to
    stop: their word is taken back.
    """
    path = _outcome_path()
    if path is not None and read_outcome() == UNSTARTED:
        path.unlink()
    return read_outcome()


def _outcome_path() -> Path | None:
    path = os.environ.get("ITHACA_OUTCOME_FILE")
    return Path(path) if path else None
