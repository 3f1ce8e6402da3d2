"""Say what becomes of a launch: to the user a line, to train.sh a word in the outcome file."""

import os
import sys
from pathlib import Path


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


def forget_outcome() -> None:
    """Take back what a process has said: train.sh is to judge by the exit code."""
    path = _outcome_path()
    if path is not None:
        path.unlink(missing_ok=True)


def _outcome_path() -> Path | None:
    path = os.environ.get("ITHACA_OUTCOME_FILE")
    return Path(path) if path else None
