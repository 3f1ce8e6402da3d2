"""What an input file holds: the ending of its name says it."""

import os
from pathlib import Path

# Endings of names, in lower case.
COMPRESSIONS = (".gz", ".zst", ".zstd", ".bz2", ".xz")
TEXT_EXTENSIONS = (".txt", ".md", ".py", ".rst")
JSON_EXTENSIONS = (".jsonl", ".ndjson", ".jsonlines", ".json")
PARQUET_EXTENSION = ".parquet"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Endings of tables in text, and the delimiter of their fields."""
IDS_EXTENSION = ".ids"

KINDS = {
    **dict.fromkeys(TEXT_EXTENSIONS, "text"),
    **dict.fromkeys(JSON_EXTENSIONS, "JSON"),
    **dict.fromkeys(DELIMITERS, "tables in text"),
    PARQUET_EXTENSION: "Parquet",
    IDS_EXTENSION: "token ids",
}
"""Ending -> what such files are called in messages."""
EXTENSIONS = tuple(KINDS)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def is_compressed(path: str | Path) -> bool:
    """Tell whether the name ends as those of compressed files do."""
    return str(path).lower().endswith(COMPRESSIONS)


def without_compression(path: str | Path) -> str:
    """Return the name that says what is in the file: in lower case, without `.gz` and the like."""
    name = str(path).lower()
    for ending in COMPRESSIONS:
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name


def ending_of(path: str | Path) -> str:
    """Return the ending of the name, that of a compression left aside; empty if there is none."""
    return os.path.splitext(without_compression(path))[1]


def kind_of(path: str | Path) -> str | None:
    """Return what the file holds, None where its ending does not say."""
    return KINDS.get(ending_of(path))


def is_parquet(path: str | Path) -> bool:
    """Tell whether the file is Parquet, which cannot be read through another compression."""
    return str(path).lower().endswith(PARQUET_EXTENSION)


def is_table(path: str | Path) -> bool:
    """Tell whether the file has columns, one of which holds the documents."""
    return is_parquet(path) or ending_of(path) in DELIMITERS


def strip_byte_order_mark(data: bytes) -> bytes:
    """Return the beginning of a file without the mark that some editors put before UTF-8."""
    return data.removeprefix(BYTE_ORDER_MARK)
