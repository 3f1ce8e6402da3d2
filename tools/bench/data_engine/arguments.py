"""Hold the options of the data benchmark."""

from dataclasses import dataclass

CORES = 2
"""Cores of each contender, except in reading, which has one."""


SIZES = ("documents", "tokens", "packed_documents", "read_tokens", "counted_tokens")
"""Fields of `Arguments` that the bars depend on."""


@dataclass(kw_only=True)
class Arguments:
    documents: int = 100_000_000
    """Documents of the index row."""
    tokens: int = 100_000_000_000
    """Tokens of the index row; its .bin is a hole of twice as many bytes, its .idx has 20 bytes a
    document."""
    packed_documents: int = 10_000_000
    """Documents of the packing row."""
    read_tokens: int = 256_000_000
    """Tokens of the reading and slices rows."""
    counted_tokens: int = 512_000_000
    """Tokens of the exactly-once row; 4 bytes each on disk, about 7 in memory."""
    text_bytes: int = 500_000_000
    """JSON lines of the tokenizing row."""
    repeats: int = 3
    """Fresh processes of each contender in the index and packing rows; the median counts."""
    samples: int = 20
    """Timed samples of the reading row; the median counts."""
    folder: str | None = None
    """Where the corpora are made, in a folder of their own that is removed afterwards; the system's
    default if none."""
    only: tuple[str, ...] = ()
    """Rows to run: index, packing, reading, slices, tokenizing, exactly-once; all by default."""
    seed: int = 1234
    """Seed of the corpora, and of the exactly-once row's phases."""
    output: str | None = None
    """File to append the result to, as Markdown."""
