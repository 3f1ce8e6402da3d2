"""How long a step takes, well enough to rank layouts.

It counts what is computed, what is sent over which link, and the pipeline's bubble. Ranks are laid
out as in parallel/layout.py (tp fastest, then cp, dp, pp), so a group of ranks stays inside a node
while the product of its size and of the faster ones does. A collective over g members of each node
takes their g network cards together; inside a node it takes the node's own links.
"""

from dataclasses import dataclass
from math import log2

from model.activation_memory.settings import MemorySettings
from parallel.schedule import idle_share
from pretrain.planner.hardware import Hardware
from pretrain.planner.head_counts import HeadCounts
from pretrain.planner.model_size import ATTENTION_OUTPUT, MLP, QKV
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.workload import Workload

COMPUTE_EFFICIENCY = 0.5
"""Share of the data sheet's FLOP/s that matrix products and attention reach over a whole layer."""
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
    return busy * (1 + waiting) + exposed


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
    layer = products + attention * passes.attention
    logits = 2 * config.padded_vocab_size(model.vocab_size) * config.hidden_size * tokens
    flops = _layers_of_slowest_rank(model, load) * layer + 3 * logits
    return flops / (tp * cp) / (hardware.flops * COMPUTE_EFFICIENCY)


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
