"""Values, counts and errors as they stand in messages of one line."""

from typing import Any

LONGEST_VALUE = 80
"""Characters of a value in a message; the rest is cut."""
LONGEST_ERROR = 300
"""Characters of somebody else's error in a message; the rest is cut."""


def one_line(error: Exception) -> str:
    """Return the message of an exception of somebody else's code, without its line ends."""
    return _cut(str(error), LONGEST_ERROR) or type(error).__name__


def short(value: Any) -> str:
    """Return a value as text of one line."""
    return _cut(str(value), LONGEST_VALUE)


def _cut(text: str, limit: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else f"{flat[:limit]}..."


def count_of(number: int, noun: str) -> str:
    """Spell a count: 1, "file" -> "1 file"; 2000, "file" -> "2,000 files"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
