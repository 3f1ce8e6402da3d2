"""Initial weights, the same in every layout.

They are a function of (seed, parameter name, position in the full parameter). Values are drawn
block by block, each block from its own generator, so a rank draws only the blocks that overlap its
part. They are always drawn on the CPU in fp32: the same on every device.

Source of the scheme: GPT-2 / Megatron-LM: normal(0, std), residual output projections
normal(0, std / sqrt(2 * num_layers)), norms 1 (0 where they multiply by 1 + weight), biases and
sinks 0. With muP hidden matrices have std over the root of the width's ratio (width_scaling.py).
"""

import math

import torch
import xxhash
from torch.distributed.tensor import DTensor, Shard

from model.config import ModelConfig
from model.gpt import GPTStage
from model.sharding import row_of, scaling_of
from parallel.layout import Layout
from parallel.tensor import tp_placement

BLOCK_ELEMENTS = 1 << 20
"""Values that one generator draws, about: whole rows of the parameter."""


def initialize(stages: list[GPTStage], config: ModelConfig, layout: Layout, seed: int) -> None:
    """Fill every parameter of the sharded stages (see parallel/shard.py) in place."""
    for name, parameter in (pair for stage in stages for pair in stage.named_parameters()):
        assert isinstance(parameter, DTensor), "stages are sharded before they are filled"
        std = _std(name, config)
        local = parameter.to_local()
        rows, columns = _local_window(parameter, layout)
        with torch.no_grad():
            if std is None:
                is_factor = name.endswith("norm.weight") and not config.apply_layernorm_1p
                local.fill_(1.0 if is_factor else 0.0)
            elif rows.start < rows.stop:  # the last shards of a small parameter are empty
                values = normal_rows(seed, name, parameter.shape, rows.start, rows.stop)
                local.copy_(values[:, columns] * std)


def _std(name: str, config: ModelConfig) -> float | None:
    """Return the standard deviation of a random parameter; None for norms, biases and sinks."""
    if name.endswith(("norm.weight", ".bias", ".sinks")):
        return None
    std = config.init_method_std * scaling_of(row_of(name, config), config).init
    # Each layer adds two of these products to the residual stream.
    if name.endswith((".attention.o.weight", ".mlp.down.weight")):
        return std / math.sqrt(2 * config.num_layers)
    return std


def normal_rows(seed: int, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
    """Draw rows [start, stop) of the standard normal fp32 matrix that belongs to (seed, name)."""
    width = shape[1]
    block_rows = max(1, BLOCK_ELEMENTS // width)
    parts = []
    for block in range(start // block_rows, -(-stop // block_rows)):
        first = block * block_rows
        generator = torch.Generator(device="cpu")
        # torch's seeds are signed: 63 bits of the hash.
        digest = xxhash.xxh64_intdigest(f"{seed}/{name}/{block}".encode())
        generator.manual_seed(digest >> 1)
        values = torch.randn(
            min(block_rows, shape[0] - first), width, generator=generator, device="cpu"
        )
        parts.append(values[max(start - first, 0) : stop - first])
    return torch.cat(parts)


def _local_window(parameter: DTensor, layout: Layout) -> tuple[slice, slice]:
    """Return the rows and columns of the full parameter that this rank holds.

    tp cuts first (parallel/tensor.py), then FSDP2 cuts the rows of that part as torch.chunk does.
    """
    rows = [0, parameter.shape[0]]
    columns = [0, parameter.shape[1] if parameter.dim() > 1 else 1]
    placement = tp_placement(parameter)
    if isinstance(placement, Shard):
        bounds = rows if placement.dim == 0 else columns
        part = (bounds[1] - bounds[0]) // layout.tp.size
        bounds[:] = [layout.tp.rank * part, (layout.tp.rank + 1) * part]
    first, end = rows
    part = -(-(end - first) // layout.dp_cp.size)
    start = min(first + part * layout.dp_cp.rank, end)
    stop = min(start + part, end)
    assert parameter.to_local().shape[0] == stop - start, "FSDP2 cuts rows as torch.chunk does"
    return slice(start, stop), slice(*columns)
