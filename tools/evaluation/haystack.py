"""What needles are hidden in: repeated sentences, a text, or sentences that look like needles.

A haystack is cut into units, as many of which are taken as a length has room for. A piece that is
hidden in it has a depth, the share of the units that stands before it, whatever their number is.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from tools.evaluation.ruler_texts import NOISE

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")
_UNIT = re.compile(r" [^ ]{1,16}|[^ ]{1,16}")
"""A word with the space before it; of a long one, or of a script without spaces, some letters."""
MOST_WORDS = 200
"""Words of a sentence on average; a text with longer ones has none, like code or a list."""


class Hidden(NamedTuple):
    """A sentence to hide, and where."""

    depth: float
    """Share of the haystack's units that stand before it, in [0, 1]."""
    text: str


class Haystack(Protocol):
    """Gives the text of any number of units with pieces hidden among them."""

    def write(self, units: int, hidden: Sequence[Hidden]) -> str: ...


class Lines:
    """A haystack of lines: those that `make` gives by number, as many as there are units."""

    def __init__(self, make: Callable[[int], str]):
        self.make = make

    def write(self, units: int, hidden: Sequence[Hidden]) -> str:
        lines = [self.make(number) for number in range(units)]
        return "\n".join(_hide(lines, hidden))


def noise() -> Lines:
    """Make the haystack of repeated sentences."""
    return Lines(lambda number: NOISE[number % len(NOISE)])


class Words:
    """A haystack of a text's words, from its beginning, again and again where it is short.

    Pieces are hidden between its sentences, in a text without any between its words.
    """

    def __init__(self, text: str):
        self.units = _UNIT.findall(" " + " ".join(text.split()))

    def write(self, units: int, hidden: Sequence[Hidden]) -> str:
        rounds = -(-units // len(self.units))
        text = "".join((self.units * rounds)[:units]).strip()
        pieces = _SENTENCE_END.split(text)
        if len(pieces) * MOST_WORDS < units:
            pieces = text.split(" ")
        return " ".join(_hide(pieces, hidden))


def _hide(pieces: list[str], hidden: Sequence[Hidden]) -> list[str]:
    """Put the hidden texts between the pieces; those of one place keep their order."""
    found: list[str] = []
    begin = 0
    for depth, text in sorted(hidden, key=lambda one: one.depth):
        place = round(depth * len(pieces))
        found += pieces[begin:place]
        found.append(text)
        begin = place
    return found + pieces[begin:]
