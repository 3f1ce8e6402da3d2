"""Documents that are token ids already (genomes, audio codes, text tokenized elsewhere), as arrays.

An .ids file has one document per line: integers between spaces, tabs or commas, with or without one
pair of brackets around them. JSON has a list of integers (or a text of them) under the key, a table
a column of either; any other file is one document, a text of integers.
"""

from typing import NamedTuple

import numba
import numpy as np

from data.tokenizers.tokenizer import NullTokenizer
from tools.preprocessing.json_documents import NAMES
from tools.preprocessing.text_files import (
    Piece,
    decode,
    name_place,
    read_lines,
    read_piece,
    read_records,
)

ITEM_NAMES = {**NAMES, float: "a number that is no 64-bit integer"}
"""Python types -> what an item of a list is called in messages."""


class IdDocuments(NamedTuple):
    """Holds the documents of a piece as arrays."""

    ids: np.ndarray
    """int64 [tokens]."""
    lengths: np.ndarray
    """Length of each document, int64 [documents]."""
    bad: int
    """Lines, rows or texts that are no list of ids, left out."""


def read_ids(piece: Piece, key: str, tokenizer: NullTokenizer, *, skip_bad: bool) -> IdDocuments:
    """Read the documents of a piece.

    Args:
        skip_bad: count what cannot be read instead of raising.

    Raises:
        ValueError: names file and line of what is not a list of integers in [0, vocab_size).
    """
    if piece.is_ids:
        data = read_piece(piece)
        ids, lengths = _parse_lines(np.frombuffer(data, dtype=np.uint8), tokenizer.vocab_size)
        good = lengths >= 0
        if not good.all() and not skip_bad:
            _explain_bad_line(piece, tokenizer)
        return IdDocuments(ids, lengths[good], int((~good).sum()))
    # Any other file: a document at a time.
    line_key = key if piece.is_json else None
    arrays = []
    bad = 0
    for offset, data in read_records(piece):
        try:
            arrays.append(_ids_of(decode(data, line_key, lists=True), tokenizer))
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{name_place(piece, offset)}: {error}") from None
            bad += 1
    ids = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    return IdDocuments(ids, lengths, bad)


def _ids_of(value: str | list | np.ndarray, tokenizer: NullTokenizer) -> np.ndarray:
    """Check the ids of one document -> them as int64; ValueError where one is out of range."""
    if isinstance(value, str):
        data = np.frombuffer(value.replace("\n", " ").encode("utf-8", "replace"), dtype=np.uint8)
        ids, lengths = _parse_lines(data, tokenizer.vocab_size, lists=False)
        # What the parser does not take (a sign, other scripts' digits, an error), the tokenizer
        # reads or refuses.
        return np.array(tokenizer.encode(value), dtype=np.int64) if (lengths < 0).any() else ids
    if len(value) == 0:
        return np.empty(0, dtype=np.int64)
    ids = value if isinstance(value, np.ndarray) else _array_of(value)
    low = int(ids.min())
    high = int(ids.max())
    if low < 0 or high >= tokenizer.vocab_size:
        raise _out_of_range(low if low < 0 else high, tokenizer)
    return ids.astype(np.int64, copy=False)


def _array_of(value: list) -> np.ndarray:
    """Convert a list of JSON or of a table to int64; ValueError if it holds anything else."""
    kinds = set(map(type, value))  # numpy would take true for 1
    if kinds != {int}:
        wrong = sorted(ITEM_NAMES[kind] for kind in kinds - {int})
        raise ValueError(
            f"must be a list of integers, and holds {' and '.join(wrong)}. Fix: the input, or "
            "--skip-bad-lines."
        )
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError:
        raise ValueError(
            f"token id {max(value, key=abs)}: is no id of any tokenizer. Fix: the input, or "
            "--skip-bad-lines."
        ) from None


def _out_of_range(wrong: int, tokenizer: NullTokenizer) -> ValueError:
    """Say that an id is not in the vocabulary."""
    return ValueError(
        f"token id {wrong}: must be in [0, vocab_size = {tokenizer.vocab_size}). Fix: the input, "
        "or a larger --vocab-size."
    )


def _explain_bad_line(piece: Piece, tokenizer: NullTokenizer) -> None:
    """Raise ValueError for the first line that is not a list of ids."""
    for offset, line in read_lines(piece):
        _, lengths = _parse_lines(np.frombuffer(line, dtype=np.uint8), tokenizer.vocab_size)
        if (lengths >= 0).all():
            continue
        problem = (
            "must be integers between spaces or single commas, in one pair of brackets or none. "
            "Fix: the input, or --skip-bad-lines."
        )
        text = line.decode("utf-8", "replace").strip()
        inner = text.removeprefix("[").removesuffix("]")
        if "[" in inner or "]" in inner:
            problem = (
                "must be a list of integers, not of lists. Fix: the input, or --skip-bad-lines."
            )
        try:
            tokenizer.encode(inner.translate({ord(letter): " " for letter in "[],"}))
        except ValueError as error:
            problem = str(error)
        raise ValueError(f"{name_place(piece, offset)}: {problem}")
    raise AssertionError("the parser found a bad line before")


@numba.njit(nogil=True, cache=True)
def _parse_lines(data, vocab_size, lists=True):
    """Parse lines of ids -> (ids, length of each line that is not blank, -1 where it is bad).

    An id is an integer in [0, vocab_size). With `lists`, commas may stand between two ids, and a
    pair of brackets around all of a line.
    """
    ids = np.empty(len(data) // 2 + 1, dtype=np.int64)
    lengths = np.empty(len(data) + 1, dtype=np.int64)
    count = 0
    lines = 0
    begin = 0  # where the ids of this line begin
    value = -1  # of the number that is being read; -1 outside of one
    # What was seen in this line.
    bad = opened = closed = comma = False
    blank = True
    for i in range(len(data) + 1):
        byte = data[i] if i < len(data) else np.uint8(10)
        # A digit.
        if 48 <= byte <= 57:
            value = max(value, 0) * 10 + byte - 48
            bad = bad or closed or value >= vocab_size
            blank = False
            value = min(value, vocab_size)  # no overflow
            comma = False
            continue
        # Anything else ends a number.
        if value >= 0:
            ids[count] = value
            count += 1
            value = -1
        # The end of a line.
        if byte == 10:
            if not blank:
                bad = bad or comma or opened != closed
                if bad:
                    count = begin
                lengths[lines] = -1 if bad else count - begin
                lines += 1
            begin = count
            bad = opened = closed = comma = False
            blank = True
        elif byte == 32 or byte == 9 or byte == 13:
            pass
        elif lists and byte == 44:  # a comma, after an id
            bad = bad or comma or closed or count == begin
            blank = False
            comma = True
        elif lists and byte == 91:  # an opening bracket, before all else
            bad = bad or not blank
            blank = False
            opened = True
        elif lists and byte == 93:  # a closing one, after all else
            bad = bad or closed or comma or not opened
            blank = False
            closed = True
        else:
            bad = True
            blank = False
    return ids[:count].copy(), lengths[:lines].copy()
