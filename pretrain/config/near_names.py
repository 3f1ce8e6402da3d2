"""The name that was meant: one rule for flags and keys of the trainer and of the tools."""

import difflib
from collections.abc import Iterable

LEAST_LIKENESS = 0.84
"""difflib's ratio of a near miss: below it, a suggestion may do harm."""


def nearest_name(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that is spelled most like the word; None where none is near."""
    names = list(known)
    # Two letters in the wrong order are a slip even in a word too short for the ratio.
    swapped = [name for name in names if _has_two_swapped(word, name)]
    near = swapped or difflib.get_close_matches(word, names, 1, LEAST_LIKENESS)
    return near[0] if near else None


def _has_two_swapped(word: str, name: str) -> bool:
    """Return whether the word is the name with two neighbouring letters exchanged."""
    if len(word) != len(name):
        return False
    places = [place for place, letter in enumerate(word) if letter != name[place]]
    if len(places) != 2 or places[1] != places[0] + 1:
        return False
    first, second = places
    return word[first] == name[second] and word[second] == name[first]
