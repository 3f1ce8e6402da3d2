"""Text on disk: which files there are, how they are cut into pieces of work, and what documents a piece holds.

A .jsonl or .json file has one JSON object per line, each a document; an .ids file one list of integers
per line; a .parquet file one document per row. Any other file is one document. All but Parquet may be
compressed (.gz, .zst).
"""

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tools.streams import COMPRESSIONS, is_compressed, read_line_blocks, read_parquet, read_whole

EXTENSIONS = (".txt", ".md", ".py", ".jsonl", ".rst", ".parquet", ".ids")
JSON_EXTENSIONS = (".jsonl", ".json")
IDS_EXTENSION = ".ids"
NEWLINE = b"\n"


@dataclass(frozen=True)
class Piece:
    """Bytes [start, end) of a file. A line belongs to the piece in which it begins.

    data: the lines (bytes) or Parquet values (list) themselves, where the file can be read from its
        beginning only; start and end then count compressed bytes. first_line: number of the first of them.
    """

    path: str
    start: int
    end: int
    data: bytes | list | None = None
    first_line: int = 1

    @property
    def is_json(self) -> bool:
        return _kind(self.path).endswith(JSON_EXTENSIONS)

    @property
    def is_ids(self) -> bool:
        return _kind(self.path).endswith(IDS_EXTENSION)

    @property
    def is_lines(self) -> bool:
        return self.is_json or self.is_ids or isinstance(self.data, list)

    @property
    def work(self) -> int:
        """Bytes that it holds, decompressed, about."""
        if isinstance(self.data, list):
            return sum(len(value) for value in self.data if value is not None)
        return self.end - self.start if self.data is None else len(self.data)


def _kind(path: str) -> str:
    """The name that says what is in the file, without the ending of a compression."""
    return path.lower().removesuffix(".gz").removesuffix(".zst")


def is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


@dataclass
class Documents:
    """The documents of a piece, and what was left out."""

    texts: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Where each text begins in the file, in bytes."""
    bad: int = 0


def find_files(inputs: Sequence[str], extensions: Sequence[str]) -> list[Path]:
    """The files that the inputs name, in their order; a folder gives its files, sorted by path.

    Inside folders hidden files and folders are left out. A file that is named twice counts once.

    Args:
        extensions: endings of the files to take from folders, as `.txt`; `.txt.gz` and `.txt.zst` come with it.

    Raises:
        ValueError: an input does not exist, or there is no file at all; a folder has a file and its
            compressed copy.
    """
    missing = [name for name in inputs if not Path(name).exists()]
    if missing:
        raise ValueError(f"input = {', '.join(missing)}: no such file or folder. Fix: the path.")
    endings = tuple("." + ending.lstrip(".").lower() for ending in extensions)
    found: dict[str, Path] = {}
    for name in inputs:
        for path in _walk(Path(name), endings) if Path(name).is_dir() else [Path(name)]:
            found.setdefault(os.path.realpath(path), path)
    if not found:
        raise ValueError(f"input = {', '.join(inputs)}: no file that ends in {', '.join(endings)}. Fix: give files, or "
                         "other --extensions.")
    return list(found.values())


def is_stream(path: Path | str) -> bool:
    """Whether the file can be read from its beginning only."""
    return is_compressed(path) or is_parquet(str(path))


def _walk(folder: Path, endings: tuple[str, ...]) -> Iterator[Path]:
    endings += tuple(ending + compression for ending in endings for compression in COMPRESSIONS)
    paths = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in files if not name.startswith(".") and name.lower().endswith(endings)]
    names = {str(path) for path in paths}
    for name in names:
        plain = name.removesuffix(".gz").removesuffix(".zst")
        if plain != name and plain in names:
            raise ValueError(f"{name}: {Path(plain).name} stands beside it: the same text twice? Fix: move one of them "
                             "away, or name the files as --input.")
    return iter(sorted(path for path in paths if path.is_file()))


def cut_into_pieces(path: Path, piece_bytes: int) -> list[Piece]:
    """Pieces of about `piece_bytes` of a plain file of lines; any other file is one piece."""
    size = path.stat().st_size
    step = piece_bytes if Piece(str(path), 0, size).is_lines and not is_compressed(path) else max(1, size)
    return [Piece(str(path), start, min(start + step, size)) for start in range(0, size, step)]


def read_pieces(path: Path, piece_bytes: int, key: str) -> Iterator[Piece]:
    """The pieces of any file. Those of files that cannot be read from the middle bring their data with them.

    Raises:
        ValueError: a compressed or a Parquet file is damaged, or has no column `key`.
    """
    name, before, line = str(path), 0, 1
    if is_parquet(name):
        for values, read in read_parquet(name, key, piece_bytes):
            yield Piece(name, before, read, values, line)
            before, line = read, line + len(values)
    elif is_compressed(name) and Piece(name, 0, 0).is_lines:
        for data, read in read_line_blocks(name, piece_bytes):
            yield Piece(name, before, read, data, line)
            before, line = read, line + data.count(b"\n")
    else:
        yield from cut_into_pieces(path, piece_bytes)


def read_documents(piece: Piece, key: str, skip_bad: bool) -> Documents:
    """The documents of a piece, in file order, bytes decoded as UTF-8 without any change of newlines.

    Args:
        key: of the text in each JSON object.
        skip_bad: count what cannot be read instead of raising.

    Raises:
        ValueError: names file and line of what is not UTF-8, not a JSON object, or has no text under `key`.
    """
    documents = Documents()
    for offset, data in read_records(piece):
        try:
            documents.texts.append(decode(data, key if piece.is_lines else None))
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{name_place(piece, offset)}: {error}") from None
            documents.bad += 1
        else:
            documents.offsets.append(offset)
    return documents


def read_records(piece: Piece) -> Iterator[tuple[int, Any]]:
    """(offset, what stands there): lines that are not blank; or the bytes of a file; or rows of Parquet."""
    if isinstance(piece.data, list):
        return enumerate(piece.data)
    if piece.is_lines:
        return ((offset, line) for offset, line in read_lines(piece) if line.strip())
    return iter([(0, read_whole(piece.path))])


def read_lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its newline) of the lines that begin in the piece; offsets in its data if it has any."""
    if piece.data is not None:
        offset = 0
        for line in io.BytesIO(piece.data):
            yield offset, line
            offset += len(line)
        return
    with open(piece.path, "rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # the rest of a line of the piece before, or just its newline
        while (offset := file.tell()) < piece.end and (line := file.readline()):
            yield offset, line


def read_piece(piece: Piece) -> bytes:
    """The lines that begin in the piece, as one."""
    if piece.data is not None:
        return piece.data
    with open(piece.path, "rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()
        if file.tell() >= piece.end:
            return b""
        data = file.read(piece.end - file.tell())
        return data if data.endswith(NEWLINE) else data + file.readline()


def decode(data: bytes | str | np.ndarray | None, key: str | None, lists: bool = False) -> Any:
    """The text of a record of `read_records`, or with `lists` also a list or an array.

    Args:
        key: of the text in a line of JSON; None where the record is the text.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(data, bytes):  # of Parquet
        if data is None or not (lists or isinstance(data, str)):
            raise ValueError(f"{'null' if data is None else 'a list of integers'}, not text. Fix: "
                             f"{'--skip-bad-lines' if data is None else '--tokenizer-type NullTokenizer'}, or "
                             "--json-keys.")
        return data
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start}). Fix: convert it, or --skip-bad-lines to "
                         "leave it out.") from None
    if key is None:
        return text
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}). Fix: one JSON object per line, or --skip-bad-lines.") from None
    found = value.get(key) if isinstance(value, dict) else None
    if lists and isinstance(found, list):
        return found
    if not isinstance(found, str):
        names = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        hint = "--tokenizer-type NullTokenizer if it is token ids, " if isinstance(found, list) else ""
        raise ValueError(f"no text under key {key!r} (found: {names}). Fix: --json-keys, {hint}or --skip-bad-lines.")
    return _encodable(found)


def _encodable(text: str) -> str:
    """The text, unless it holds half a surrogate pair: JSON can write one (`\\ud800`), UTF-8 and tokenizers cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start}. Fix: the text, or "
                         "--skip-bad-lines.") from None
    return text


def name_place(piece: Piece, offset: int) -> str:
    """`file`, or `file:line` for lines and `file:row` for Parquet, by counting newlines; only errors pay for it."""
    if isinstance(piece.data, list):
        return f"{piece.path}:{piece.first_line + offset}"
    if not piece.is_lines:
        return piece.path
    if piece.data is not None:
        return f"{piece.path}:{piece.first_line + piece.data[:offset].count(NEWLINE)}"
    line, left = 1, offset
    with open(piece.path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            line, left = line + block.count(NEWLINE), left - len(block)
    return f"{piece.path}:{line}"
