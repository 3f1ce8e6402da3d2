"""From a configuration to this rank's stage of the model, sharded and ready to be filled."""

import torch

from model.config import ModelConfig
from model.gpt import GPTStage
from model.kernels import Attend
from model.sharding import shardings_for
from parallel.config import ShardingStrategy
from parallel.layout import Layout, single_process_layout
from parallel.shard import shard_module
from parallel.tensor import distribute_parameters


def build_stage(config: ModelConfig, vocab_size: int, layout: Layout, attend: Attend, *,
                strategy: ShardingStrategy, master_dtype: torch.dtype, compute_dtype: torch.dtype) -> GPTStage:
    """Make the stage, cut it over tp, shard it over dp x cp and allocate only what this rank keeps.

    Args:
        master_dtype: of the stored parameters and of the optimizer state.
        compute_dtype: of forward and backward.
    Returns:
        A stage whose parameters are allocated and not yet filled: call `initialize` or load a checkpoint.
    """
    stage = GPTStage(config, vocab_size, layout, attend).to(master_dtype)
    names = [name for name, _ in stage.named_parameters()]
    distribute_parameters(stage, shardings_for(names, config, layout.tp.size, layout.sequence_parallel),
                          layout.mesh["tp"])
    shard_module(stage, list(stage.layers.values()), layout, strategy,
                 None if compute_dtype == master_dtype else compute_dtype)
    return stage.to_empty(device=layout.device)


def build_whole_model(config: ModelConfig, vocab_size: int, tensors: dict[str, torch.Tensor], attend: Attend,
                      device: torch.device) -> GPTStage:
    """The whole model in one process without process groups, from its parameters by name."""
    stage = GPTStage(config, vocab_size, single_process_layout(device), attend)
    stage.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
    return stage.eval()


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Name -> full shape of every parameter of the whole model; allocates nothing."""
    stage = GPTStage(config, vocab_size, single_process_layout(torch.device("cpu")), attend=None)
    return {name: parameter.shape for name, parameter in stage.named_parameters()}


def check_layout(config: ModelConfig, vocab_size: int | None, tp: int, pp: int, cp: int) -> list[str]:
    """Why this model cannot be split into tp x pp x cp, as `name = value: rule. Fix: ...`."""
    problems = []
    heads, kv_heads = config.num_attention_heads, config.num_kv_heads
    for name, value in (("num_attention_heads", heads), ("ffn_hidden_size", config.ffn_hidden_size)):
        if value % tp:
            problems.append(f"tensor_model_parallel_size = {tp}: must divide {name} = {value}. "
                            f"Fix: one of {_divisors(value)}.")
    if kv_heads % tp and tp % kv_heads:
        fits = [n for n in _divisors(heads) if kv_heads % n == 0 or n % kv_heads == 0]
        problems.append(f"tensor_model_parallel_size = {tp}: must divide num_query_groups = {kv_heads} or be a "
                        f"multiple of it. Fix: one of {fits}.")
    if vocab_size is not None and config.padded_vocab_size(vocab_size) % tp:
        problems.append(f"tensor_model_parallel_size = {tp}: must divide the padded vocabulary = "
                        f"{config.padded_vocab_size(vocab_size)}. Fix: a --make-vocab-size-divisible-by that {tp} "
                        "divides.")
    if config.num_layers < pp:
        problems.append(f"pipeline_model_parallel_size = {pp}: each stage needs at least one of the "
                        f"{config.num_layers} layers. Fix: at most {config.num_layers}.")
    if heads % tp == 0 and heads // tp < cp:
        problems.append(f"context_parallel_size = {cp}: Ulysses gives each rank at least one of the {heads // tp} "
                        f"query heads of a tensor-parallel rank. Fix: at most {heads // tp}.")
    return problems


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, min(number, 1024) + 1) if number % n == 0]
