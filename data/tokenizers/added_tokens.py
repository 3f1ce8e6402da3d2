"""Which added tokens of a tokenizer.json gigatoken finds in a text as the tokenizer does."""

import unicodedata
from collections.abc import Sequence
from typing import Any


class AddedTokens:
    """Added tokens that gigatoken finds as the tokenizer does, and words that make a text slow.

    Attributes:
        fast: added tokens that gigatoken may have.
        slow: words; texts that hold one of them are slow.
    """

    def __init__(self, tokens: list[dict[str, Any]], *, keep_special: bool, nfc: bool, alone: bool):
        """
        Args:
            nfc: the tokenizer normalizes with NFC, and fast texts are in NFC.
            alone: what is beside an added token is changed, as by a prefix.
        """
        # Active ones are tokens where they are written; passive ones are text there.
        active = [
            token for token in tokens if token["content"] and (keep_special or not token["special"])
        ]
        passive = [token["content"] for token in tokens if token["special"] and not keep_special]
        raw = [token["content"] for token in active if not token["normalized"]]
        normalized = [token["content"] for token in active if token["normalized"]]
        # The tokenizer takes out raw ones first; what is text now still hides what it overlaps.
        mixed = _overlapping(raw, normalized) | _overlapping(passive, raw + normalized)
        slow = list(mixed)
        # Fast are those without flags, unchanged by normalization, with nothing that overlaps.
        self.fast: list[dict[str, Any]] = []
        for token in active:
            content = token["content"]
            composed = unicodedata.normalize("NFC", content) if nfc else content
            plain = not (token["single_word"] or token["lstrip"] or token["rstrip"])
            if plain and not alone and content == composed and content not in mixed:
                self.fast.append(token)
            else:
                slow += [content, composed]
        self.slow = tuple(dict.fromkeys(slow))


def _overlapping(some: Sequence[str], others: Sequence[str]) -> set[str]:
    """Find those of two lists of words of which one may cover a part of another in a text."""
    return _touching(some, others) | _touching(others, some)


def _touching(words: Sequence[str], others: Sequence[str]) -> set[str]:
    """Find those of `words` that may cover a part of one of `others`.

    By sets of parts of words: a vocabulary may have thousands of added tokens, too many for pairs.
    """
    whole = set(others)
    beginnings = {part for word in whole for part in _beginnings(word)}
    endings = {part for word in whole for part in _endings(word)}
    insides = {part for word in whole for end in _endings(word) for part in _beginnings(end)}
    return {
        word
        for word in words
        if word in insides
        or not beginnings.isdisjoint(_endings(word))
        or not endings.isdisjoint(_beginnings(word))
        or any(not whole.isdisjoint(_beginnings(end)) for end in _endings(word))
    }


def _beginnings(word: str) -> list[str]:
    """List the first letters of a word, one to all."""
    return [word[:length] for length in range(1, len(word) + 1)]


def _endings(word: str) -> list[str]:
    """List the last letters of a word, all to one."""
    return [word[start:] for start in range(len(word))]
