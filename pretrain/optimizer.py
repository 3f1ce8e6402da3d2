"""The optimizer: fused AdamW over this rank's shards, or Muon beside it (muon/).

To add another, choose it in `build_optimizer` by a setting, and give its state from the start:
whatever `state_of` returns for a parameter is saved and loaded by its name, sharded like the
parameter or as a plain tensor. An optimizer that keeps more or less than two moments also needs its
bytes in planner/rank_bytes.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from model.config import ModelConfig
from model.gpt import GPTStage
from parallel.shard import own_shard
from pretrain.config.config import OptimizerConfig
from pretrain.muon.muon import Muon
from pretrain.muon.owners import heads_of
from pretrain.parameter_groups import parameter_groups


class ShardedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, given this rank's shards as plain tensors.

    As DTensors their lists pass through a dispatcher that takes longer than the kernel.
    """

    found_inf: torch.Tensor | None = None
    """1.0 where the step must change nothing, as torch.amp.GradScaler tells a fused optimizer."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore[bad-override]
        """Update every shard from its gradient."""
        assert closure is None, "a step runs forward and backward by itself"
        for group in self.param_groups:
            parameters = group["params"]
            states = [self.state[parameter] for parameter in parameters]
            beta1, beta2 = group["betas"]
            adamw(
                [own_shard(parameter) for parameter in parameters],
                [own_shard(parameter.grad) for parameter in parameters],
                [own_shard(state["exp_avg"]) for state in states],
                [own_shard(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=self.found_inf,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def build_optimizer(
    stages: Sequence[GPTStage], model: ModelConfig, config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Build the optimizer over this rank's shards, with all of its state."""
    groups = parameter_groups(stages, model, config)

    def make_adamw(of_groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        return _build_adamw(of_groups, config)

    if config.optimizer == "adam":
        # Torch's type for a group is a plain dict.
        return make_adamw([dict(group) for group in groups])
    return Muon(groups, make_adamw, stages[0].layout, config, lambda name: heads_of(name, model))


def _build_adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    optimizer = ShardedAdamW(
        groups,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )
    # The moments exist from the start, so that loading a checkpoint fills them in place.
    for parameter in (parameter for group in groups for parameter in group["params"]):
        # The dtype that torch itself gives to `step`, on the parameter's device as the fused kernel
        # wants it.
        device = own_shard(parameter).device
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """Return what the optimizer keeps of a parameter, by its names in a checkpoint."""
    return optimizer.state[parameter]


def update(optimizer: torch.optim.Optimizer, lr: float, is_good: torch.Tensor) -> None:
    """Take an optimizer step with learning rate `lr`, or none where `is_good` is false.

    AdamW's fused kernel and Muon read that from the device, as torch.amp.GradScaler tells it:
    parameters, moments and their step counts then stay unchanged.

    Args:
        is_good: a truth value on the device, the same on all ranks.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    # A stage may have no parameter of the first group.
    first = next(p for group in optimizer.param_groups for p in group["params"])
    found_inf = (~is_good).to(own_shard(first).device, torch.float32)
    # The name under which they look for it.
    optimizer.found_inf = found_inf  # pyrefly: ignore[missing-attribute]
    optimizer.step()
