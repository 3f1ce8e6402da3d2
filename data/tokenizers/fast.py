"""Many texts encoded at once with gigatoken, to the ids of the tokenizer that it replaces.

gigatoken reads tokenizer.json and has its own code for each kind of step in it. Which texts it gets
is decided from the tokenizer's definition (data/tokenizers/rules.py); the tokenizer itself encodes
the others, and one document in CHECK_EVERY of the fast ones again, so that a difference that the
rules do not know stops the run.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import xxhash

from data.tokenizers.rules import FastRules
from data.tokenizers.tokenizer import SAMPLE_TEXT, Tokenizer

# gigatoken remembers every word that it met and forgets none: up to 6 bytes per letter of random
# text. It begins again once the process has grown by CACHE_BYTES and CACHE_LETTERS were encoded; to
# learn the common words again costs less than a fifth of the time that this many letters take.
CACHE_BYTES = 1 << 30
"""Growth of the process, in bytes, before gigatoken's cache is emptied."""
CACHE_LETTERS = 256 << 20
"""Letters that are encoded at least between two emptyings."""

CHECK_EVERY = 2048
"""Documents of which one is encoded both ways. The tokenizer is some 40 times slower, so that this
costs some 5 %."""
CHECKED_LETTERS = 64 << 10
"""Letters of a document that are encoded both ways, from its beginning: long ones take minutes."""


class TextError(ValueError):
    """Says that text number `index` of a batch has no ids, or wrong ones."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


class FastEncoder:
    """Encodes batches with gigatoken on the calling thread, without the GIL; thread-safe."""

    def __init__(self, definition: str, vocab_size: int):
        """Read the contents of a tokenizer.json, as FastRules.definition gives it.

        Raises:
            ValueError: says why gigatoken cannot stand for this tokenizer.
        """
        try:
            import gigatoken
        except ImportError as error:
            raise ValueError(f"gigatoken cannot be imported ({error})") from None
        self.name = f"gigatoken {version('gigatoken')}"
        self._make = partial(gigatoken.Tokenizer.from_json, definition)
        self._lock = threading.Lock()
        self._letters = 0
        self._memory = resident_bytes()
        try:
            self._tokenizer = self._make()
        except Exception as error:  # it raises many kinds for a step that it does not know
            raise ValueError(f"{self.name} does not read this tokenizer ({error})") from None
        if self._tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"{self.name} counts {self._tokenizer.vocab_size} ids, the tokenizer {vocab_size}"
            )

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts -> uint32 [tokens], all their ids, and int64 [texts], how many each has."""
        if not texts:
            return np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64)
        # Its result is an Awkward Array: a list of offsets over one list of ids.
        rows: Any = self._tokenizer.encode_batch(list(texts), parallel=False).layout
        self._bound_memory(sum(map(len, texts)))
        offsets = np.asarray(rows.offsets.data)
        return np.asarray(rows.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    def _bound_memory(self, letters: int) -> None:
        """Begin again with an empty cache when it is time to; calls under way keep the old one."""
        with self._lock:
            self._letters += letters
            if self._letters < CACHE_LETTERS:
                return
            if resident_bytes() - self._memory >= CACHE_BYTES:
                self._tokenizer = self._make()
                self._letters = 0


def resident_bytes() -> int:
    """Read the memory of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def encode_one_by_one(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode texts by the tokenizer itself -> int64 ids, and how many each text has.

    Raises:
        TextError: a text has no ids.
    """
    rows = []
    for index, text in enumerate(texts):
        try:
            rows.append(np.array(tokenizer.encode(text), dtype=np.int64))
        except ValueError as error:
            raise TextError(str(error), index) from None
    ids = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
    return ids, np.array([len(row) for row in rows], dtype=np.int64)


@dataclass
class Encoded:
    """What texts became, and how."""

    ids: np.ndarray
    """Ids of all texts in order."""
    lengths: np.ndarray
    """int64 [texts]: how many ids each has."""
    slow: int = 0
    """Texts that the tokenizer itself encoded."""
    checked: int = 0
    """Texts that were encoded both ways."""


class CheckedEncoder:
    """Gives a tokenizer's own ids, from gigatoken where the rules allow it; thread-safe."""

    def __init__(self, tokenizer: Tokenizer, rules: FastRules):
        """Build the encoder. ValueError: says why gigatoken cannot stand for this tokenizer."""
        self.tokenizer = tokenizer
        self.rules = rules
        self.fast = FastEncoder(rules.definition, tokenizer.vocab_size)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Encode the texts.

        Raises:
            TextError: a text has no ids.
        """
        slow = self.rules.slow(texts)
        if not slow:
            return Encoded(*self.fast.encode_batch(texts))
        # Each text by the one that may, then all in the order in which they came.
        others = set(slow)
        fast = [index for index in range(len(texts)) if index not in others]
        fast_ids, fast_lengths = self.fast.encode_batch([texts[index] for index in fast])
        try:
            slow_ids, slow_lengths = encode_one_by_one(
                self.tokenizer, [texts[index] for index in slow]
            )
        except TextError as error:
            raise TextError(str(error), slow[error.index]) from None
        rows: list[np.ndarray] = [np.empty(0)] * len(texts)
        for indices, ids, lengths in (
            (fast, fast_ids, fast_lengths),
            (slow, slow_ids, slow_lengths),
        ):
            end = 0
            for index, length in zip(indices, lengths.tolist(), strict=True):
                rows[index] = ids[end : end + length].astype(np.int64, copy=False)
                end += length
        return Encoded(
            np.concatenate(rows), np.array([len(row) for row in rows], dtype=np.int64), len(slow)
        )

    def check(self, texts: Sequence[str], place: object) -> int:
        """Compare one text in CHECK_EVERY with the tokenizer's ids -> how many were compared.

        Args:
            place: where the texts are in the input: which are taken depends on nothing else.

        Raises:
            TextError: the ids of a text differ.
        """
        # Every CHECK_EVERY-th text, from a place that a repeated run chooses again.
        first = xxhash.xxh3_64_intdigest(repr(place).encode()) % CHECK_EVERY
        chosen = range(first, len(texts), CHECK_EVERY)
        beginnings = [texts[index][:CHECKED_LETTERS] for index in chosen]
        # Texts that the tokenizer encodes anyway have nothing to be compared with.
        slow = set(self.rules.slow(beginnings))
        fast = [number for number in range(len(beginnings)) if number not in slow]
        different = first_difference(self.tokenizer, self, [beginnings[number] for number in fast])
        if different is not None:
            text = beginnings[fast[different]]
            ours = self.fast.encode_batch([text])[0].tolist()
            theirs = self.tokenizer.encode(text)
            raise TextError(
                f"{self.fast.name} gives other ids than the tokenizer: "
                f"{_show_difference(ours, theirs)}. Fix: --fast-tokenizer off.",
                chosen[fast[different]],
            )
        return len(fast)


def _show_difference(ours: list[int], theirs: list[int]) -> str:
    """Show the ids of both from shortly before the first that differs."""
    pairs = zip(ours, theirs, strict=False)
    first = next(
        (i for i, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs))
    )
    begin = max(0, first - 2)
    return f"from token {begin} on {ours[begin : first + 4]}, not {theirs[begin : first + 4]}"


def first_difference(
    tokenizer: Tokenizer, encoder: CheckedEncoder, texts: Sequence[str]
) -> int | None:
    """Find the first text that the two encode to different ids; None where there is none."""
    encoded = encoder.encode_batch(texts)
    end = 0
    for index, (text, length) in enumerate(zip(texts, encoded.lengths.tolist(), strict=True)):
        if tokenizer.encode(text) != encoded.ids[end : end + length].tolist():
            return index
        end += length
    return None


def probe_texts(tokenizer: Tokenizer) -> list[str]:
    """List texts that a sample of a corpus may lack: rare letters, special tokens."""
    words = tokenizer.special_texts()
    return [
        SAMPLE_TEXT,
        "",
        " ",
        "\n",
        "\ufeffx\u0000\u200d",
        *(f"a {word} b{word}{word}  c" for word in words),
    ]
