"""Text on disk: how files are cut into pieces of work, and what documents a piece holds.

A file of JSON has an object per line, each a document, or is an array of them; an .ids file has a
list of integers per line; Parquet, .csv and .tsv have a document per row. Any other file is one
document. All but Parquet may be compressed.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from tools.preprocessing.input_kinds import (
    IDS_EXTENSION,
    JSON_EXTENSIONS,
    ending_of,
    is_compressed,
    is_parquet,
    is_table,
    strip_byte_order_mark,
)
from tools.preprocessing.json_documents import is_whole_json, read_whole_json, text_of_line
from tools.preprocessing.streams import read_line_blocks, read_whole
from tools.preprocessing.tables import Unreadable, Value, read_table

NEWLINE = b"\n"
READ_BYTES = 256 << 10
"""Buffer of a reader: a call of the system costs as much as parsing a line."""


@dataclass(frozen=True)
class Piece:
    """Names bytes [start, end) of a file. A line belongs to the piece in which it begins."""

    path: str
    start: int
    end: int
    data: bytes | list | None = None
    """The lines (bytes), or the values of a table or of a JSON array (list) themselves, where the
    file can be read from its beginning only; start and end then count bytes of the file."""
    first_line: int = 1
    """Number of the first line or value of `data`."""

    @property
    def is_json(self) -> bool:
        """Whether documents are objects of JSON."""
        return ending_of(self.path) in JSON_EXTENSIONS

    @property
    def is_ids(self) -> bool:
        """Whether documents are lines of token ids."""
        return ending_of(self.path) == IDS_EXTENSION

    @property
    def is_lines(self) -> bool:
        """Whether a document is a line or a value, not the whole file."""
        return self.is_json or self.is_ids or isinstance(self.data, list)

    @property
    def work(self) -> int:
        """Bytes that it holds, decompressed; approximate."""
        if isinstance(self.data, list):
            return sum(len(value) for value in self.data if value is not None)
        return self.end - self.start if self.data is None else len(self.data)


@dataclass
class Documents:
    """Holds the documents of a piece, and counts what was left out."""

    texts: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Where each text begins in the file, in bytes."""
    bad: int = 0


def is_stream(path: Path | str) -> bool:
    """Tell whether the file can be read from its beginning only."""
    return is_compressed(path) or is_table(path) or is_whole_json(path)


def cut_into_pieces(path: Path, piece_bytes: int) -> list[Piece]:
    """Cut a plain file of lines into pieces of about `piece_bytes`; any other file is one piece."""
    size = path.stat().st_size
    can_be_cut = Piece(str(path), 0, size).is_lines and not is_compressed(path)
    step = piece_bytes if can_be_cut else max(1, size)
    return [Piece(str(path), start, min(start + step, size)) for start in range(0, size, step)]


def read_pieces(path: Path, piece_bytes: int, key: str) -> Iterator[Piece]:
    """Cut any file into pieces. Those that cannot be read from the middle bring their data along.

    Raises:
        ValueError: a file is damaged, or a table has no column `key`.
    """
    # By what the file can be read as; most files are plain.
    name = str(path)
    if is_table(name):
        yield from _as_pieces(name, read_table(name, key, piece_bytes))
    elif is_whole_json(name):
        yield from _as_pieces(name, read_whole_json(name, key, piece_bytes))
    elif is_compressed(name) and Piece(name, 0, 0).is_lines:
        yield from _as_pieces(name, read_line_blocks(name, piece_bytes))
    else:
        yield from cut_into_pieces(path, piece_bytes)


def _as_pieces(name: str, blocks: Iterator[tuple[bytes | list, int]]) -> Iterator[Piece]:
    """Make pieces of (lines or values, bytes of the file read so far)."""
    # A byte-order mark stands before the first line only.
    before = 0
    line = 1
    for data, read in blocks:
        if isinstance(data, bytes) and line == 1:
            data = strip_byte_order_mark(data)
        yield Piece(name, before, read, data, line)
        before = read
        line += data.count(NEWLINE) if isinstance(data, bytes) else len(data)


def read_documents(piece: Piece, key: str, *, skip_bad: bool) -> Documents:
    """Read the documents of a piece, in file order, decoded without any change of newlines.

    Args:
        key: the key of the text in each JSON object.
        skip_bad: count what cannot be read instead of raising.

    Raises:
        ValueError: names file and line of what is not UTF-8, not a JSON object, or has no text
            under `key`.
    """
    # One bad line stops the run, or is counted.
    documents = Documents()
    line_key = key if piece.is_lines else None
    for offset, data in read_records(piece):
        try:
            documents.texts.append(decode(data, line_key))
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{name_place(piece, offset)}: {error}") from None
            documents.bad += 1
        else:
            documents.offsets.append(offset)
    return documents


def read_records(piece: Piece) -> Iterator[tuple[int, Any]]:
    """Give (offset, line that is not blank), or one whole text, or (number, value of a table)."""
    if isinstance(piece.data, list):
        return enumerate(piece.data)
    if piece.is_lines:
        return ((offset, line) for offset, line in read_lines(piece) if line.strip())
    return iter([(0, strip_byte_order_mark(read_whole(piece.path)))])


def read_lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Give (offset, line with its newline) for the lines that begin in the piece.

    Offsets count in the piece's data if it has any, else in the file.
    """
    if piece.data is not None:
        assert isinstance(piece.data, bytes), "values of a table are no lines"
        offset = 0
        for line in io.BytesIO(piece.data):
            yield offset, line
            offset += len(line)
        return
    with open(piece.path, "rb", buffering=READ_BYTES) as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # the rest of a line of the piece before, or just its newline
        offset = file.tell()  # asked once: it costs more than a line
        for line in file if offset < piece.end else ():
            yield offset, strip_byte_order_mark(line) if offset == 0 else line
            offset += len(line)
            if offset >= piece.end:
                break


def read_piece(piece: Piece) -> bytes:
    """Read the lines that begin in the piece, together."""
    if piece.data is not None:
        assert isinstance(piece.data, bytes), "values of a table are no lines"
        return piece.data
    with open(piece.path, "rb") as file:
        if piece.start:
            # A line that begins before belongs to the piece before.
            file.seek(piece.start - 1)
            file.readline()
        if file.tell() >= piece.end:
            return b""
        data = file.read(piece.end - file.tell())
        whole = data if data.endswith(NEWLINE) else data + file.readline()
        return whole if piece.start else strip_byte_order_mark(whole)


def decode(data: bytes | Value, key: str | None, *, lists: bool = False) -> Any:
    """Decode a record of `read_records` as a text, or with `lists` also a list or an array.

    Args:
        key: the key of the text in a line of JSON; None where the record is the text.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(data, bytes):
        return _checked_value(data, lists=lists)
    if key is None:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"not UTF-8 ({error.reason} at byte {error.start}). Fix: convert it, or "
                "--skip-bad-lines to leave it out."
            ) from None
    if not lists:
        # Most lines are right: decoded here with few calls.
        try:
            value = orjson.loads(data)
            if type(value[key]) is str:
                return value[key]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            pass  # text_of_line says what is wrong
    return text_of_line(data, key, lists=lists)


def _checked_value(value: Value, *, lists: bool) -> Any:
    """Return a value of a table or of a JSON array, if it is a document; else ValueError."""
    if isinstance(value, Unreadable):
        raise ValueError(value.reason)
    if value is None:
        raise ValueError("null, not text. Fix: --skip-bad-lines, or --json-keys.")
    if not lists and not isinstance(value, str):
        raise ValueError(
            "a list, not text. Fix: --tokenizer-type NullTokenizer if it is token ids, or "
            "--json-keys."
        )
    return value


def name_place(piece: Piece, offset: int) -> str:
    """Name file and line (by counting newlines), or a table's row, or an array's element."""
    if isinstance(piece.data, list):
        number = piece.first_line + offset
        if is_parquet(piece.path):
            return f"{piece.path}:{number}"
        return f"{piece.path}, {'element' if piece.is_json else 'row'} {number}"
    if not piece.is_lines:
        return piece.path
    # The line's number is counted only here, for an error.
    if piece.data is not None:
        return f"{piece.path}:{piece.first_line + piece.data[:offset].count(NEWLINE)}"
    line = 1
    left = offset
    with open(piece.path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            line += block.count(NEWLINE)
            left -= len(block)
    return f"{piece.path}:{line}"
