"""Text on disk: which files there are, how they are cut into pieces of work, and what documents a piece holds.

A .jsonl or .json file has one JSON object per line, each a document. Any other file is one document.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

EXTENSIONS = (".txt", ".md", ".py", ".jsonl", ".rst")
JSON_EXTENSIONS = (".jsonl", ".json")

READ_BYTES = 256 << 10
"""Buffer of a reader: a call of the system costs as much as parsing a line."""


@dataclass(frozen=True)
class Piece:
    """Bytes [start, end) of a file. A line belongs to the piece in which it begins."""

    path: str
    start: int
    end: int

    @property
    def is_json(self) -> bool:
        return self.path.lower().endswith(JSON_EXTENSIONS)


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
        extensions: endings of the files to take from folders, as `.txt`.

    Raises:
        ValueError: an input does not exist, or there is no file at all.
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


def _walk(folder: Path, endings: tuple[str, ...]) -> Iterator[Path]:
    paths = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in files if not name.startswith(".") and name.lower().endswith(endings)]
    return iter(sorted(path for path in paths if path.is_file()))


def cut_into_pieces(path: Path, piece_bytes: int) -> list[Piece]:
    """Pieces of about `piece_bytes` of a file of JSON lines; any other file is one piece."""
    size = path.stat().st_size
    step = piece_bytes if path.suffix.lower() in JSON_EXTENSIONS else max(1, size)
    return [Piece(str(path), start, min(start + step, size)) for start in range(0, size, step)]


def read_documents(piece: Piece, key: str, skip_bad: bool) -> Documents:
    """The documents of a piece, in file order, bytes decoded as UTF-8 without any change of newlines.

    Args:
        key: of the text in each JSON object.
        skip_bad: count what cannot be read instead of raising.

    Raises:
        ValueError: names file and line of what is not UTF-8, not a JSON object, or has no text under `key`.
    """
    documents = Documents()
    if not piece.is_json:
        lines, key = [(0, Path(piece.path).read_bytes())], None
    else:
        lines = ((offset, line) for offset, line in read_lines(piece) if line.strip())
    for offset, data in lines:
        try:
            documents.texts.append(_decode(data, key))
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{name_place(piece, offset)}: {error}") from None
            documents.bad += 1
        else:
            documents.offsets.append(offset)
    return documents


def read_lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its newline) of the lines that begin in the piece."""
    with open(piece.path, "rb", buffering=READ_BYTES) as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # the rest of a line of the piece before, or just its newline
        offset = file.tell()  # asked once: it costs more than a line
        for line in file if offset < piece.end else ():
            yield offset, line
            offset += len(line)
            if offset >= piece.end:
                break


def _decode(data: bytes, key: str | None) -> str:
    if key is not None:
        try:
            value = orjson.loads(data)
            if type(value[key]) is str:
                return value[key]  # orjson refuses half a surrogate pair
        except (orjson.JSONDecodeError, KeyError, TypeError):
            pass  # NaN is no JSON to orjson; and what is wrong is said below
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
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"no text under key {key!r} (found: {found}). Fix: --json-keys, or --skip-bad-lines.")
    return _encodable(value[key])


def _encodable(text: str) -> str:
    """The text, unless it holds half a surrogate pair: JSON can write one (`\\ud800`), UTF-8 and tokenizers cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start}. Fix: the text, or "
                         "--skip-bad-lines.") from None
    return text


def name_place(piece: Piece, offset: int) -> str:
    """`file`, or `file:line` for JSON lines, by counting newlines; only errors pay for it."""
    if not piece.is_json:
        return piece.path
    line, left = 1, offset
    with open(piece.path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            line, left = line + block.count(b"\n"), left - len(block)
    return f"{piece.path}:{line}"
