"""How many bytes a step moves beside its matrix products and its attention, on a CPU.

Norms, gates, rotations and residual sums compute little for each byte, so that the memory
sets their time. On a GPU they run as fused kernels, and their time is in the share that products
reach (hardware.py).
"""

from dataclasses import dataclass

from pretrain.planner.head_counts import HeadCounts
from pretrain.planner.pass_counts import count_passes
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.workload import Workload


@dataclass(frozen=True)
class BytesPerElement:
    """Holds the bytes that a layer's forward and backward read and write, per element."""

    hidden: float
    """Bytes for each element of [tokens, hidden size]: two norms, two sums, and what gradients are
    added to."""
    mlp: float
    """Bytes for each element of [tokens, width of the MLP]: the gate."""
    heads: float
    """Bytes for each element of q, k and v: rotation, and copies for the kernel."""


# All of these were counted with `tools/bench/traffic.py: Traffic` on steps of one process in nine
# shapes, which sums of these elements explain to 4 %; tests/unit/test_pointwise.py counts again.
LAYER = {
    2: {
        None: BytesPerElement(197, 26.6, 47.6),
        "selective": BytesPerElement(238, 30.7, 44.0),
        "full": BytesPerElement(275, 30.7, 63.4),
        "attention_kept": BytesPerElement(276, 30.6, 64.8),
    },
    4: {
        None: BytesPerElement(225, 68.2, 84.0),
        "selective": BytesPerElement(270, 76.2, 77.0),
        "full": BytesPerElement(309, 76.2, 115.6),
        "attention_kept": BytesPerElement(311, 76.1, 118.4),
    },
}
"""Bytes of a value in computing -> level of recompute -> what a layer moves."""
NORMS_AFTER = {
    2: {None: 213, "selective": 235, "full": 267, "attention_kept": 267},
    4: {None: 185, "selective": 192, "full": 220, "attention_kept": 220},
}
"""The same of [tokens, hidden size] for two norms beside two others (norm_placement both)."""
GATE_AGAIN = {2: 10, 4: 20}
"""The same of [tokens, width of the MLP] where a norm after the MLP has all of it made again."""
MULTIPLIED = {2: 8, 4: 16}
"""The same of [tokens, hidden size] for the gradients of what is added with a multiplier."""
ENDS = {2: 117, 4: 86}
"""The same of [tokens, hidden size] at both ends: the embedding, the last norm."""
EXCHANGED = 4
"""The same for each byte that an all-to-all trades: it is copied before and after."""
WEIGHT = 33
"""The same for each parameter in each microbatch: casts, copies of FSDP2, sums of gradients.

One rank moves a few bytes less (parallel/one_rank.py)."""


def layer_bytes(model: MemoryModel, load: Workload) -> float:
    """Count the pointwise bytes of one layer of a rank, forward and backward of a microbatch."""
    config = model.config
    tp = load.layout.tensor_model_parallel_size
    counted, scale = _counted_size(model)
    level = load.memory.recompute_granularity
    each = LAYER[counted][level]
    of_hidden = each.hidden
    of_mlp = each.mlp
    if config.norm_placement == "both":
        of_hidden += NORMS_AFTER[counted][level]
    if config.has_norms_after and level is not None:
        of_mlp += GATE_AGAIN[counted]
    if config.residual_multiplier != 1.0:
        of_hidden += MULTIPLIED[counted]
    # Between the tensor-parallel parts a rank has all of the hidden size, inside them a part.
    hidden = of_hidden * load.tokens_between * config.hidden_size
    mlp = of_mlp * load.tokens * config.ffn_hidden_size / tp
    heads = config.num_attention_heads + 2 * config.num_kv_heads
    attention = each.heads * load.tokens * heads * config.head_size / tp
    return scale * (hidden + mlp + attention) + _exchanged_bytes(model, load)


def _exchanged_bytes(model: MemoryModel, load: Workload) -> float:
    """Count the copies of what a layer trades over cp: q, k and v, and the output."""
    if load.layout.context_levels[0] == 1:
        return 0.0
    heads = HeadCounts.make(model.config, load.layout)
    passes = count_passes(model.config, load)
    traded = passes.to_heads * (heads.N + 2 * heads.K) + passes.to_tokens * heads.N
    return EXCHANGED * model.compute_bytes * load.tokens * model.config.head_size * traded


def ends_bytes(model: MemoryModel, load: Workload) -> float:
    """Count those of the embedding and the last norm in one microbatch, without the loss."""
    counted, scale = _counted_size(model)
    return scale * ENDS[counted] * load.tokens_between * model.config.hidden_size


def _counted_size(model: MemoryModel) -> tuple[int, float]:
    """Return the size of a value that was counted, and what that is to be multiplied by."""
    # fp64 moves twice what fp32 does.
    counted = min(model.compute_bytes, max(LAYER))
    return counted, model.compute_bytes / counted
