"""What a corpus's files are, from their sizes and ends: cheap enough to ask on every node."""

from collections.abc import Sequence
from pathlib import Path

import xxhash

from data.blend import parse_blend
from data.config import DataConfig, are_named

SHOWN_BYTES = 64 << 10
"""Bytes at each end of a file that are compared."""


def prefixes(config: DataConfig, phase_blends: Sequence[Sequence[str]] = ()) -> list[str]:
    """List the prefixes of all files that a run reads, each once.

    Args:
        phase_blends: `data_path` of the phases that have their own.

    Raises:
        ValueError: a blend is none.
    """
    words = [config.data_path, config.train_data_path, *phase_blends]
    if are_named(config.valid_data_path):
        words += [[path] for path in (word.split("=", 1)[1] for word in config.valid_data_path)]
    else:
        words.append(config.valid_data_path)
    sources = [source for blend in words if blend for _, source in parse_blend(blend, "data_path")]
    return list(dict.fromkeys(source.prefix for source in sources))


def describe_pair(prefix: str) -> str:
    """Write down the sizes of PREFIX.bin and .idx, and a hash of both ends of each."""
    digest = xxhash.xxh3_64()
    sizes = []
    for suffix in (".bin", ".idx"):
        path = Path(prefix + suffix)
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                digest.update(file.read(SHOWN_BYTES))
                file.seek(max(0, size - SHOWN_BYTES))
                digest.update(file.read(SHOWN_BYTES))
        except OSError as error:
            return f"{suffix} cannot be read ({error.strerror})"
        sizes.append(f"{size:,} bytes of {suffix}")
    return f"{', '.join(sizes)}, hash {digest.hexdigest()[:12]}"
