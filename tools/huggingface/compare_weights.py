"""Are a folder's weights those of a checkpoint, bit for bit? One tensor after the other.

Memory holds one tensor of each at a time.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from model.hf.architecture import VOCABULARY_ROWS
from model.hf.folding import factor_of
from pretrain.checkpointing.stored_tensors import StoredTensors
from tools.huggingface.comparison_table import ComparisonTable
from tools.huggingface.export_weights import multiplied
from tools.huggingface.weights import Entry
from tools.shared.message_text import count_of

PREFIX = "model."
"""What the names of the model's tensors begin with in a checkpoint."""
SHOWN = 3
"""Tensors that differ and are named."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number -> the type that shows its bits."""


def compare_weights(
    table: ComparisonTable,
    checkpoint: Path,
    entries: Mapping[str, Entry],
    vocab_size: int,
    *,
    exported_as: torch.dtype | None = None,
    factors: Mapping[str, float] | None = None,
) -> None:
    """Add whether each tensor of the folder is in the checkpoint, and the other way round.

    Args:
        entries: the folder's tensors by our names.
        exported_as: the type that an export rounds to; None for an import, which only widens, and
            whose padded rows are zeros.
        factors: what an export multiplies into weights (model/hf/folding.py).
    """
    stored = StoredTensors(checkpoint)
    names = {name.removeprefix(PREFIX) for name in stored.entries if name.startswith(PREFIX)}
    wrong = [f"{name} is only in the checkpoint" for name in sorted(names - entries.keys())]
    wrong += [f"{name} is only in the folder" for name in sorted(entries.keys() - names)]
    for name in sorted(names & entries.keys()):
        ours = multiplied(stored.read(PREFIX + name), factor_of(name, factors or {}))
        reason = _difference(name, ours, _read(entries[name]), vocab_size, exported_as)
        if reason is not None:
            wrong.append(f"{name} {reason}")
    problem = None
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        problem = f"weights: {', '.join(wrong[:SHOWN])}{more}"
    what = f"weights, bit for bit, {count_of(len(names), 'tensor')}"
    table.add(what, count_of(len(wrong), "tensor"), "0 tensors", problem)


def _read(entry: Entry) -> torch.Tensor:
    """Read a tensor in the type that its file has."""
    with safe_open(entry.file, framework="pt") as opened:
        return opened.get_tensor(entry.name)


def _difference(
    name: str,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    vocab_size: int,
    exported_as: torch.dtype | None,
) -> str | None:
    """Say how the checkpoint's tensor and the folder's differ; None where they do not."""
    if name in VOCABULARY_ROWS:
        padding = ours[vocab_size:]
        ours = ours[:vocab_size]
        if exported_as is None and padding.any():
            return "has padded rows that are not zero"
    if exported_as is None:
        theirs = theirs.to(ours.dtype)
    elif theirs.dtype != exported_as:
        return f"is {theirs.dtype}, not {exported_as}"
    else:
        ours = ours.to(exported_as)
    if ours.shape != theirs.shape:
        return f"has shape {list(theirs.shape)} in the folder, {list(ours.shape)} in the checkpoint"
    bits = _BITS[ours.element_size()]
    different = int((ours.contiguous().view(bits) != theirs.contiguous().view(bits)).sum())
    return f"differs in {different:,} of {ours.numel():,} numbers" if different else None
