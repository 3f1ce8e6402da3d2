"""What a rank sends in a step, by purpose: bytes, calls, and how long they take alone.

What is smaller by far is left out: the loss's numbers for each token, those of a norm over all
heads, those that all ranks compare, a tied embedding's gradient.
"""

from dataclasses import dataclass

from pretrain.planner.hardware import Hardware
from pretrain.planner.head_counts import HeadCounts
from pretrain.planner.pass_counts import count_passes
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.rank_group import RankGroup
from pretrain.planner.workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Describes what a rank sends for one purpose in a whole step."""

    axis: str
    """As in parallel/layout.py."""
    what: str
    operation: str
    group: RankGroup
    calls: float
    """Calls of a rank; a sum that is only gathered again counts a half."""
    sent_bytes: float
    """Bytes that a rank sends to others."""
    between_nodes_bytes: float
    """Those of them that its network card sends."""
    seconds: float
    """Time of all of it, one after the other and with nothing beside it."""


def step_traffic(model: MemoryModel, load: Workload, hardware: Hardware) -> list[Traffic]:
    """List what the pipeline's slowest rank sends in one step, axes of one rank left out."""
    found = [
        tensor_traffic(model, load, hardware),
        *context_traffic(model, load, hardware),
        pipeline_traffic(model, load, hardware),
        *sharding_traffic(model, load, hardware),
        *muon_traffic(model, load, hardware),
    ]
    return [traffic for traffic in found if traffic.group.size > 1]


def layers_of_slowest_rank(model: MemoryModel, load: Workload) -> int:
    """Count the layers of the pipeline rank that has most."""
    stages = load.layout.pipeline_model_parallel_size * load.layout.stages_per_rank
    return -(-model.config.num_layers // stages) * load.layout.stages_per_rank


def tensor_traffic(model: MemoryModel, load: Workload, hardware: Hardware) -> Traffic:
    """Return the sums over tp of the layers, and one each of the embedding and the logits.

    Under sequence_parallel each is an all-gather and a reduce-scatter of together the same bytes.
    """
    layout = load.layout
    tp = layout.tensor_model_parallel_size
    sent = 2 * (tp - 1) / tp * model.compute_bytes * load.tokens * model.config.hidden_size
    passes = count_passes(model.config, load)
    operation = "all-gather + reduce-scatter" if layout.sequence_parallel else "all-reduce"
    # The embedding sums in forward and the logits in backward; of a pipeline's ranks each has one.
    around = 1 if layout.pipeline_model_parallel_size > 1 else 2
    sums = passes.sums * layers_of_slowest_rank(model, load) + around
    what = "activations between the parts of a layer, and at both ends of the model"
    calls = sums * load.num_microbatches
    return _ring("tp", what, operation, RankGroup(tp, 1), calls, sent, hardware)


def context_traffic(model: MemoryModel, load: Workload, hardware: Hardware) -> list[Traffic]:
    """List the exchanges over cp of the layers.

    parallel/ulysses.py and parallel/context.py count the elements.
    """
    layout = load.layout
    tp = layout.tensor_model_parallel_size
    a2a, gather = layout.context_levels
    heads = HeadCounts.make(model.config, layout)
    passes = count_passes(model.config, load)
    # Bytes of one head of all this rank's tokens.
    head = model.compute_bytes * load.tokens * model.config.head_size
    to_heads = (a2a - 1) / a2a * head * (heads.N + 2 * heads.k * a2a)
    to_tokens = (a2a - 1) / a2a * head * heads.m * a2a
    gathered = 2 * (gather - 1) * head * a2a * heads.k
    # With one level all of cp trades tokens for heads.
    inner = RankGroup(a2a, tp)
    outer = RankGroup(gather, tp * a2a)
    name = "cp" if gather == 1 else "cp_a2a"
    layers = layers_of_slowest_rank(model, load) * load.num_microbatches
    return [
        _exchange(name, "q, k, v to heads", inner, passes.to_heads * layers, to_heads, hardware),
        _exchange(
            name,
            "attention's output to tokens",
            inner,
            passes.to_tokens * layers,
            to_tokens,
            hardware,
        ),
        _ring(
            "cp_gather",
            "keys and values of the other groups",
            "all-gather, reduce-scatter",
            outer,
            passes.gathers * layers,
            gathered,
            hardware,
        ),
    ]


def pipeline_traffic(model: MemoryModel, load: Workload, hardware: Hardware) -> Traffic:
    """Return what a rank hands to its neighbours of the pipeline: activations and gradients."""
    layout = load.layout
    tp, pp, cp = layout.sizes
    sent = model.compute_bytes * load.tokens_between * model.config.hidden_size
    neighbours = RankGroup(pp, tp * cp * load.data_parallel_size)
    calls = 2 * layout.stages_per_rank * load.num_microbatches if pp > 1 else 0
    seconds = neighbours.exchange_seconds(sent, hardware)
    far = neighbours.exchanged_between_nodes(sent, hardware)
    return Traffic(
        "pp",
        "activations and their gradients between stages",
        "send",
        neighbours,
        calls,
        calls * sent,
        calls * far,
        calls * seconds,
    )


def sharding_traffic(model: MemoryModel, load: Workload, hardware: Hardware) -> list[Traffic]:
    """List the gathers of parameters and the reductions of gradients over dp x cp."""
    layout = load.layout
    tp, pp, _ = layout.sizes
    held = max(model.count_parameters(layout, rank) for rank in {0, pp - 1})
    # A rank sends all but its own shard.
    sent = (load.shards - 1) / load.shards * held
    count = load.num_microbatches
    reductions = 1 if load.whole_gradients else count
    gathers = 2 * count if layout.sharding_strategy == "optim_grads_params" else 1
    # Each layer is a collective of its own.
    layers = layers_of_slowest_rank(model, load)
    group = RankGroup(load.shards, tp)
    gradients = model.master_bytes * sent / layers
    parameters = model.compute_bytes * sent / layers
    return [
        _ring(
            "dp_cp",
            "gradients",
            "reduce-scatter",
            group,
            reductions * layers,
            gradients,
            hardware,
            hardware.reduction_share,
        ),
        _ring("dp_cp", "parameters", "all-gather", group, gathers * layers, parameters, hardware),
    ]


def muon_traffic(model: MemoryModel, load: Workload, hardware: Hardware) -> list[Traffic]:
    """List the exchanges of Muon's matrices, of the rank that owns most; none without Muon."""
    muon = model.muon
    if muon is None:
        return []
    tp = load.layout.tensor_model_parallel_size
    group = RankGroup(tp * load.shards, 1)
    owners = muon.owners(layers_of_slowest_rank(model, load), tp, load.shards)
    # An owner gets its pieces of the others, and gives back as much.
    seconds = sum(
        group.exchange_seconds(muon.element_bytes * owners.others * owned, hardware)
        for owned in owners.fullest
    )
    most = max(owners.owned)
    sent = {
        "matrices to their owners": muon.element_bytes * (owners.pieces - most),
        "updates from the owners": muon.element_bytes * owners.others * most,
    }
    return [
        Traffic(
            "dp_cp_tp",
            what,
            "all-to-all",
            group,
            len(owners.fullest),
            size,
            group.exchanged_between_nodes(size, hardware),
            seconds,
        )
        for what, size in sent.items()
    ]


def _ring(
    axis: str,
    what: str,
    operation: str,
    group: RankGroup,
    calls: float,
    sent_bytes: float,
    hardware: Hardware,
    share: float | None = None,
) -> Traffic:
    """Describe `calls` collectives that go round, of `sent_bytes` each."""
    return Traffic(
        axis,
        what,
        operation,
        group,
        calls,
        calls * sent_bytes,
        calls * group.ringed_between_nodes(sent_bytes, hardware),
        calls * group.ring_seconds(sent_bytes, hardware, share),
    )


def _exchange(
    axis: str, what: str, group: RankGroup, calls: float, sent_bytes: float, hardware: Hardware
) -> Traffic:
    """Describe `calls` all-to-alls, of `sent_bytes` each."""
    return Traffic(
        axis,
        what,
        "all-to-all",
        group,
        calls,
        calls * sent_bytes,
        calls * group.exchanged_between_nodes(sent_bytes, hardware),
        calls * group.exchange_seconds(sent_bytes, hardware),
    )
