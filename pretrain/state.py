"""The train state: this rank's stage of the model, its optimizer, and the clock."""

from dataclasses import dataclass

import torch
from torch import nn

from model.gpt import GPTStage
from pretrain.config import OptimizerConfig


@dataclass
class TrainState:
    stage: GPTStage
    optimizer: torch.optim.Optimizer
    clock: int = 0
    """Positions consumed."""
    real_tokens: int = 0
    """Tokens among them that were not padding."""
    skipped_in_a_row: int = 0
    """Steps in a row without an update because the gradient was not finite."""
    wandb_run_id: str | None = None


def build_optimizer(stage: GPTStage, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Fused AdamW over this rank's shards; matrices decay, norms and biases do not.

    The moments exist from the start, so that loading a checkpoint fills them in place.
    """
    decayed = [p for p in stage.parameters() if p.dim() > 1]
    plain = [p for p in stage.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.adam_beta1, config.adam_beta2),
                                  eps=config.adam_eps, fused=True)
    for parameter in stage.parameters():
        # The dtype that torch itself gives to `step`, on the parameter's device as the fused kernel wants it.
        device = parameter.to_local().device
        optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device=device),
                                      "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return optimizer


def checkpoint_tensors(state: TrainState, with_optimizer: bool) -> dict[str, torch.Tensor]:
    """Flat name -> tensor of everything a checkpoint holds, by parameter name: no positions, no groups."""
    tensors = {}
    for name, parameter in state.stage.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        tensors[f"model.{name}"] = parameter.detach()
        if with_optimizer:
            moments = state.optimizer.state[parameter]
            tensors |= {f"optimizer.{name}.{key}": moments[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return tensors
