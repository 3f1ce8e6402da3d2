"""Make corpora in Megatron-Core's format: one sequence per document, uint16 ids.

Document lengths are log-normal, as those of web text are: most have some hundred tokens, a few in a
million documents have more than a hundred thousand.
"""

import math
import shutil
from pathlib import Path

import numpy as np

from data.idx_format import HEADER, MAGIC, VERSION, find_code

SPREAD = 1.4
"""Standard deviation of the logarithm of a length."""
SHORTEST = 8
LONGEST = 1 << 20
EOD = 0
VOCAB_SIZE = 50_000
"""Ids of `write_tokens`: 1 to VOCAB_SIZE - 1, and EOD at each document's end alone."""
BLOCK = 1 << 22
"""Tokens or documents that are made at a time."""


def draw_lengths(documents: int, mean: float, seed: int) -> np.ndarray:
    """Draw the tokens of each document, int32 [documents], with about that mean."""
    rng = np.random.default_rng(seed)
    # The mean of a log-normal is exp(middle + SPREAD^2 / 2).
    middle = math.log(mean) - SPREAD**2 / 2
    out = np.empty(documents, dtype=np.int32)
    for start in range(0, documents, BLOCK):
        count = min(BLOCK, documents - start)
        drawn = np.exp(
            rng.standard_normal(count, dtype=np.float32) * np.float32(SPREAD) + np.float32(middle)
        )
        out[start : start + count] = np.clip(drawn, SHORTEST, LONGEST)
    return out


def write_index(prefix: Path, lengths: np.ndarray, dtype: type[np.integer]) -> int:
    """Write PREFIX.idx for documents of the given lengths, int32; returns their tokens together."""
    itemsize = np.dtype(dtype).itemsize
    end = 0
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, find_code(dtype), len(lengths), len(lengths) + 1))
        # The format: lengths of sequences, byte offsets, then each document's first sequence.
        lengths.astype("<i4", copy=False).tofile(file)
        for start in range(0, len(lengths), BLOCK):
            ends = end + np.cumsum(lengths[start : start + BLOCK], dtype=np.int64)
            # Each sequence begins where the one before it ends.
            (np.concatenate([[end], ends[:-1]]) * itemsize).astype("<i8", copy=False).tofile(file)
            end = int(ends[-1])
        for start in range(0, len(lengths) + 1, BLOCK):
            np.arange(start, min(start + BLOCK, len(lengths) + 1), dtype="<i8").tofile(file)
    return end


def write_hollow(prefix: Path, documents: int, tokens: int, seed: int) -> int:
    """Write a pair whose .bin has a size and no content: a hole in the file, read as zeros.

    Returns:
        its tokens.
    """
    total = write_index(prefix, draw_lengths(documents, tokens / documents, seed), np.uint16)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * total)
    return total


def write_tokens(prefix: Path, tokens: int, mean: float, seed: int) -> int:
    """Write a pair of about that many random ids, EOD ending each document; returns its tokens."""
    lengths = draw_lengths(max(1, round(tokens / mean)), mean, seed)
    total = write_index(prefix, lengths, np.uint16)
    rng = np.random.default_rng(seed + 1)
    ends = np.cumsum(lengths, dtype=np.int64) - 1
    start = 0
    with open(f"{prefix}.bin", "wb") as file:
        while start < total:
            ids = rng.integers(1, VOCAB_SIZE, min(BLOCK, total - start), dtype=np.uint16)
            low, high = np.searchsorted(ends, [start, start + len(ids)])
            # The document ends that lie in this block.
            ids[ends[low:high] - start] = EOD
            ids.tofile(file)
            start += len(ids)
    return total


def find_room(folder: Path, needed: int) -> str | None:
    """Say why the folder cannot take that many bytes, with a fix; None = it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"--folder {folder}: {error.strerror}. Fix: give a folder that can be written."
    if free < needed:
        return (
            f"--folder {folder}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed. "
            "Fix: another "
            "folder, or fewer --documents, --read-tokens and --counted-tokens."
        )
    return None
