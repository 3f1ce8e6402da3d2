"""Make a corpus in which each token id is the number of its token."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.bench.data_engine.corpus import write_index

LENGTHS = tuple(1 << power for power in range(13, 21))
"""Sequence lengths of the phases of a full-sized run, 8Ki to 1Mi."""


BLOCK = 1 << 22
"""Tokens that are written at a time."""


HELD_OUT = 64
"""One in this many documents of the last source is in no stream, as a validation set would be."""


@dataclass(frozen=True)
class Source:
    """Hold one corpus, whose token ids count on from `base`."""

    name: str
    prefix: str
    base: int
    """Id of its first token."""
    lengths: np.ndarray
    """Tokens of each document, int64 [documents]."""
    starts: np.ndarray
    """Id of each document's first token, int64 [documents]."""
    selected: np.ndarray | None
    """Numbers of the documents that are in the stream; None = all."""


def make_sources(folder: Path, tokens: int, longest: int, seed: int) -> list[Source]:
    """Make three .bin/.idx pairs, int32, whose token ids count on from 1 through all of them.

    Id 0 is left for padding.

    Short documents of which some are empty; long ones; very short ones among some of several
    samples' length.
    """
    rng = np.random.default_rng(seed)
    base = 1
    sources = []
    scale = longest / LENGTHS[-1]

    def log_normal(mean: float, spread: float, share: float) -> np.ndarray:
        count = max(8, int(tokens * share / mean))
        return np.exp(rng.normal(np.log(mean) - spread**2 / 2, spread, count)).astype(np.int64)

    # Many short documents, of which one in a hundred is empty.
    short = log_normal(1000 * min(1, 4 * scale), 1.4, 0.4)
    short[rng.random(len(short)) < 0.01] = 0
    # Documents about as long as the longest samples.
    long = log_normal(100_000 * scale, 1.0, 0.35) + 1
    # Very short ones among some that are longer than any sample.
    mixed = np.concatenate(
        [
            log_normal(300 * min(1, 4 * scale), 1.0, 0.15) + 1,
            rng.integers(longest, 5 * longest, max(1, int(tokens * 0.1 / (3 * longest)))),
        ]
    )
    rng.shuffle(mixed)
    for name, lengths in (("short", short), ("long", long), ("mixed", mixed)):
        prefix = folder / name
        total = write_index(prefix, lengths.astype(np.int32), np.int32)
        with open(f"{prefix}.bin", "wb") as file:
            for start in range(base, base + total, BLOCK):
                np.arange(start, min(start + BLOCK, base + total), dtype=np.int32).tofile(file)
        selected = (
            np.flatnonzero(rng.integers(0, HELD_OUT, len(lengths))) if name == "mixed" else None
        )
        # Ids count on from source to source.
        starts = base + np.cumsum(lengths) - lengths
        sources.append(Source(name, str(prefix), base, lengths, starts, selected))
        base += total
    return sources
