"""gigatoken behind a tokenizer of ours: many texts at once, with the ids of the tokenizer that it stands for.

It reads tokenizer.json and has its own code for each kind of step in it, so it is used only where it was compared
with the reference (`first_difference`) on texts of the corpus at hand.
"""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from data.tokenizer import SAMPLE_TEXT, Tokenizer


class TextError(ValueError):
    """Text number `index` of a batch has no ids."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


class FastEncoder:
    """Encodes batches with gigatoken on the calling thread; the GIL is not needed meanwhile."""

    def __init__(self, definition: str, vocab_size: int):
        """Read the contents of a tokenizer.json, as Tokenizer.to_tokenizer_json gives it.

        Raises:
            ValueError: says why gigatoken cannot stand for this tokenizer.
        """
        try:
            import gigatoken
        except ImportError as error:
            raise ValueError(f"gigatoken cannot be imported ({error})") from None
        self.name = f"gigatoken {version('gigatoken')}"
        try:
            self._tokenizer = gigatoken.Tokenizer.from_json(definition)
        except Exception as error:  # it raises many kinds for a step that it does not know
            raise ValueError(f"{self.name} does not read this tokenizer ({error})") from None
        if self._tokenizer.vocab_size > vocab_size:
            raise ValueError(f"{self.name} counts {self._tokenizer.vocab_size} ids, the tokenizer {vocab_size}")

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """uint32 [tokens] ids of all texts one after another, and int64 [texts] how many each has."""
        if not texts:
            return np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64)
        rows = self._tokenizer.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(rows.offsets.data)
        return np.asarray(rows.content.data)[offsets[0]:offsets[-1]], np.diff(offsets)


def encode_one_by_one(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The reference of `FastEncoder.encode_batch`: int64 ids, and how many each text has.

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


def first_difference(tokenizer: Tokenizer, fast: FastEncoder, texts: Sequence[str]) -> int | None:
    """Number of the first text that the two encode to different ids; None where there is none."""
    theirs, lengths = fast.encode_batch(texts)
    end = 0
    for index, (text, length) in enumerate(zip(texts, lengths.tolist(), strict=True)):
        if tokenizer.encode(text) != theirs[end:end + length].tolist():
            return index
        end += length
    return None


def probe_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts that any corpus may hold though a sample does not: rare letters, special tokens written in the text."""
    words = tokenizer.special_texts()
    return [SAMPLE_TEXT, "", " ", "\n", "\ufeffx\u0000\u200d", *(f"a {word} b{word}{word}  c" for word in words)]
