"""Files that are read from their beginning only: gzip and zstd (of lines, or of one text), Parquet.

Decompressed a block at a time, so that memory does not grow with the file. zstandard and pyarrow are
imported by what needs them.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

COMPRESSIONS = (".gz", ".zst")
COMPRESSED_BLOCK = 128 << 10
"""Bytes of a compressed file read at a time; they may become a thousand times as many."""
PARQUET_ROWS = 256
"""Rows decoded at a time."""


def is_compressed(path: str | Path) -> bool:
    return str(path).lower().endswith(COMPRESSIONS)


def read_blocks(path: str) -> Iterator[tuple[bytes, int]]:
    """(decompressed bytes, bytes of the file read so far).

    Raises:
        ValueError: the file is damaged or not whole.
    """
    try:
        with open(path, "rb") as file:
            for block in _decompress(path, file):
                yield block, file.tell()
    except _decompression_errors(path) as error:
        reason = f"{error}".rstrip(".") or type(error).__name__
        raise ValueError(f"{path}: damaged, or not whole ({reason}). Fix: copy or download it again.") from None


def _decompress(path: str, file) -> Iterator[bytes]:
    """Every member or frame of the file; a file of none is empty."""
    gzip = path.lower().endswith(".gz")
    decompressor = None
    while data := file.read(COMPRESSED_BLOCK):
        while data := data.lstrip(b"\0") if gzip and decompressor is None else data:  # gzip files may be padded
            decompressor = decompressor or _decompressor(gzip)
            yield decompressor.decompress(data)
            data = decompressor.unused_data if decompressor.eof else b""
            if decompressor.eof:
                decompressor = None
    if decompressor is not None:
        raise EOFError("it ends in the middle")


def _decompressor(gzip: bool):
    if gzip:
        return zlib.decompressobj(wbits=31)
    import zstandard

    # The largest window there is: dumps are made with `zstd --long=31`.
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def _decompression_errors(path: str) -> tuple[type[Exception], ...]:
    if path.lower().endswith(".gz"):
        return zlib.error, EOFError
    import zstandard

    return zstandard.ZstdError, EOFError


def read_whole(path: str) -> bytes:
    """All bytes of a file, decompressed."""
    return b"".join(block for block, _ in read_blocks(path)) if is_compressed(path) else Path(path).read_bytes()


def read_line_blocks(path: str, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """(whole lines of about `block_bytes`, bytes of the file read so far), as `read_blocks`."""
    parts, held, read = [], 0, 0
    for block, read in read_blocks(path):
        cut = block.rfind(b"\n") + 1
        if held + len(block) >= block_bytes and cut:
            yield b"".join([*parts, block[:cut]]), read
            parts, held, block = [], 0, block[cut:]
        parts.append(block)
        held += len(block)
    if held:
        yield b"".join(parts), read


def read_parquet(path: str, column: str, block_bytes: int) -> Iterator[tuple[list, int]]:
    """(values of a column, about `block_bytes` of them; the share of `path`'s bytes read so far).

    Values are str, int64 arrays (of lists of integers), or None.

    Raises:
        ValueError: the file is damaged, has no such column, or the column holds something else.
    """
    import pyarrow
    from pyarrow import parquet

    size = Path(path).stat().st_size
    try:
        # A small buffer and no pre-buffering: pages are read as they are needed, not a row group at once.
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            if column not in file.schema_arrow.names:
                raise ValueError(f"{path}: no column {column!r} (found: {', '.join(file.schema_arrow.names)}). Fix: "
                                 "--json-keys.")
            values, held, rows = [], 0, 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column], use_threads=False):
                values += _column_values(path, column, batch.column(0))
                held, rows = held + batch.nbytes, rows + len(batch)
                if held >= block_bytes:
                    yield values, size * rows // file.metadata.num_rows
                    values, held = [], 0
            if values:
                yield values, size
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged, or not Parquet ({str(error).splitlines()[0]}). Fix: copy or download it "
                         "again.") from None


def _column_values(path: str, column: str, array) -> list:
    from pyarrow import types

    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if types.is_string(array.type) or types.is_large_string(array.type):
        return array.to_pylist()
    if (types.is_list(array.type) or types.is_large_list(array.type)) and types.is_integer(array.type.value_type):
        if array.flatten().null_count:
            raise ValueError(f"{path}: column {column!r} has lists with nulls in them. Fix: the input.")
        numbers = array.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        ends = np.cumsum([0 if length is None else length for length in array.value_lengths().to_pylist()])
        parts = np.split(numbers, ends[:-1])
        return [part if valid else None for part, valid in zip(parts, array.is_valid().to_pylist(), strict=True)]
    raise ValueError(f"{path}: column {column!r} holds {array.type}: must be text, or lists of integers. Fix: "
                     "--json-keys, or another file.")
