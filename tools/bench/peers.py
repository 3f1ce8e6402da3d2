"""Train transformers' Llama, alone or with ALST's parts, as a contender of the benchmarks."""

import math
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from data.batch import IGNORE, Batch
from model.config import ModelConfig
from model.hf.choice import architecture_of
from model.hf.config_json import huggingface_config
from parallel.layout import Layout
from tools.bench.contenders import (
    ALST,
    CHECKPOINTED,
    LOSS_CHUNK,
    OPTIMIZER,
    THEIRS,
    BenchModel,
    Contender,
    Dtype,
    Ours,
    initial_weights,
)


@dataclass(frozen=True, kw_only=True)
class PeerOptions:
    """Say how transformers runs."""

    checkpointing: bool = False
    """Gradient checkpointing of every layer, not reentrant."""
    tiled: bool = False
    """ALST's TiledMLP and TiledFusedLogitsLoss, from the deepspeed package."""
    autocast: bool = False
    """bf16 by torch.autocast over fp32 weights."""
    compiled: bool = False
    """torch.compile, layer by layer: compiled as a whole the model makes a mask, which keeps sdpa
    from its flash kernel (transformers/masking_utils.py: _ignore_causal_mask_sdpa never skips it
    while torch below 2.14 compiles)."""
    liger: bool = False
    """The kernels of the liger-kernel package."""
    batched: bool = False
    """Equal documents as the rows of a batch: sdpa needs no mask then, and may take its flash
    kernel."""


class Transformers:
    """Train the architecture's own class in transformers, with sdpa attention and a plain step."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        dtype: Dtype,
        way: PeerOptions,
        device: torch.device | str,
        seed: int,
        optimizer: bool = True,
        longest: int = 2**20,
    ):
        """Build the model from our configuration, with our initial weights.

        Args:
            optimizer: without it there are no fp32 masters and no `step`.
            longest: context that the model declares.
        """
        import transformers

        # transformers' own class for the same model.
        architecture = architecture_of(config)
        theirs = huggingface_config(
            architecture, config, vocab_size, config.rope, longest, "float32", None
        )
        settings = transformers.AutoConfig.for_model(theirs.pop("model_type"), **theirs)
        settings._attn_implementation = "sdpa"
        self.way = way
        self.autocast = way.autocast and dtype != "float32"
        if way.liger:
            # It replaces parts of the class before a model is made.
            from liger_kernel.transformers import _apply_liger_kernel

            _apply_liger_kernel(settings.model_type)
        with (
            torch.device(device),
            _default_dtype(torch.float32 if self.autocast else getattr(torch, dtype)),
        ):
            self.model = getattr(transformers, architecture.class_name)(settings).train()
        named = dict(self.model.named_parameters())
        masters: dict[str, nn.Parameter] = {}
        for name, weight in initial_weights(config, vocab_size, seed, device):
            # Our weights, under their names.
            parameter = named.pop(architecture.huggingface_name(name))
            parameter.data.copy_(weight[: parameter.shape[0]])
            # bf16 weights are copies of fp32 masters, which AdamW updates.
            if optimizer and parameter.dtype != torch.float32:
                masters[architecture.huggingface_name(name)] = nn.Parameter(
                    weight[: parameter.shape[0]]
                )
        # Every parameter has its weights.
        assert not named, named.keys()
        self.parameters = list(self.model.parameters())
        self.masters = (
            [masters[name] for name, _ in self.model.named_parameters()]
            if masters
            else self.parameters
        )
        self.optimizer = _adamw(self.masters) if optimizer else None
        self._set_up(way)

    def _set_up(self, way: PeerOptions) -> None:
        """Checkpoint, tile or compile the layers."""
        if way.checkpointing:
            self.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        if way.tiled:
            for layer in self.model.model.layers:
                layer.mlp.forward = types.MethodType(_tiled_mlp, layer.mlp)
        if way.compiled:
            for layer in self.model.model.layers:
                layer.compile()

    def forward_backward(self, sample: Batch) -> float:
        """Compute the gradients of the mean loss; returns that loss in nats."""
        # Documents side by side as rows, or one after another in one row.
        rows = len(sample.cu_seqlens) - 1 if self.way.batched else 1
        tokens, labels, positions = (
            x.view(rows, -1) for x in (sample.tokens, sample.labels, sample.positions)
        )
        precision = (
            torch.autocast(tokens.device.type, torch.bfloat16) if self.autocast else nullcontext()
        )
        with precision:
            if self.way.tiled:
                hidden = self.model.model(
                    input_ids=tokens, position_ids=positions, use_cache=False
                ).last_hidden_state
                loss = _tiled_loss(self.model, hidden, labels, sample.num_targets)
            else:
                loss = self.model(
                    input_ids=tokens,
                    position_ids=positions,
                    labels=labels,
                    shift_labels=labels,
                    use_cache=False,
                ).loss
        # Into bf16 weights, or fp32 ones under autocast.
        loss.backward()
        return float(loss.detach())

    def step(self, sample: Batch) -> float:
        """Do the same, then clip and update the weights."""
        loss = self.forward_backward(sample)
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad = parameter.grad.float()
                parameter.grad = None
        # As the trainer: clip by the global norm, update, copy back to bf16.
        nn.utils.clip_grad_norm_(self.masters, OPTIMIZER.clip_grad, foreach=True)
        assert self.optimizer is not None, "made without an optimizer"
        self.optimizer.step()
        self.clear()
        if self.masters is not self.parameters:
            with torch.no_grad():
                torch._foreach_copy_([*self.parameters], [*self.masters])
        return loss

    def clear(self) -> None:
        """Drop all gradients."""
        for parameter in (*self.parameters, *self.masters):
            parameter.grad = None


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make modules of this dtype inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the trainer's AdamW (pretrain/optimizer.py: build_optimizer) for plain tensors."""
    # Matrices decay, vectors do not.
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=OPTIMIZER.lr,
        betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2),
        eps=OPTIMIZER.adam_eps,
        fused=True,
    )


def _deepspeed():
    """Import ALST's parts; deepspeed looks for an accelerator at its import."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.sequence_parallel import ulysses_sp

    return ulysses_sp


def _tiled_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Run an MLP by TiledMLP, in tiles of about as many tokens as the model is wide.

    Its documentation's count of tiles is for one row; with several, a tile holds its part of each.
    """
    tiles = math.ceil(x.shape[0] * x.shape[1] / x.shape[2])
    weights = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
    return _deepspeed().TiledMLP.apply(type(self).forward, self, x, tiles, weights)


def _tiled_loss(
    model: Any, hidden: torch.Tensor, labels: torch.Tensor, num_targets: int
) -> torch.Tensor:
    """Compute the mean loss over the targets by TiledFusedLogitsLoss.

    It makes the output projection's gradient in its forward: a division after it would come too
    late.
    """

    def loss_of_tile(model, x, y):
        return (
            F.cross_entropy(model.lm_head(x).float(), y, ignore_index=IGNORE, reduction="sum")
            / num_targets
        )

    # Tiles of LOSS_CHUNK tokens, as ours.
    tiles = math.ceil(labels.numel() / LOSS_CHUNK)
    return _deepspeed().TiledFusedLogitsLoss.apply(
        loss_of_tile, model, hidden, labels, None, tiles, [model.lm_head.weight], "sum"
    )


PEERS = {
    THEIRS: PeerOptions(),
    CHECKPOINTED: PeerOptions(checkpointing=True),
    ALST: PeerOptions(checkpointing=True, tiled=True),
}

LOSS_TOLERANCES = (1e-3, 5e-3)
"""Largest relative differences between the losses of two contenders in their first and second step.
The second is after an update, in which bf16 gradients near zero come out with either sign."""


def make_contender(
    name: str,
    config: BenchModel,
    vocab_size: int,
    dtype: Dtype,
    layout: Layout,
    seed: int,
    **ways: bool,
) -> Contender:
    """Make a contender by its name: one of PEERS, or ours for any other name.

    Args:
        ways: further fields of a peer's PeerOptions.
    """
    if name in PEERS:
        return Transformers(
            config, vocab_size, dtype, replace(PEERS[name], **ways), layout.device, seed
        )
    return Ours(config, vocab_size, dtype, layout, seed)


def check_losses(losses: dict[str, list[float]]) -> None:
    """Compare the losses of each contender's first two steps. The second compares AdamW, too.

    Raises:
        RuntimeError: one differs from the first contender's by more than LOSS_TOLERANCES.
    """
    (first, expected), *others = losses.items()
    for name, found in others:
        for number, (one, other, tolerance) in enumerate(
            zip(expected, found, LOSS_TOLERANCES, strict=True), 1
        ):
            if not abs(one - other) <= tolerance * abs(one):
                raise RuntimeError(
                    f"loss of step {number}: {one:.6f} with {first}, {other:.6f} with {name}: more "
                    f"than {tolerance} apart, so their times and memory say nothing"
                )
