"""How long a step takes, well enough to rank layouts: computing, the pipeline's bubble, what is
sent over which link.

Ranks are laid out as in parallel/layout.py (tp fastest, then cp, dp, pp), so an axis stays inside a
node while the product of its size and of the faster ones does. A collective over g members of each
node takes their g network cards together; inside a node it takes the node's own links.
"""

from dataclasses import dataclass
from math import log2

from model.activation_memory.settings import MemorySettings
from model.config import ModelConfig
from parallel.schedule import idle_share
from pretrain.planner.activation_bytes import Heads, Load
from pretrain.planner.hardware import Hardware
from pretrain.planner.rank_bytes import MemoryModel

REACHED = 0.5
"""Share of the data sheet's rate that large matrix products and attention reach over a whole
layer."""
LINKS_REACHED = 0.8
"""Share of a link's rate that a collective reaches."""
SLOWED = 0.2
"""Time that computing loses while a transfer runs beside it, over the transfer's: both use the
device's memory and multiprocessors."""
LATENCY = 15e-6
"""Seconds that a collective takes before its first byte, for each doubling of its size."""


@dataclass(frozen=True)
class Passes:
    """How often a step computes and sends the parts of a layer, with a forward as 1 and its
    backward as 2."""

    qkv: float = 3
    """Projections to query, key and value."""
    output: float = 3
    """The attention's output projection."""
    attention: float = 3
    mlp: float = 3
    sums: float = 4
    """Over tp, of [t, D]: two in forward, two in backward."""
    to_heads: float = 2
    """Exchanges of q, k and v, one in forward, one in backward."""
    to_tokens: float = 2
    """Exchanges of the output."""
    gathers: float = 2
    """Of keys and values, between the groups of two-level cp."""

    @staticmethod
    def of(settings: MemorySettings, sequence_parallel: bool) -> "Passes":
        """As memory.py, attention_chunks.py and mlp.py run them."""
        level = settings.recompute_granularity
        in_chunks = settings.attention_head_chunks > 1
        gate_and_up = 2 / 3 if level or settings.mlp_tiles > 1 else 0
        gathered_again = 0.5 * sequence_parallel  # an all-gather is half a sum
        if level in (None, "selective"):
            again = int(
                in_chunks
            )  # backward projects each group and exchanges it to heads once more
            return Passes(
                qkv=3 + again,
                mlp=3 + gate_and_up,
                sums=4 + gathered_again * (level == "selective"),
                to_heads=2 + again,
                gathers=2 + again,
            )
        sums = 5 + 2 * gathered_again
        if level == "full":
            again = 1 + int(in_chunks)
            return Passes(
                qkv=3 + again,
                output=4,
                attention=4,
                mlp=3 + gate_and_up,
                sums=sums,
                to_heads=2 + again,
                to_tokens=3,
                gathers=2 + again,
            )
        return Passes(
            qkv=4, output=4, mlp=3 + gate_and_up, sums=sums, to_heads=3, to_tokens=3, gathers=3
        )


@dataclass(frozen=True)
class Axis:
    """A group of ranks by its place: every `stride`-th rank, `size` of them."""

    size: int
    stride: int

    def members_per_node(self, hardware: Hardware) -> int:
        return min(self.size, max(1, hardware.devices_per_node // self.stride))

    def ring_seconds(self, sent_bytes: float, hardware: Hardware) -> float:
        """Of one all-gather, reduce-scatter or all-reduce in which each rank sends so much."""
        if self.size == 1:
            return 0.0
        inside = self.members_per_node(hardware)
        rate = hardware.node_bytes_per_second
        if inside < self.size:
            rate = min(rate, inside * hardware.network_bytes_per_second)
        return sent_bytes / (rate * LINKS_REACHED) + LATENCY * log2(self.size)

    def exchange_seconds(self, sent_bytes: float, hardware: Hardware) -> float:
        """Of one all-to-all: the part for other nodes leaves through the rank's own network
        card."""
        if self.size == 1:
            return 0.0
        others = self.size - 1
        inside = self.members_per_node(hardware) - 1
        near = sent_bytes * inside / others
        far = sent_bytes * (others - inside) / others
        slower = max(near / hardware.node_bytes_per_second, far / hardware.network_bytes_per_second)
        return slower / LINKS_REACHED + LATENCY * log2(self.size)


def step_seconds(model: MemoryModel, load: Load, hardware: Hardware) -> float:
    """Of one optimizer step, documents taken as long as the samples."""
    layout, (tp, pp, cp), count = load.layout, load.layout.sizes, load.num_microbatches
    layers = _layers_of_slowest_rank(model, load)
    compute = _compute_seconds(model, load, hardware)
    inner = layers * (
        _tensor_seconds(model, load, hardware) + _context_seconds(model, load, hardware)
    )
    between = 0.0
    if pp > 1:
        sent = model.compute_bytes * load.tokens_between * model.config.hidden_size
        between = (
            2
            * layout.stages_per_rank
            * Axis(pp, tp * cp * load.data_parallel_size).exchange_seconds(sent, hardware)
        )
    busy = count * (compute + inner + between)
    waiting = idle_share(layout.schedule, pp, layout.stages_per_rank, count)
    sharded = _sharding_seconds(model, load, hardware)
    # Parameters and gradients travel while layers compute; what is more than the computing has
    # nothing to hide behind.
    hidden = min(sharded, count * compute)
    exposed = sharded - hidden + SLOWED * hidden
    return busy * (1 + waiting) + exposed


def _layers_of_slowest_rank(model: MemoryModel, load: Load) -> int:
    stages = load.layout.pipeline_model_parallel_size * load.layout.stages_per_rank
    return -(-model.config.num_layers // stages) * load.layout.stages_per_rank


def _compute_seconds(model: MemoryModel, load: Load, hardware: Hardware) -> float:
    """Of a microbatch on the pipeline's slowest rank: its layers, and on the last one the
    logits."""
    config, (tp, _, cp), tokens = (
        model.config,
        load.layout.sizes,
        load.seq_length * load.micro_batch_size,
    )
    passes = Passes.of(load.memory, load.layout.sequence_parallel)
    qkv, output, mlp = _matrix_parameters(config)
    attention = (
        4 * config.num_attention_heads * config.head_size * tokens * (load.seq_length + 1) / 2
    )
    # An uneven split of heads makes the rank with most heads the slowest.
    heads = Heads.of(config, load.layout)
    attention *= heads.m * load.layout.context_levels[0] / heads.N
    layer = (
        2 * tokens * (qkv * passes.qkv + output * passes.output + mlp * passes.mlp)
        + attention * passes.attention
    )
    logits = 2 * config.padded_vocab_size(model.vocab_size) * config.hidden_size * tokens
    return (
        (_layers_of_slowest_rank(model, load) * layer + logits * 3)
        / (tp * cp)
        / (hardware.flops * REACHED)
    )


def _matrix_parameters(config: ModelConfig) -> tuple[int, int, int]:
    """A layer's weights: before the attention, after it, of the MLP."""
    D = config.hidden_size
    H = config.head_size
    qkv = D * H * (config.num_attention_heads + 2 * config.num_kv_heads)
    return qkv, D * H * config.num_attention_heads, 3 * D * config.ffn_hidden_size


def _tensor_seconds(model: MemoryModel, load: Load, hardware: Hardware) -> float:
    """Sums over tp of one layer and microbatch.

    Under sequence_parallel each is an all-gather and a reduce-scatter of together the same bytes.
    """
    tp = load.layout.tensor_model_parallel_size
    sent = 2 * (tp - 1) / tp * model.compute_bytes * load.tokens * model.config.hidden_size
    passes = Passes.of(load.memory, load.layout.sequence_parallel)
    return passes.sums * Axis(tp, 1).ring_seconds(sent, hardware)


def _context_seconds(model: MemoryModel, load: Load, hardware: Hardware) -> float:
    """Exchanges over cp of one layer and microbatch (parallel/ulysses.py, parallel/context.py count
    the elements)."""
    tp, (a2a, gather) = load.layout.tensor_model_parallel_size, load.layout.context_levels
    heads = Heads.of(model.config, load.layout)
    passes = Passes.of(load.memory, load.layout.sequence_parallel)
    row = model.compute_bytes * load.tokens * model.config.head_size
    to_heads = (a2a - 1) / a2a * row * (heads.N + 2 * heads.k * a2a)
    to_tokens = (a2a - 1) / a2a * row * heads.m * a2a
    exchange = Axis(a2a, tp)
    gathered = 2 * (gather - 1) * row * a2a * heads.k
    return (
        passes.to_heads * exchange.exchange_seconds(to_heads, hardware)
        + passes.to_tokens * exchange.exchange_seconds(to_tokens, hardware)
        + passes.gathers * Axis(gather, tp * a2a).ring_seconds(gathered, hardware)
    )


def _sharding_seconds(model: MemoryModel, load: Load, hardware: Hardware) -> float:
    """Gathering parameters and reducing gradients over dp x cp in a whole step."""
    layout, (tp, pp, _), count = load.layout, load.layout.sizes, load.num_microbatches
    held = max(model.whole(layout, rank) for rank in {0, pp - 1})
    part = (load.shards - 1) / load.shards
    reductions = 1 if load.whole_gradients else count
    gathers = 2 * count if layout.sharding_strategy == "optim_grads_params" else 1
    axis = Axis(load.shards, tp)
    layers = _layers_of_slowest_rank(model, load)
    once = reductions * axis.ring_seconds(
        part * model.master_bytes * held, hardware
    ) + gathers * axis.ring_seconds(part * model.compute_bytes * held, hardware)
    return once + (layers - 1) * (reductions + gathers) * axis.ring_seconds(0, hardware)
