"""How long a step takes, well enough to rank layouts.

It counts what is computed, what is sent over which link, and the pipeline's bubble. Ranks are laid
out as in parallel/layout.py (tp fastest, then cp, dp, pp), so a group of ranks stays inside a node
while the product of its size and of the faster ones does. A collective over g members of each node
takes their g network cards together; inside a node it takes the node's own links.
"""

from dataclasses import dataclass
from math import log2

from model.activation_memory.settings import MemorySettings
from model.config import ModelConfig
from parallel.schedule import idle_share
from pretrain.planner.hardware import Hardware
from pretrain.planner.head_counts import HeadCounts
from pretrain.planner.model_size import ATTENTION_OUTPUT, MLP, QKV
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.workload import Workload

# The shares of computing are those of one H100 (torch 2.11, cuDNN; tools/bench/RESULTS.md, "On one
# NVIDIA H100"), and are taken for every device: nothing else has been measured.
PRODUCT_EFFICIENCY = 0.55
"""Share of the data sheet's FLOP/s of matrix products, with the norms, gates and copies between
them.

Measured as what a step leaves beside its attention and its update: 0.53 (Qwen3-8B on 131,072 tokens
a rank), 0.52 (3B on 8,192), 0.59 (1B on 32,768).
"""
ATTENTION_EFFICIENCY = {64: 0.35, 128: 0.46}
"""Share of the data sheet's FLOP/s of attention by cuDNN, by head size; a backward counts as two
forwards.

Measured inside a step: 457 TFLOP/s with heads of 128 on 1,048,576 tokens, 344 with heads of 64 on
524,288 and 369 on 131,072.
"""
VARLEN_EFFICIENCY = {64: 0.23, 128: 0.28}
"""The same of torch's varlen op (FlashAttention 2).

Measured alone: 279 TFLOP/s with heads of 128 on one document of 262,144 tokens, 228 with heads of
64 on one of 16,128.
"""
UPDATE_BYTES = 40
"""Bytes that clipping and AdamW read and write for each parameter that a rank holds: the gradient,
the weight and both moments in fp32, counted by `bench traffic`."""
MEMORY_EFFICIENCY = 0.85
"""Share of the memory's bandwidth that the update reaches. Assumed, not measured."""
LINK_EFFICIENCY = 0.8
"""Share of a link's bytes per second that a collective reaches."""
OVERLAP_SLOWDOWN = 0.2
"""Time that computing loses while a transfer runs beside it, over the transfer's time.

Both use the device's memory and multiprocessors.
"""
COLLECTIVE_LATENCY = 15e-6
"""Seconds that a collective takes before its first byte, for each doubling of its size."""


@dataclass(frozen=True)
class PassCounts:
    """Counts how often a step computes and sends the parts of a layer.

    A forward counts 1 and its backward 2.
    """

    qkv: float = 3
    """Projections to query, key and value."""
    output: float = 3
    """The attention's output projection."""
    attention: float = 3
    """The attention kernel."""
    mlp: float = 3
    """The MLP's products."""
    sums: float = 4
    """Sums over tp of [t, D]: two in forward, two in backward."""
    to_heads: float = 2
    """Exchanges of q, k and v, one in forward, one in backward."""
    to_tokens: float = 2
    """Exchanges of the output."""
    gathers: float = 2
    """All-gathers of keys and values, between the groups of two-level cp."""

    @staticmethod
    def make(settings: MemorySettings, *, sequence_parallel: bool) -> "PassCounts":
        """Count the passes that recompute.py, attention_chunks.py and mlp.py make."""
        level = settings.recompute_granularity
        in_chunks = settings.attention_head_chunks > 1
        # Gate and up are two of the MLP's three products.
        gate_and_up = 2 / 3 if level or settings.mlp_tiles > 1 else 0
        gathered_again = 0.5 * sequence_parallel  # an all-gather is half a sum
        if level in (None, "selective"):
            # In chunks, backward projects each group and exchanges it to heads once more.
            again = int(in_chunks)
            return PassCounts(
                qkv=3 + again,
                mlp=3 + gate_and_up,
                sums=4 + gathered_again * (level == "selective"),
                to_heads=2 + again,
                gathers=2 + again,
            )
        sums = 5 + 2 * gathered_again
        if level == "full":
            again = 1 + int(in_chunks)
            return PassCounts(
                qkv=3 + again,
                output=4,
                attention=4,
                mlp=3 + gate_and_up,
                sums=sums,
                to_heads=2 + again,
                to_tokens=3,
                gathers=2 + again,
            )
        # attention_kept: as full, without the attention's forward.
        return PassCounts(
            qkv=4, output=4, mlp=3 + gate_and_up, sums=sums, to_heads=3, to_tokens=3, gathers=3
        )


@dataclass(frozen=True)
class RankGroup:
    """Describes a group of `size` ranks, each `stride` ranks after the one before."""

    size: int
    stride: int

    def members_per_node(self, hardware: Hardware) -> int:
        """Return how many ranks of the group a node holds."""
        return min(self.size, max(1, hardware.devices_per_node // self.stride))

    def ring_seconds(self, sent_bytes: float, hardware: Hardware) -> float:
        """Estimate one all-gather, reduce-scatter or all-reduce.

        Args:
            sent_bytes: by each rank.
        """
        if self.size == 1:
            return 0.0
        inside = self.members_per_node(hardware)
        rate = hardware.node_bytes_per_second
        if inside < self.size:
            rate = min(rate, inside * hardware.network_bytes_per_second)
        return sent_bytes / (rate * LINK_EFFICIENCY) + COLLECTIVE_LATENCY * log2(self.size)

    def exchange_seconds(self, sent_bytes: float, hardware: Hardware) -> float:
        """Estimate one all-to-all.

        The part for other nodes leaves through the rank's own network card.
        """
        if self.size == 1:
            return 0.0
        others = self.size - 1
        inside = self.members_per_node(hardware) - 1
        near = sent_bytes * inside / others
        far = sent_bytes * (others - inside) / others
        slower = max(near / hardware.node_bytes_per_second, far / hardware.network_bytes_per_second)
        return slower / LINK_EFFICIENCY + COLLECTIVE_LATENCY * log2(self.size)


def step_seconds(model: MemoryModel, load: Workload, hardware: Hardware) -> float:
    """Estimate one optimizer step, documents taken as long as the samples."""
    layout = load.layout
    tp, pp, cp = layout.sizes
    count = load.num_microbatches
    # A microbatch: computing, then what is sent inside a layer, then what stages hand on.
    compute = _compute_seconds(model, load, hardware)
    inner = _layers_of_slowest_rank(model, load) * (
        _tensor_seconds(model, load, hardware) + _context_seconds(model, load, hardware)
    )
    between = 0.0
    if pp > 1:
        sent = model.compute_bytes * load.tokens_between * model.config.hidden_size
        neighbours = RankGroup(pp, tp * cp * load.data_parallel_size)
        between = 2 * layout.stages_per_rank * neighbours.exchange_seconds(sent, hardware)
    busy = count * (compute + inner + between)
    waiting = idle_share(layout.schedule, pp, layout.stages_per_rank, count)
    # Parameters and gradients travel while layers compute; what is more than the computing has
    # nothing to hide behind.
    sharded = _sharding_seconds(model, load, hardware)
    hidden = min(sharded, count * compute)
    exposed = sharded - hidden + OVERLAP_SLOWDOWN * hidden
    return busy * (1 + waiting) + exposed + _update_seconds(model, load, hardware)


def attention_efficiency(config: ModelConfig) -> float:
    """Return the share of the data sheet's FLOP/s that the model's attention should reach."""
    by_head_size = (
        VARLEN_EFFICIENCY if config.attention_backend == "varlen" else ATTENTION_EFFICIENCY
    )
    # A head size between two that were measured counts as the smaller one.
    reached = [size for size in by_head_size if size <= config.head_size]
    return by_head_size[max(reached, default=min(by_head_size))]


def describe_assumptions(config: ModelConfig) -> str:
    """Say in one line what the step times of different layouts are compared with."""
    return (
        f"layout auto: step times assume {PRODUCT_EFFICIENCY:g} of the data sheet's FLOP/s in "
        f"matrix products, {attention_efficiency(config):g} in attention (as measured on an H100) "
        f"and {LINK_EFFICIENCY:g} of the links"
    )


def _layers_of_slowest_rank(model: MemoryModel, load: Workload) -> int:
    stages = load.layout.pipeline_model_parallel_size * load.layout.stages_per_rank
    return -(-model.config.num_layers // stages) * load.layout.stages_per_rank


def _compute_seconds(model: MemoryModel, load: Workload, hardware: Hardware) -> float:
    """Estimate a microbatch's computing on the pipeline's slowest rank.

    It has its layers, and on the last rank the logits.
    """
    config = model.config
    size = model.size
    tp, _, cp = load.layout.sizes
    tokens = load.seq_length * load.micro_batch_size
    passes = PassCounts.make(load.memory, sequence_parallel=load.layout.sequence_parallel)
    # An uneven split of heads makes the rank with most heads the slowest.
    heads = HeadCounts.make(config, load.layout)
    imbalance = heads.m * load.layout.context_levels[0] / heads.N
    causal_pairs = tokens * (load.seq_length + 1) / 2
    attention = 4 * config.num_attention_heads * config.head_size * causal_pairs * imbalance
    products = (
        2
        * tokens
        * (
            size.layer_weights(*QKV) * passes.qkv
            + size.layer_weights(*ATTENTION_OUTPUT) * passes.output
            + size.layer_weights(*MLP) * passes.mlp
        )
    )
    # As many FLOPs as would take the time at the data sheet's rate.
    layer = products / PRODUCT_EFFICIENCY
    layer += attention * passes.attention / attention_efficiency(config)
    logits = 2 * config.padded_vocab_size(model.vocab_size) * config.hidden_size * tokens
    flops = _layers_of_slowest_rank(model, load) * layer + 3 * logits / PRODUCT_EFFICIENCY
    return flops / (tp * cp) / hardware.flops


def _tensor_seconds(model: MemoryModel, load: Workload, hardware: Hardware) -> float:
    """Estimate the sums over tp of one layer and microbatch.

    Under sequence_parallel each is an all-gather and a reduce-scatter of together the same bytes.
    """
    tp = load.layout.tensor_model_parallel_size
    sent = 2 * (tp - 1) / tp * model.compute_bytes * load.tokens * model.config.hidden_size
    passes = PassCounts.make(load.memory, sequence_parallel=load.layout.sequence_parallel)
    return passes.sums * RankGroup(tp, 1).ring_seconds(sent, hardware)


def _context_seconds(model: MemoryModel, load: Workload, hardware: Hardware) -> float:
    """Estimate the exchanges over cp of one layer and microbatch.

    parallel/ulysses.py and parallel/context.py count the elements.
    """
    tp = load.layout.tensor_model_parallel_size
    a2a, gather = load.layout.context_levels
    heads = HeadCounts.make(model.config, load.layout)
    passes = PassCounts.make(load.memory, sequence_parallel=load.layout.sequence_parallel)
    # Bytes of one head of all this rank's tokens.
    head = model.compute_bytes * load.tokens * model.config.head_size
    to_heads = (a2a - 1) / a2a * head * (heads.N + 2 * heads.k * a2a)
    to_tokens = (a2a - 1) / a2a * head * heads.m * a2a
    gathered = 2 * (gather - 1) * head * a2a * heads.k
    inner = RankGroup(a2a, tp)
    outer = RankGroup(gather, tp * a2a)
    return (
        passes.to_heads * inner.exchange_seconds(to_heads, hardware)
        + passes.to_tokens * inner.exchange_seconds(to_tokens, hardware)
        + passes.gathers * outer.ring_seconds(gathered, hardware)
    )


def _update_seconds(model: MemoryModel, load: Workload, hardware: Hardware) -> float:
    """Estimate clipping and the optimizer's update of the parameters that a rank holds."""
    _, pp, _ = load.layout.sizes
    held = max(model.count_parameters(load.layout, rank) for rank in {0, pp - 1}) / load.shards
    return UPDATE_BYTES * held / (hardware.memory_bytes_per_second * MEMORY_EFFICIENCY)


def _sharding_seconds(model: MemoryModel, load: Workload, hardware: Hardware) -> float:
    """Estimate gathering parameters and reducing gradients over dp x cp in a whole step."""
    layout = load.layout
    tp, pp, _ = layout.sizes
    held = max(model.count_parameters(layout, rank) for rank in {0, pp - 1})
    # A rank sends all but its own shard.
    sent = (load.shards - 1) / load.shards * held
    count = load.num_microbatches
    reductions = 1 if load.whole_gradients else count
    gathers = 2 * count if layout.sharding_strategy == "optim_grads_params" else 1
    group = RankGroup(load.shards, tp)
    once = reductions * group.ring_seconds(sent * model.master_bytes, hardware)
    once += gathers * group.ring_seconds(sent * model.compute_bytes, hardware)
    # Each layer is a collective of its own, so its latency counts again.
    latency = group.ring_seconds(0, hardware)
    layers = _layers_of_slowest_rank(model, load)
    return once + (layers - 1) * (reductions + gathers) * latency
