"""Finding how much haystack a text of a given number of tokens has room for.

Tokens are counted on the whole text: ids of parts do not add up to those of the whole. From the
tokens of two sizes the next one is guessed, so that a few encodings are enough at any length.
"""

from collections.abc import Callable
from typing import NamedTuple

FIRST_UNITS = 64
"""Units of the first guess."""


class Filled(NamedTuple):
    """A text with some units of haystack, and its ids."""

    units: int
    text: str
    ids: list[int]


def fill(write: Callable[[int], str], encode: Callable[[str], list[int]], room: int) -> Filled:
    """Find the most units whose text has at most `room` tokens.

    Args:
        write: gives the text with some number of units.

    Returns:
        That text; the one without any unit where not even it has room.
    """

    def measure(units: int) -> Filled:
        text = write(units)
        return Filled(units, text, encode(text))

    empty = measure(0)
    if len(empty.ids) > room:
        return empty
    # A size that fits and one that is too large close in on each other.
    fits = empty
    too_large: Filled | None = None
    units = FIRST_UNITS
    while True:
        found = measure(units)
        if len(found.ids) <= room:
            fits = found
        else:
            too_large = found
        if too_large is None:
            units = fits.units + max(1, _units_between(empty, fits, room - len(fits.ids)) + 1)
            continue
        if too_large.units - fits.units == 1:
            return fits
        units = fits.units + _units_between(fits, too_large, room - len(fits.ids))
        units = min(max(units, fits.units + 1), too_large.units - 1)


def _units_between(low: Filled, high: Filled, tokens: int) -> int:
    """Say how many units `tokens` tokens are, at the rate between two sizes."""
    added = max(1, len(high.ids) - len(low.ids))
    return tokens * (high.units - low.units) // added
