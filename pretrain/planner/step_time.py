"""How long a step takes, by its parts, well enough to rank layouts.

It counts what is computed, what is sent over which link (traffic.py), and the pipeline's bubble.
"""

from dataclasses import dataclass

from model.attention_logits import TileSize
from model.config import ModelConfig
from parallel.schedule import idle_share
from pretrain.planner.hardware import Hardware
from pretrain.planner.head_counts import HeadCounts
from pretrain.planner.model_size import ATTENTION_OUTPUT, MLP, QKV
from pretrain.planner.pass_counts import count_passes
from pretrain.planner.pointwise import WEIGHT, ends_bytes, layer_bytes
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.traffic import (
    context_traffic,
    layers_of_slowest_rank,
    muon_traffic,
    pipeline_traffic,
    sharding_traffic,
    tensor_traffic,
)
from pretrain.planner.workload import Workload

UPDATE_BYTES = 40
"""Bytes that clipping and AdamW read and write for each parameter that a rank holds: the gradient,
the weight and both moments in fp32, counted by `bench traffic`."""
SCORE_BYTES = 8
"""Bytes that a GPU writes and reads for each attention score, in fp32, to find the largest."""


@dataclass(frozen=True)
class StepTime:
    """Holds the seconds of one optimizer step by part, of the pipeline's slowest rank."""

    products: float
    """Matrix products of the layers, with what is computed between them and recomputed."""
    attention: float
    logits: float
    """The output projection and the loss."""
    pointwise: float
    """Norms, gates, rotations, sums and the loss, where the hardware's row tells them apart."""
    overhead: float
    """Waiting for the host's calls."""
    tensor: float
    """Sums over tp."""
    context: float
    """Exchanges and gathers over cp."""
    pipeline: float
    """Handing on to the next stage."""
    imbalance: float
    """Waiting for the data rank whose documents take longest."""
    bubble: float
    """Waiting for the other stages.

    Where processes share cores, of both kinds of waiting only what the others' computing does not
    fill.
    """
    sharding_exposed: float
    """Gathers and reductions over dp x cp that have no computing to run beside."""
    sharding_slowdown: float
    """What computing loses to those that run beside it."""
    update: float
    """Clipping and the optimizer, with what Muon's exchanges take beside its computing."""
    sharding_hidden: float
    """Gathers and reductions that run beside computing: no part of the total."""

    @property
    def compute(self) -> float:
        """Seconds of computing, without the update."""
        return self.products + self.attention + self.logits + self.pointwise + self.overhead

    @property
    def parts(self) -> dict[str, float]:
        """The parts that make up the total, by name, in the order of a step."""
        return {name: value for name, value in vars(self).items() if name != "sharding_hidden"}

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(self.parts.values())


def estimate_step(model: MemoryModel, load: Workload, hardware: Hardware) -> StepTime:
    """Estimate one optimizer step by its parts."""
    # Computing, then what is sent inside a layer, then what stages hand on.
    products, logits = _product_seconds(model, load, hardware)
    seen = load.tokens_seen(model.config.windows)
    attention = _attention_seconds(model, load, hardware, seen)
    pointwise, overhead = _beside_products_seconds(model, load, hardware)
    compute = products + attention + logits + pointwise + overhead
    tensor = tensor_traffic(model, load, hardware).seconds
    context = sum(each.seconds for each in context_traffic(model, load, hardware))
    pipeline = pipeline_traffic(model, load, hardware).seconds
    busy = compute + tensor + context + pipeline
    more_seen = load.extra_flops_per_sample / (model.size.pair_flops * load.seq_length)
    extra = _attention_seconds(model, load, hardware, seen + more_seen) - attention
    imbalance, bubble = _waiting_seconds(load, hardware, busy, extra)
    # Parameters and gradients travel while layers compute; what is more than the computing has
    # nothing to hide behind.
    sharded = sum(each.seconds for each in sharding_traffic(model, load, hardware))
    # gloo and FSDP2 on a CPU send in the thread that computes: nothing is hidden.
    hidden = 0.0 if hardware.is_cpu else min(sharded, compute)
    found = StepTime(
        products=products,
        attention=attention,
        logits=logits,
        pointwise=pointwise,
        overhead=overhead,
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        imbalance=imbalance,
        bubble=bubble,
        sharding_exposed=sharded - hidden,
        sharding_slowdown=hardware.efficiency.overlap_slowdown * hidden,
        update=_update_seconds(model, load, hardware),
        sharding_hidden=hidden,
    )
    factor = hardware.efficiency.step_factor
    return StepTime(**{name: factor * seconds for name, seconds in vars(found).items()})


def step_seconds(model: MemoryModel, load: Workload, hardware: Hardware) -> float:
    """Estimate one optimizer step."""
    return estimate_step(model, load, hardware).total


def attention_efficiency(config: ModelConfig, hardware: Hardware) -> float:
    """Return the share of the data sheet's FLOP/s that the model's attention should reach."""
    return hardware.efficiency.of_attention(config.head_size, config.attention_backend)


def describe_assumptions(config: ModelConfig, hardware: Hardware) -> str:
    """Say in one line what the step times of different layouts are compared with."""
    efficiency = hardware.efficiency
    return (
        f"layout auto: step times assume {efficiency.products:g} of the data sheet's FLOP/s in "
        f"matrix products, {attention_efficiency(config, hardware):g} in attention (as measured on "
        f"an H100) and {efficiency.links:g} of the links"
    )


def _waiting_seconds(
    load: Workload, hardware: Hardware, busy: float, extra: float
) -> tuple[float, float]:
    """Estimate what a step takes beside the work of an average data rank: imbalance, bubble.

    Args:
        busy: seconds of an average data rank, with what is sent.
        extra: seconds of attention that the slowest one has beyond it.
    """
    layout = load.layout
    pp = layout.pipeline_model_parallel_size
    waiting = idle_share(layout.schedule, pp, layout.stages_per_rank, load.num_microbatches)
    # Tokens are the same on every rank, and so is all else that is computed and sent.
    slowest = busy + extra
    # On shared cores a step takes the longer of its longest chain, and of all its computing.
    imbalance = max(0.0, slowest / hardware.crowding - busy)
    whole = max(0.0, slowest * (1 + waiting) / hardware.crowding - busy)
    return imbalance, whole - imbalance


def _product_seconds(model: MemoryModel, load: Workload, hardware: Hardware) -> tuple[float, float]:
    """Estimate the matrix products of a step on the pipeline's slowest rank: layers', logits'.

    It has its layers, and on the last rank the logits.
    """
    config = model.config
    size = model.size
    tokens = load.seq_length * load.micro_batch_size
    passes = count_passes(model.config, load)
    products = (
        2
        * tokens
        * (
            size.layer_weights(*QKV) * passes.qkv
            + size.layer_weights(*ATTENTION_OUTPUT) * passes.output
            + size.layer_weights(*MLP) * passes.mlp
        )
    )
    logits = 3 * 2 * config.padded_vocab_size(model.vocab_size) * config.hidden_size * tokens
    layers = layers_of_slowest_rank(model, load)
    rate = _flops_of_microbatch(model, load, hardware)
    product_rate = rate * hardware.efficiency.products
    loss_rate = rate * (hardware.efficiency.loss or hardware.efficiency.products)
    # Cores that processes share work for the last stage while the other stages wait.
    share = 1 / load.layout.pipeline_model_parallel_size if hardware.crowding > 1 else 1
    return layers * products / product_rate, share * logits / loss_rate


def _attention_seconds(
    model: MemoryModel, load: Workload, hardware: Hardware, pairs_per_token: float
) -> float:
    """Estimate the attention of a step on the pipeline's slowest rank.

    Args:
        pairs_per_token: tokens that a token sees on average over the layers.
    """
    config = model.config
    pairs = load.seq_length * load.micro_batch_size * pairs_per_token
    # An uneven split of heads makes the rank with most heads the slowest.
    heads = HeadCounts.make(config, load.layout)
    imbalance = heads.m * load.layout.context_levels[0] / heads.N
    forward = 4 * config.num_attention_heads * config.head_size * pairs * imbalance
    layers = layers_of_slowest_rank(model, load)
    rate = _flops_of_microbatch(model, load, hardware) * attention_efficiency(config, hardware)
    of_forward = forward / rate
    of_layer = of_forward * count_passes(config, load).attention
    if model.measures_logits:
        of_layer += _measuring_seconds(model, load, hardware, of_forward, pairs_per_token)
    return layers * of_layer


def _flops_of_microbatch(model: MemoryModel, load: Workload, hardware: Hardware) -> float:
    """Return what the ranks that share a microbatch do in a second, over the microbatches.

    FLOPs of one microbatch divided by it are the seconds of a step.
    """
    tp, _, cp = load.layout.sizes
    return hardware.product_flops(model.compute_bytes) * tp * cp / load.num_microbatches


def _measuring_seconds(
    model: MemoryModel,
    load: Workload,
    hardware: Hardware,
    of_forward: float,
    pairs_per_token: float,
) -> float:
    """Estimate the measuring of a layer's largest attention logits on the slowest rank.

    It multiplies queries by keys once more: one of a forward's two products. A GPU also writes the
    scores to its memory and reads them, which takes longer; a CPU has a tile of them in its cache.

    Args:
        of_forward: seconds of attention's forward.
        pairs_per_token: tokens that a token sees on average over the layers.
    """
    product = of_forward / 2
    if hardware.is_cpu:
        return product
    config = model.config
    heads = HeadCounts.make(config, load.layout).m
    queries = load.seq_length * load.micro_batch_size // load.layout.context_levels[1]
    tile = TileSize.choose(queries, heads, config.head_size, model.compute_bytes, on_gpu=True)
    # A query is multiplied by all keys that another one of its block sees.
    keys = pairs_per_token + tile.queries
    scores = heads * queries * keys * load.num_microbatches
    rate = hardware.memory_bytes_per_second * hardware.efficiency.memory
    return max(product, SCORE_BYTES * scores / rate)


def _beside_products_seconds(
    model: MemoryModel, load: Workload, hardware: Hardware
) -> tuple[float, float]:
    """Estimate what the slowest rank does between its products: by the memory, and by the host."""
    efficiency = hardware.efficiency
    layers = layers_of_slowest_rank(model, load)
    count = load.num_microbatches
    overhead = efficiency.layer_overhead_seconds * layers * count
    if efficiency.pointwise is None:
        return 0.0, overhead
    of_activations = layers * layer_bytes(model, load) + ends_bytes(model, load)
    of_weights = WEIGHT * _most_parameters(model, load)
    memory = hardware.memory_bytes_per_second
    weights_share = efficiency.weights or efficiency.memory
    seconds = of_activations / efficiency.pointwise + of_weights / weights_share
    return count * seconds / memory, overhead


def _update_seconds(model: MemoryModel, load: Workload, hardware: Hardware) -> float:
    """Estimate clipping and the optimizer's update of the parameters that a rank holds."""
    held = _most_parameters(model, load) / load.shards
    rate = hardware.memory_bytes_per_second * hardware.efficiency.memory
    seconds = UPDATE_BYTES * held / rate
    return seconds + _muon_seconds(model, load, hardware)


def _muon_seconds(model: MemoryModel, load: Workload, hardware: Hardware) -> float:
    """Estimate Newton-Schulz on the busiest owner, and what its exchanges take beside it."""
    muon = model.muon
    if muon is None:
        return 0.0
    layers = layers_of_slowest_rank(model, load)
    operations = muon.flops(layers, load.layout.tensor_model_parallel_size, load.shards)
    rate = hardware.product_flops(muon.element_bytes) * hardware.efficiency.products
    computing = operations / rate
    traffic = muon_traffic(model, load, hardware)
    sent = sum(each.seconds for each in traffic)
    # While a bucket is computed the next one arrives and the last one goes back: the first that
    # arrives and the last that goes back have nothing beside them.
    beside = sent * (1 - 1 / traffic[0].calls)
    hidden = 0.0 if hardware.is_cpu else min(computing, beside)
    return computing + sent - hidden + hardware.efficiency.overlap_slowdown * hidden


def _most_parameters(model: MemoryModel, load: Workload) -> int:
    """Count the parameters of the pipeline's fullest stage on a tensor-parallel rank."""
    pp = load.layout.pipeline_model_parallel_size
    return max(model.count_parameters(load.layout, rank) for rank in {0, pp - 1})
