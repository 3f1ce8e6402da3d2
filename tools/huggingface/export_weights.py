"""Write a checkpoint's weights as safetensors files, under the names of Hugging Face."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from model.hf.architecture import VOCABULARY_ROWS
from pretrain.checkpointing.stored_tensors import (
    SafeReader,
    read_whole_tensors,
    tensor_names,
    tensors_of,
)
from tools.huggingface.stored_model import StoredModel
from tools.huggingface.weights import INDEX, SINGLE


def write_weights(
    stored: StoredModel, output: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Write files of at most `max_shard_bytes` (or one tensor) each, and their index."""
    shards = _plan_shards(stored, dtype, max_shard_bytes)
    weight_map = {}
    total = 0
    # One file after the other: memory holds the tensors of one.
    for number, names in enumerate(tqdm(shards, desc="writing weights", unit="file"), 1):
        is_only_file = len(shards) == 1
        file = SINGLE if is_only_file else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = _read_shard(stored, names, dtype)
        save_file(tensors, output / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (output / INDEX).write_text(json.dumps(index, indent=1))


def _read_shard(
    stored: StoredModel, names: list[str], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Read some tensors of the checkpoint, named and rounded as the export has them."""
    tensors = {}
    for stored_name, tensor in read_whole_tensors(stored.folder, names).items():
        name = stored_name.removeprefix("model.")
        if name in VOCABULARY_ROWS:
            tensor = tensor[: stored.vocab_size]  # without the rows of padding
        tensors[stored.architecture.huggingface_name(name)] = tensor.to(dtype).contiguous()
    return tensors


def _plan_shards(stored: StoredModel, dtype: torch.dtype, limit: int) -> list[list[str]]:
    """Distribute the names of the tensors over files, in order."""
    # How large each tensor will be, known without reading it.
    stored_tensors = tensors_of(SafeReader(stored.folder).read_metadata())
    shards = []
    room = 0
    for name in tensor_names(stored.folder):
        size = stored_tensors[name].size.numel() * dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards
