"""Collecting what is wrong, so that a user reads all problems at once."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def attempt(problems: list[str], make: Callable[[], T]) -> T | None:
    """Return what `make` makes; or None, with each line of its ValueError added to `problems`."""
    try:
        return make()
    except ValueError as error:
        problems += str(error).splitlines()
        return None
