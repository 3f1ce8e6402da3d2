"""Files with columns, one of which holds the documents: Parquet, .csv and .tsv.

Read from their beginning, a block at a time, so that memory does not grow with the file. pyarrow is
imported by what needs it.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.preprocessing.input_kinds import DELIMITERS, ending_of, is_parquet, strip_byte_order_mark
from tools.preprocessing.streams import read_line_blocks

PARQUET_ROWS = 256
"""Rows decoded at a time."""
CSV_BLOCK = 1 << 20
"""Bytes of lines read at a time."""
LONGEST_FIELD = 2**31 - 1
"""Characters of a field in .csv; Python's own limit of 131,072 is below a long document."""


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value that is not a document."""

    reason: str
    """What it is instead, and the fix."""

    def __len__(self) -> int:
        return len(self.reason)


Value = str | np.ndarray | list | Unreadable | None
"""A document as a table holds it: a text, or a list of integers; None is a null."""


def read_table(path: str, column: str, block_bytes: int) -> Iterator[tuple[list[Value], int]]:
    """Read a column as (its next values, about `block_bytes` of them; bytes of the file so far).

    Raises:
        ValueError: the file is damaged, has no such column, or the column holds something else.
    """
    if is_parquet(path):
        return read_parquet(path, column, block_bytes)
    return read_csv(path, column, block_bytes)


def read_parquet(path: str, column: str, block_bytes: int) -> Iterator[tuple[list[Value], int]]:
    """Read a column of a Parquet file, as `read_table` does."""
    import pyarrow
    from pyarrow import parquet

    size = Path(path).stat().st_size
    try:
        # A small buffer and no pre-buffering: pages are read as they are needed, not a whole row
        # group.
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            _check_column(path, column, file.schema_arrow.names, "--json-keys")
            values: list[Value] = []
            held = 0
            rows = 0
            # The share of rows stands for bytes of the file.
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column], use_threads=False):
                values += _column_values(path, column, batch.column(0))
                held += batch.nbytes
                rows += len(batch)
                if held >= block_bytes:
                    yield values, size * rows // file.metadata.num_rows
                    values = []
                    held = 0
            if values:
                yield values, size
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: damaged, or not Parquet ({str(error).splitlines()[0]}). Fix: copy or "
            "download it again."
        ) from None


def _check_column(path: str, column: str, names: list[str], fix: str) -> None:
    """Raise ValueError unless a table has one column of this name."""
    if names.count(column) == 1:
        return
    found = ", ".join(names).encode("utf-8", "replace").decode()
    problem = "no column" if column not in names else "more than one column"
    raise ValueError(
        f"{path}: {problem} {column!r} (found: {found}). Fix: {fix}, or --extensions without the "
        "ending of such files."
    )


def _column_values(path: str, column: str, array: Any) -> list[Value]:
    """Convert an array of pyarrow to documents; ValueError where the column holds anything else."""
    from pyarrow import types

    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return _texts(array)
    is_list = (
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )
    # Lists of token ids.
    if is_list and types.is_integer(kind.value_type):
        return _lists(array)
    raise ValueError(
        f"{path}: column {column!r} holds {kind}: must be text, or lists of integers. Fix: "
        "--json-keys, or another file."
    )


def _texts(array: Any) -> list[Value]:
    """Decode the texts of a column; Parquet does not check that they are UTF-8."""
    import pyarrow

    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [_decode(value) for value in array.cast(pyarrow.large_binary()).to_pylist()]


def _decode(value: bytes | None) -> Value:
    """Decode one text, or say why it cannot be."""
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError as error:
        return Unreadable(
            f"not UTF-8 ({error.reason} at byte {error.start}). Fix: convert it, or "
            "--skip-bad-lines."
        )


def _lists(array: Any) -> list[Value]:
    """Convert a column of lists to arrays, or to lists where that would not be right."""
    from pyarrow import types

    plain = types.is_list(array.type) or types.is_large_list(array.type)
    flat = array.flatten() if plain else None
    if flat is None or flat.null_count:
        # Slower, but right for views, fixed sizes and lists with nulls in them.
        return array.to_pylist()
    # All numbers as one array, cut by the lengths of the lists.
    numbers = flat.to_numpy(zero_copy_only=False)
    lengths = [length or 0 for length in array.value_lengths().to_pylist()]
    parts = np.split(numbers, np.cumsum(lengths)[:-1])
    valid = array.is_valid().to_pylist()
    return [part if good else None for part, good in zip(parts, valid, strict=True)]


class _Lines:
    """Gives csv.reader the lines of a file, with bytes that are not UTF-8 as half surrogates."""

    def __init__(self, path: str):
        self._path = path
        self.read = 0
        """Bytes of the file so far."""
        self.at_end = False
        """All lines were given."""

    def __iter__(self) -> Iterator[str]:
        for block, read in read_line_blocks(self._path, CSV_BLOCK):
            data = block if self.read else strip_byte_order_mark(block)
            self.read = read
            # Only "\n" ends a line here, as csv.reader wants it.
            yield from io.StringIO(data.decode("utf-8", "surrogateescape"), newline="\n")
        self.at_end = True


def read_csv(path: str, column: str, block_bytes: int) -> Iterator[tuple[list[Value], int]]:
    """Read a column of a .csv or .tsv file, whose first line has names, as `read_table` does."""
    csv.field_size_limit(LONGEST_FIELD)
    lines = _Lines(path)
    # strict: a quote in the wrong place is an error, not a guess.
    reader = csv.reader(lines, delimiter=DELIMITERS[ending_of(path)], strict=True)
    try:
        names = next(reader, None)
    except csv.Error as error:
        raise ValueError(
            f"{path}: its first line is no line of names ({error}). Fix: the file."
        ) from None
    if names is None:
        return
    _check_column(path, column, names, "--json-keys, a first line that names the columns")
    values: list[Value] = []
    held = 0
    for value in _rows(path, reader, lines, names, column):
        values.append(value)
        held += 1 + len(value)
        if held >= block_bytes:
            yield values, lines.read
            values = []
            held = 0
    if values:
        yield values, lines.read


def _rows(
    path: str, reader: Iterator[list[str]], lines: _Lines, names: list[str], column: str
) -> Iterator[str | Unreadable]:
    """Give the value of each row that is not blank."""
    place = names.index(column)
    while True:
        try:
            row = next((row for row in reader if row), None)
        except csv.Error as error:
            if lines.at_end:
                # A quote that is never closed has swallowed all rows to the end, however many.
                raise ValueError(
                    f"{path}: ends inside a quoted field ({error}). "
                    "Fix: the quotes, or copy it again."
                ) from None
            yield Unreadable(f"not a row ({error}). Fix: its quotes, or --skip-bad-lines.")
            continue
        if row is None:
            return
        if len(row) == len(names):
            yield _checked_text(row[place])
        else:
            yield Unreadable(
                f"{len(row)} fields, but the first line names {len(names)}. Fix: quotes around a "
                "field that holds the delimiter, or --skip-bad-lines."
            )


def _checked_text(value: str) -> str | Unreadable:
    """Return a field, unless it holds bytes that are not UTF-8."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(value[error.start]) - 0xDC00
        return Unreadable(
            f"not UTF-8 (byte 0x{byte:02x} at character {error.start}). Fix: convert it, or "
            "--skip-bad-lines."
        )
    return value
