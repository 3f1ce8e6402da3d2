"""From a configuration to this rank's stage of the model, sharded and ready to be filled."""

import torch
from torch import nn

from model.attention_backends.backend import Attend
from model.config import ModelConfig
from model.gpt import GPTStage
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
    """Make this rank's stages, cut them over tp, shard them over dp x cp and allocate only what
    this rank keeps.

    Args:
        master_dtype: of the stored parameters and of the optimizer state.
        compute_dtype: of forward and backward.
        optimizer_on_host: keep the parameters' shards, and so the optimizer, in the host's memory;
            a CPU always does.
    Returns:
        Stages in the order of `layout.stages`, their parameters allocated and not yet filled: call
        `initialize` or load a checkpoint.
    """
    stages = []
    on_host = optimizer_on_host and layout.device.type != "cpu"
    for number in layout.stages:
        stage = GPTStage(config, vocab_size, layout, attend, number).to(master_dtype)
        names = [name for name, _ in stage.named_parameters()]
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
    """The copies of a tied embedding on this rank: none, one, or two where the first and last stage
    share a rank."""
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
    """The whole model in one process without process groups, from its parameters by name."""
    stage = GPTStage(config, vocab_size, single_process_layout(device), attend)
    stage.load_state_dict(
        {name: tensor.to(device) for name, tensor in tensors.items()}, assign=True
    )
    return stage.eval()


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Name -> full shape of every parameter of the whole model; allocates nothing."""
    stage = GPTStage(config, vocab_size, single_process_layout(torch.device("cpu")), attend=None)
    return {name: parameter.shape for name, parameter in stage.named_parameters()}


def check_layout(config: ModelConfig, vocab_size: int | None, layout: LayoutConfig) -> list[str]:
    """Why this model cannot be split so, as `name = value: rule. Fix: ...`."""
    problems = []
    (tp, pp, cp), heads, kv_heads = layout.sizes, config.num_attention_heads, config.num_kv_heads
    for name, value in (
        ("num_attention_heads", heads),
        ("ffn_hidden_size", config.ffn_hidden_size),
    ):
        if value % tp:
            problems.append(
                f"tensor_model_parallel_size = {tp}: must divide {name} = {value}. "
                f"Fix: one of {_divisors(value)}."
            )
    if kv_heads % tp and tp % kv_heads:
        fits = [n for n in _divisors(heads) if kv_heads % n == 0 or n % kv_heads == 0]
        problems.append(
            f"tensor_model_parallel_size = {tp}: must divide num_query_groups = {kv_heads} or be a "
            f"multiple of it. Fix: one of {fits}."
        )
    if vocab_size is not None and config.padded_vocab_size(vocab_size) % tp:
        problems.append(
            f"tensor_model_parallel_size = {tp}: must divide the padded vocabulary = "
            f"{config.padded_vocab_size(vocab_size)}. Fix: a --make-vocab-size-divisible-by that {tp} "
            "divides."
        )
    num_stages = pp * layout.stages_per_rank
    if config.num_layers < num_stages:
        each = (
            f" with {layout.stages_per_rank} stages on each rank"
            if layout.stages_per_rank > 1
            else ""
        )
        problems.append(
            f"pipeline_model_parallel_size = {pp}{each}: each stage needs at least one of the "
            f"{config.num_layers} layers. Fix: lower it or num_virtual_stages_per_pipeline_rank to at most "
            f"{config.num_layers} stages together, or another --pipeline-schedule."
        )
    if heads % tp == 0 and heads // tp < layout.context_levels[0]:
        have = heads // tp
        groups = max(n for n in range(1, have + 1) if cp % n == 0)
        problems.append(
            f"context_parallel_size = {cp}: Ulysses gives each rank at least one of the {have} query heads "
            f"of a tensor-parallel rank. Fix: at most {have}, or two levels: --cp-comm-type a2a+allgather "
            f"--hierarchical-context-parallel-sizes {groups} {cp // groups}."
        )
    return problems


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, min(number, 1024) + 1) if number % n == 0]
