"""What differs between two checkpoints: counts, settings, small files, and every tensor.

Tensors are read one at a time from both, so that memory holds two of them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpointing.folders import CARRIED, TOKENIZER
from pretrain.checkpointing.manifest import describe_damage, read_manifest, verify_files
from pretrain.checkpointing.progress import FILE as PROGRESS_FILE
from pretrain.checkpointing.stored_tensors import StoredTensors
from pretrain.config.config_yaml import read_yaml
from tools.shared.message_text import short

Finding = tuple[str, bool]
"""A line, and whether it tells of a difference."""

ELEMENTS_AT_ONCE = 1 << 22
"""Elements of a tensor that are subtracted at once."""
MISSING = "not there"


def compare(first: Path, second: Path) -> Iterator[Finding]:
    """Verify two checkpoints, and say what differs between them."""
    yield f"A: {first}", False
    yield f"B: {second}", False
    # What is damaged says nothing about the run that wrote it.
    damaged = False
    for folder in (first, second):
        problems = verify_files(folder)
        if problems:
            damaged = True
            yield describe_damage(folder, problems), True
    if damaged:
        return

    yield from _compare_values("progress", _progress_values(first), _progress_values(second))
    settings = [read_yaml(str(folder / "config.yaml")) for folder in (first, second)]
    yield from _compare_values("settings", flatten(settings[0]), flatten(settings[1]))
    yield from _compare_values("other files", _other_files(first), _other_files(second))
    yield from _compare_tensors(StoredTensors(first), StoredTensors(second))


# ---------------------------------------------------------------- values


def flatten(value: Any, name: str = "") -> dict[str, str]:
    """Write down nested mappings and lists as dotted name -> text."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {name: str(value)}
    found = {} if items else {name: str(value)}
    for key, item in items:
        found |= flatten(item, f"{name}.{key}" if name else str(key))
    return found


def _progress_values(folder: Path) -> dict[str, str]:
    return flatten(json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8")))


def _other_files(folder: Path) -> dict[str, str]:
    """List the files of the tokenizer and of the Hugging Face source with their checksums."""
    kinds = (f"{TOKENIZER}/", f"{CARRIED}/")
    files = read_manifest(folder).files
    return {name: value for name, value in files.items() if name.startswith(kinds)}


def _compare_values(what: str, ours: dict[str, str], theirs: dict[str, str]) -> Iterator[Finding]:
    """Name each value that differs, and count those that do not."""
    names = list(dict.fromkeys([*ours, *theirs]))
    differing = [name for name in names if ours.get(name) != theirs.get(name)]
    equal = len(names) - len(differing)
    yield f"{what}: {equal:,} equal, {len(differing):,} differ", bool(differing)
    for name in differing:
        pair = (short(values.get(name, MISSING)) for values in (ours, theirs))
        yield f"  {name}: {' | '.join(pair)}", True


# ---------------------------------------------------------------- tensors


def _compare_tensors(ours: StoredTensors, theirs: StoredTensors) -> Iterator[Finding]:
    """Name each tensor that differs, and count those that do not."""
    names = sorted({*ours.entries, *theirs.entries})
    equal = 0
    for name in names:
        difference = _tensor_difference(name, ours, theirs)
        if difference is None:
            equal += 1
        else:
            yield f"  {name}: {difference}", True
    differing = len(names) - equal
    yield f"tensors: {equal:,} equal bit for bit, {differing:,} differ", differing > 0


def _tensor_difference(name: str, ours: StoredTensors, theirs: StoredTensors) -> str | None:
    """Say how a tensor differs; None where all of its bits are the same."""
    for place, tensors in (("A", ours), ("B", theirs)):
        if name not in tensors.entries:
            return f"{MISSING} in {place}"
    # What the table says, before anything is read.
    facts = [(tuple(side.entries[name].size), side.dtype(name)) for side in (ours, theirs)]
    if facts[0][0] != facts[1][0]:
        return f"shape {facts[0][0]} | {facts[1][0]}"
    if facts[0][1] != facts[1][1]:
        return f"dtype {facts[0][1]} | {facts[1][1]}"
    a = ours.read(name).flatten()
    b = theirs.read(name).flatten()
    if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
        return None
    return _describe_difference(a, b)


def _describe_difference(a: torch.Tensor, b: torch.Tensor) -> str:
    """Say how many elements differ, and by how much at most, beside the largest of A."""
    count = 0
    largest_difference = 0.0
    largest = 0.0
    for x, y in zip(a.split(ELEMENTS_AT_ONCE), b.split(ELEMENTS_AT_ONCE), strict=True):
        # Bits, and not values: a NaN is no other than itself, and -0 is not 0.
        bits = [part.view(torch.uint8).view(len(part), -1) for part in (x, y)]
        count += int((bits[0] != bits[1]).any(dim=1).sum())
        # A NaN stays: max() of Python would drop it.
        parts = ((x.double() - y.double()).abs(), x.double().abs())
        found = [float(part.max()) for part in parts]
        largest_difference = _larger(largest_difference, found[0])
        largest = _larger(largest, found[1])
    return (
        f"{count:,} of {a.numel():,} elements differ, by up to {largest_difference:.3g} "
        f"(largest of A: {largest:.3g})"
    )


def _larger(a: float, b: float) -> float:
    """Return the larger number; NaN where one of them is."""
    return a if a > b or a != a else b
