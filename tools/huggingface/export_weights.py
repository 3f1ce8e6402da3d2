"""Write a checkpoint's weights as safetensors files, under the names of Hugging Face.

A file's header is known from shapes alone, so each tensor is read, rounded and written in turn:
memory holds one tensor, whatever the size of the model and of the files. The format: 8 bytes with
the header's length, the header as JSON, the numbers.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from data.files import WriteBehind
from model.hf.architecture import VOCABULARY_ROWS
from model.hf.folding import factor_of
from pretrain.checkpointing.verifying_reader import VerifyingReader
from tools.huggingface.stored_model import StoredModel
from tools.huggingface.weights import INDEX, SINGLE

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Types that are written, and their names in a file."""
BLOCK_NUMBERS = 1 << 22
"""Numbers that are rounded and written at once."""
HEADER_ALIGNMENT = 8
"""Bytes; a header is filled up with spaces to a multiple of this."""


@dataclass(frozen=True)
class WrittenTensor:
    """Describes one tensor of the export."""

    stored_name: str
    name: str
    """Name in Hugging Face's files."""
    shape: tuple[int, ...]
    """Without the rows of padding."""
    factor: float
    """What its numbers are multiplied by, before they are rounded."""

    def num_bytes(self, dtype: torch.dtype) -> int:
        return math.prod(self.shape) * dtype.itemsize


class WeightsExport:
    """Writes a checkpoint's weights in `dtype`, in files of at most `max_shard_bytes` each.

    A tensor that is larger than that has a file of its own.

    Raises:
        ValueError: the checkpoint is damaged.
    """

    def __init__(self, stored: StoredModel, dtype: torch.dtype, max_shard_bytes: int):
        self._dtype = dtype
        self._reader = VerifyingReader(stored.folder)
        self._shards: list[list[WrittenTensor]] = []
        room = 0
        for stored_name in self._reader.names():
            tensor = _describe(stored_name, tuple(self._reader.entries[stored_name].size), stored)
            size = tensor.num_bytes(dtype)
            if not self._shards or size > room:
                self._shards.append([])
                room = max_shard_bytes
            self._shards[-1].append(tensor)
            room -= size

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes(self._dtype) for shard in self._shards for tensor in shard)

    def write(self, folder: Path) -> None:
        """Write the files, the index last, and compare the checkpoint with its checksums.

        Raises:
            ValueError: a number is not finite in `dtype`, or the checkpoint is damaged; what was
                written must not be published.
        """
        is_only_file = len(self._shards) == 1
        weight_map = {}
        for number, shard in enumerate(tqdm(self._shards, desc="writing weights", unit="file"), 1):
            of_all = f"{number:05d}-of-{len(self._shards):05d}"
            file = SINGLE if is_only_file else f"model-{of_all}.safetensors"
            self._write_file(folder / file, shard)
            weight_map |= {tensor.name: file for tensor in shard}
        self._reader.finish()
        if not is_only_file:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=1))

    def _write_file(self, path: Path, shard: list[WrittenTensor]) -> None:
        """Write one file of safetensors."""
        try:
            with open(path, "wb") as file:
                file.write(_header(shard, self._dtype))
                behind = WriteBehind(file)
                for tensor in shard:
                    for values in self._read(tensor):
                        _write_values(file, tensor, values.reshape(-1), self._dtype, behind)
        except OSError as error:
            # Of a file that is open already, the system names no path.
            error.filename = error.filename or str(path)
            raise

    def _read(self, tensor: WrittenTensor) -> Iterator[torch.Tensor]:
        """Read a tensor, in consecutive pieces that are used at once."""
        rows = tensor.shape[0]
        parts = self._reader.read_parts(tensor.stored_name, rows)
        # Most checkpoints are cut by rows: nothing has to be put together.
        if self._reader.is_cut_by_rows(tensor.stored_name):
            for (begin, *_), values in parts:
                yield multiplied(values[: rows - begin.start], tensor.factor)
            return
        whole = torch.empty(tensor.shape, dtype=self._dtype, device="cpu")
        for place, stored_values in parts:
            values = multiplied(stored_values, tensor.factor)
            # Rounding would make infinity of what is too large.
            _refuse_unwritable(tensor, values, self._dtype)
            whole[place] = values[: rows - place[0].start]
        yield whole


def multiplied(values: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply numbers by a power of two, which rounds none; by 1 they stay where they are."""
    return values if factor == 1.0 else values * factor


def _describe(stored_name: str, shape: tuple[int, ...], stored: StoredModel) -> WrittenTensor:
    """Say how a stored tensor is written."""
    name = stored_name.removeprefix("model.")
    if name in VOCABULARY_ROWS:
        shape = (stored.vocab_size, *shape[1:])
    return WrittenTensor(
        stored_name,
        stored.architecture.huggingface_name(name),
        shape,
        factor_of(name, stored.form.factors),
    )


def _header(shard: list[WrittenTensor], dtype: torch.dtype) -> bytes:
    """Make a file's header: what it holds, and where."""
    content: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        begin = end
        end += tensor.num_bytes(dtype)
        content[tensor.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_values(
    file: BinaryIO,
    tensor: WrittenTensor,
    values: torch.Tensor,
    dtype: torch.dtype,
    behind: WriteBehind,
) -> None:
    """Round a flat tensor, a block at a time, and write it.

    Raises:
        ValueError: numbers that are not finite, or would not be in `dtype`.
    """
    for block in values.split(BLOCK_NUMBERS):
        _refuse_unwritable(tensor, block, dtype)
        content: Any = block.to(dtype).view(torch.uint8).numpy()
        file.write(content)
        behind.wrote(content.nbytes)


def _refuse_unwritable(tensor: WrittenTensor, values: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError for numbers of a part of a tensor that are not finite, or not in `dtype`."""
    largest = torch.finfo(dtype).max
    low, high = values.aminmax()
    if not (-largest <= low and high <= largest):  # so written, NaN is found, too
        raise ValueError(_why_unwritable(tensor, values, dtype))


def _why_unwritable(tensor: WrittenTensor, values: torch.Tensor, dtype: torch.dtype) -> str:
    """Say which numbers of a part of a tensor cannot be written."""
    not_finite = values.numel() - int(torch.isfinite(values).sum())
    if not_finite:
        return (
            f"{tensor.name}: {not_finite:,} numbers are NaN or infinite in the checkpoint. "
            "Fix: an earlier one, by --ckpt-step."
        )
    beyond = int((values.abs() > torch.finfo(dtype).max).sum())
    return (
        f"dtype = {str(dtype).removeprefix('torch.')}: {tensor.name}: {beyond:,} numbers are "
        f"beyond its largest, {torch.finfo(dtype).max:,.0f}. Fix: --dtype bfloat16 or float32."
    )
