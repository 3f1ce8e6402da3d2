"""Make our trainer a contender of the step and memory benchmarks, and hold what all share.

Each in one process, from the same weights, on the same tokens, with the same AdamW, behind the same
calls: `forward_backward`, `step` (forward, backward, clip, AdamW) and `clear`.

Precision, with bfloat16: fp32 master weights, moments and update on both sides, forward and
backward on bf16 copies of the weights. Ours are FSDP2's; transformers' model is bf16 itself, and
its gradients and weights are copied to and from the masters in the step. Under torch.autocast
instead it keeps the residual stream in fp32, as its Trainer does.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from data.batch import IGNORE, Batch
from model.activation_memory.settings import MemoryConfig
from model.attention_backends.backend import Attend
from model.attention_backends.choice import choose_attention
from model.build import build_stages, parameter_shapes
from model.config import ModelConfig
from model.presets import PRESETS
from parallel.config import LayoutConfig, ShardingStrategy
from parallel.layout import Layout, has_bf16_units, single_process_layout, start_world
from parallel.ulysses import HeadSplit, chunk_counts
from pretrain.config.config import OptimizerConfig
from pretrain.optimizer import build_optimizer
from pretrain.step import Stepper, train_step

OURS = "ours"
THEIRS = "transformers"
CHECKPOINTED = "transformers, checkpointing"
ALST = "ALST's parts"
VOCABULARY = 8192
"""Vocabulary of the tiny preset's models here."""
STRATEGY: ShardingStrategy = "optim_grads"
"""The trainer's default ZeRO level (pretrain/config/config.py)."""
OPTIMIZER = OptimizerConfig()
"""Learning rate, betas, epsilon, weight decay and clipping of every contender."""
LOSS_CHUNK = 2048
"""Tokens whose logits exist at a time, in our chunked loss and in ALST's."""
MLP_TILE = 2048
"""Tokens in a tile of our tiled MLP on a GPU, where smaller products leave it waiting.
ALST's own rule makes tiles of as many tokens as the model is wide."""
HEAD_CHUNKS = 4
"""Groups of heads that attend one after another; fewer where a rank's heads cannot be cut into as
many."""

Dtype = Literal["float32", "bfloat16"]


class Contender(Protocol):
    """What takes part in a benchmark of training."""

    def forward_backward(self, sample: Batch) -> float:
        """Compute the gradients of the mean loss over the targets; returns that loss in nats."""

    def step(self, sample: Batch) -> float:
        """Do the same, then clip and update the weights."""

    def clear(self) -> None:
        """Drop the gradients."""


def default_dtype(device: torch.device) -> Dtype:
    """Choose bfloat16 where the device multiplies it in hardware."""
    return "bfloat16" if has_bf16_units(device) else "float32"


@dataclass(kw_only=True)
class BenchModel(ModelConfig, MemoryConfig):
    """Hold a model and the memory settings that it is measured with, in one record."""


def preset(name: str, **changes) -> BenchModel:
    """Make the configuration of a preset, with changes."""
    return BenchModel(model=name, **(PRESETS[name] | changes))


def lean(config: ModelConfig, tokens: int, mlp_tile: int = MLP_TILE, cp_size: int = 1) -> dict:
    """Choose settings that keep no intermediate result but the attention's output."""
    # As many chunks as a rank's heads allow, up to HEAD_CHUNKS.
    possible = chunk_counts(
        HeadSplit.make(config.num_attention_heads, config.num_kv_heads, cp_size)
    )
    return {
        "loss_chunk_tokens": LOSS_CHUNK,
        "mlp_tiles": max(1, tokens // mlp_tile),
        "attention_head_chunks": max(n for n in possible if n <= HEAD_CHUNKS),
        "recompute_granularity": "attention_kept",
    }


def make_sample(
    lengths: Sequence[int], vocab_size: int, seed: int, device: torch.device | str = "cpu"
) -> Batch:
    """Make documents of random tokens, with shifted labels and positions that restart."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (sum(lengths),), generator=generator)
    labels = tokens.roll(-1)
    edges = torch.tensor([0, *lengths]).cumsum(0)
    # A document's last token has no target.
    labels[edges[1:] - 1] = IGNORE
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Batch(tokens, labels, positions, edges.int()).to(device)


def causal_pairs(lengths: Sequence[int]) -> int:
    """Count the pairs of a query and a key that causal attention scores."""
    return sum(length * (length + 1) // 2 for length in lengths)


def initial_weights(
    config: ModelConfig, vocab_size: int, seed: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Draw fp32 weights by our names: matrices normal, as configured, vectors one."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in parameter_shapes(config, vocab_size).items():
        yield (
            name,
            (
                torch.ones(shape, device=device)
                if len(shape) == 1
                else torch.randn(shape, generator=generator, device=device).mul_(
                    config.init_method_std
                )
            ),
        )


@contextmanager
def one_process() -> Iterator[Layout]:
    """Make the layout of a world of this process alone, with the mesh that sharding needs.

    Nothing is sent, so gloo listens on the loopback device: it would look the machine's name up
    otherwise. torchrun's environment is not read.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    world = start_world(LayoutConfig(), dist.HashStore(), 0, 1)
    try:
        mesh = init_device_mesh(world.device.type, (1, 1), mesh_dim_names=("dp_cp", "tp"))
        yield replace(single_process_layout(world.device), mesh=mesh)
    finally:
        dist.destroy_process_group()


class Ours:
    """Train with the trainer's own stage, stepper, optimizer and step."""

    def __init__(
        self,
        config: BenchModel,
        vocab_size: int,
        dtype: Dtype,
        layout: Layout,
        seed: int,
        attend: Attend | None = None,
        master_dtype: torch.dtype = torch.float32,
        optimizer: bool = True,
        strategy: ShardingStrategy = STRATEGY,
    ):
        """Build the stage with the initial weights that all contenders have.

        Args:
            attend: instead of the one that the configuration chooses.
            optimizer: without it there is no `step`.
        """
        compute_dtype = getattr(torch, dtype)
        if attend is None:
            attend, _ = choose_attention(config.attention_backend, layout.device, compute_dtype)
        self.stages = build_stages(
            config,
            vocab_size,
            layout,
            attend,
            strategy=strategy,
            master_dtype=master_dtype,
            compute_dtype=compute_dtype,
        )
        # The memory settings of a phase, which the trainer sets as well.
        for stage in self.stages:
            stage.memory = config.settings
        with torch.no_grad():
            parameters = dict(self.stages[0].named_parameters())
            for name, weight in initial_weights(config, vocab_size, seed, layout.device):
                # FSDP2 has made a DTensor of it; this is rank 0, whose rows are the first.
                parameter: Any = parameters[name]
                local = parameter.to_local()
                local.copy_(weight[: local.shape[0]])
        self.optimizer = None
        if optimizer:
            self.optimizer = build_optimizer(self.stages, config, OPTIMIZER)
        self.stepper = Stepper(self.stages, layout, config.hidden_size, compute_dtype, strategy)

    def forward_backward(self, sample: Batch) -> float:
        """Compute the gradients of the mean loss; returns that loss in nats."""
        return self.stepper.run([sample], train=True)[0]

    def step(self, sample: Batch) -> float:
        """Do the same, then clip and update the weights."""
        assert self.optimizer is not None, "made without an optimizer"
        return train_step(
            self.stepper, self.optimizer, [sample], OPTIMIZER.lr, OPTIMIZER.clip_grad
        ).loss

    def clear(self) -> None:
        """Drop all gradients."""
        for parameter in self.stages[0].parameters():
            parameter.grad = None
