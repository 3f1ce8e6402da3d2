"""What a run of tools.preprocess_data was asked to do, so that a later one may go on with it, or
not."""

from collections.abc import Sequence
from pathlib import Path

import xxhash


def make_plan(files: Sequence[Path], arguments: dict) -> dict:
    """What decides the bytes of the output: `arguments` (JSON-able), and path, size and time of
    each input file.

    The files count as a checksum: a list of a million would be written again with every save.
    """
    digest = xxhash.xxh3_128()
    total = 0
    for path in files:
        status = path.stat()
        total += status.st_size
        digest.update(
            f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
        )
    return {
        "input_files": len(files),
        "input_bytes": total,
        "inputs": digest.hexdigest(),
    } | arguments


def describe_change(old: dict, new: dict) -> str:
    """Why work done for the plan `old` is no use for `new`, in a few words; empty where it is."""
    for name in sorted(
        old.keys() | new.keys(), key=lambda name: name == "inputs"
    ):  # counts say more than a checksum
        before = old.get(name)
        now = new.get(name)
        if before == now:
            continue
        if name == "inputs":
            return "an input file has another name, size or time"
        if isinstance(before, dict) and isinstance(now, dict):  # the tokenizer
            name, before, now = next(
                (f"{name}.{key}", before.get(key), now.get(key))
                for key in sorted(before.keys() | now.keys())
                if before.get(key) != now.get(key)
            )
        return f"{name} was {before}, now {now}"
    return ""
