"""Finds rare words in many texts at little cost."""

import re
from collections.abc import Iterable, Sequence

MOST_PREFIXES = 32
"""Prefixes to look for; each costs a pass over the text, at some gigabytes per second."""
LONGEST_PREFIX = 16
"""Letters of a prefix at most."""


class TextSearch:
    """Finds which texts hold one of the words, and how often."""

    def __init__(self, words: Iterable[str]):
        self.words = tuple(dict.fromkeys(word for word in words if word))
        self._prefixes = _prefixes(self.words)
        # Longest first: re takes the first alternative that fits.
        longest_first = sorted(self.words, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def count(self, texts: Sequence[str]) -> dict[int, int]:
        """Count the words in each text: number of a text -> words, for texts that hold any."""
        if not self.words:
            return {}
        # One text instead of hundreds: most batches hold none, and are done after this.
        together = "\0".join(texts)
        prefixes = [prefix for prefix in self._prefixes if prefix in together]
        if not prefixes:
            return {}
        found = {}
        for index, text in enumerate(texts):
            if any(prefix in text for prefix in prefixes):
                number = len(self._pattern.findall(text))
                if number:
                    found[index] = number
        return found

    def first(self, text: str) -> str:
        """Find the first word in a text that holds one."""
        match = self._pattern.search(text)
        assert match is not None, f"none of the words is in {text[:40]!r}"
        return match.group()


def _prefixes(words: Sequence[str]) -> list[str]:
    """Choose beginnings, one of which each word has: the longest that are MOST_PREFIXES at most.

    More only where the words begin with more than MOST_PREFIXES letters.
    """
    prefixes: set[str] = set()
    for length in range(LONGEST_PREFIX, 0, -1):
        prefixes = {word[:length] for word in words}
        if len(prefixes) <= MOST_PREFIXES:
            break
    if len(prefixes) > MOST_PREFIXES:
        return sorted(prefixes)
    # "<s" finds what "<start" would.
    return sorted(
        one for one in prefixes if not any(one != other and other in one for other in prefixes)
    )
