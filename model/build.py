"""Making this rank's stages of the model, sharded and ready to be filled."""

import torch
from torch import nn

from model.attention_backends.backend import Attend
from model.config import ModelConfig
from model.gpt import GPTStage
from model.scoring import PLAIN
from model.sharding import shardings_for
from parallel.config import LayoutConfig, ShardingStrategy
from parallel.layout import Layout, single_process_layout
from parallel.shard import shard_module
from parallel.tensor import distribute_parameters


def build_stages(
    config: ModelConfig,
    vocab_size: int,
    layout: Layout,
    attend: Attend,
    *,
    strategy: ShardingStrategy,
    master_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    optimizer_on_host: bool = False,
) -> list[GPTStage]:
    """Make this rank's stages: cut over tp, sharded over dp x cp, only this rank's part allocated.

    Args:
        master_dtype: the stored parameters' and the optimizer state's.
        compute_dtype: that of forward and backward.
        optimizer_on_host: keep the parameters' shards, and so the optimizer, in the host's memory;
            a CPU always does.

    Returns:
        Stages in the order of `layout.stages`, their parameters allocated and not yet filled: call
        `initialize` or load a checkpoint.
    """
    assert layout.mesh is not None, "stages are built for ranks in process groups"
    stages = []
    # A CPU's device memory is the host's already.
    on_host = optimizer_on_host and layout.device.type != "cpu"
    for number in layout.stages:
        # On the meta device: nothing of the whole stage is ever allocated.
        stage = GPTStage(config, vocab_size, layout, attend, number).to(master_dtype)
        names = [name for name, _ in stage.named_parameters()]
        # Tensor parallelism cuts first, then FSDP2 shards what is left by rows.
        distribute_parameters(
            stage,
            shardings_for(names, config, layout.tp.size, layout.sequence_parallel),
            layout.mesh["tp"],
        )
        shard_module(
            stage,
            list(stage.layers.values()),
            layout,
            strategy,
            None if compute_dtype == master_dtype else compute_dtype,
            on_host=on_host,
        )
        stages.append(stage.to_empty(device="cpu" if on_host else layout.device))
    return stages


def tied_copies(stages: list[GPTStage]) -> list[nn.Parameter]:
    """Return the copies of a tied embedding on this rank.

    There are two where the first and the last stage share a rank.
    """
    return [
        stage.embedding.weight
        for stage in stages
        if stage.tied and (stage.is_first or stage.is_last)
    ]


def build_whole_model(
    config: ModelConfig,
    vocab_size: int,
    tensors: dict[str, torch.Tensor],
    attend: Attend,
    device: torch.device,
) -> GPTStage:
    """Build the whole model in one process without process groups, from its parameters by name."""
    stage = GPTStage(config, vocab_size, single_process_layout(device), attend)
    # The stage is on the meta device: its parameters are replaced, not copied into.
    stage.load_state_dict(
        {name: tensor.to(device) for name, tensor in tensors.items()}, assign=True
    )
    return stage.eval()


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Return the full shape of every parameter of the whole model by name; allocate nothing."""
    layout = single_process_layout(torch.device("cpu"))
    stage = GPTStage(config, vocab_size, layout, _attend_to_nothing)
    return {name: parameter.shape for name, parameter in stage.named_parameters()}


def _attend_to_nothing(_q, _k, _v, _documents, _scoring=PLAIN, _sinks=None, /) -> torch.Tensor:
    raise AssertionError("a stage on the meta device is asked for its shapes only")


def check_layout(config: ModelConfig, vocab_size: int | None, layout: LayoutConfig) -> list[str]:
    """List why this model cannot be split so, as `name = value: rule. Fix: ...`."""
    tp = layout.tensor_model_parallel_size
    vocabulary_problems = []
    if vocab_size is not None and config.padded_vocab_size(vocab_size) % tp:
        vocabulary_problems.append(
            f"tensor_model_parallel_size = {tp}: must divide the padded vocabulary = "
            f"{config.padded_vocab_size(vocab_size)}. Fix: a --make-vocab-size-divisible-by that "
            f"{tp} divides."
        )
    return [
        *_width_problems(config, tp),
        *vocabulary_problems,
        *_depth_problems(config, layout),
        *_context_problems(config, layout),
    ]


def _width_problems(config: ModelConfig, tp: int) -> list[str]:
    """Check that tp ranks can share the heads and the MLP's width."""
    problems = []
    heads = config.num_attention_heads
    kv_heads = config.num_kv_heads
    for name, value in (
        ("num_attention_heads", heads),
        ("ffn_hidden_size", config.ffn_hidden_size),
    ):
        if value % tp:
            problems.append(
                f"tensor_model_parallel_size = {tp}: must divide {name} = {value}. "
                f"Fix: one of {_divisors(value)}."
            )
    # Fewer key/value heads than ranks are copied to several ranks each, evenly.
    if kv_heads % tp and tp % kv_heads:
        fits = [n for n in _divisors(heads) if kv_heads % n == 0 or n % kv_heads == 0]
        problems.append(
            f"tensor_model_parallel_size = {tp}: must divide num_query_groups = {kv_heads} or be a "
            f"multiple of it. Fix: one of {fits}."
        )
    return problems


def _depth_problems(config: ModelConfig, layout: LayoutConfig) -> list[str]:
    """Check that each pipeline stage gets a layer."""
    pp = layout.pipeline_model_parallel_size
    per_rank = layout.stages_per_rank
    if config.num_layers >= pp * per_rank:
        return []
    each = f" with {per_rank} stages on each rank" if per_rank > 1 else ""
    return [
        f"pipeline_model_parallel_size = {pp}{each}: each stage needs at least one of the "
        f"{config.num_layers} layers. Fix: lower it or num_virtual_stages_per_pipeline_rank to at "
        f"most {config.num_layers} stages together, or another --pipeline-schedule."
    ]


def _context_problems(config: ModelConfig, layout: LayoutConfig) -> list[str]:
    """Check that each rank of an all-to-all gets a query head."""
    tp, _, cp = layout.sizes
    heads, rest = divmod(config.num_attention_heads, tp)
    # Heads that tp does not divide are refused for that.
    if rest or heads >= layout.context_levels[0]:
        return []
    # As many ranks as possible exchange heads; the others gather keys and values.
    exchanging = max(n for n in range(1, heads + 1) if cp % n == 0)
    return [
        f"context_parallel_size = {cp}: Ulysses gives each rank at least one of the {heads} query "
        f"heads of a tensor-parallel rank. Fix: at most {heads}, or two levels: --cp-comm-type "
        f"a2a+allgather --hierarchical-context-parallel-sizes {exchanging} {cp // exchanging}."
    ]


def _divisors(number: int) -> list[int]:
    """Return the divisors of a number that could be a size of tp."""
    return [n for n in range(1, min(number, 1024) + 1) if number % n == 0]
