"""The train state: this rank's stages of the model, their optimizer, and the clock."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.tensor import Replicate

from model.build import tied_copies
from model.gpt import GPTStage
from parallel.collectives import all_reduce
from parallel.layout import Axis, Layout
from pretrain.config.config import OptimizerConfig


@dataclass
class TrainState:
    stages: list[GPTStage]
    optimizer: torch.optim.Optimizer
    clock: int = 0
    """Positions consumed."""
    last_batch: int = 0
    """Tokens of the step before it."""
    real_tokens: int = 0
    """Tokens among them that were not padding."""
    skipped_in_a_row: int = 0
    """Steps in a row without an update because the gradient was not finite."""
    steps_with_targets: int = 0
    """Steps of the run whose batch had a target."""
    wandb_run_id: str | None = None


def build_optimizer(stages: list[GPTStage], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Fused AdamW over this rank's shards; matrices decay, norms and biases do not.

    The moments exist from the start, so that loading a checkpoint fills them in place.
    """
    parameters = [p for stage in stages for p in stage.parameters()]
    decayed = [p for p in parameters if p.dim() > 1]
    plain = [p for p in parameters if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )
    for parameter in parameters:
        # The dtype that torch itself gives to `step`, on the parameter's device as the fused kernel
        # wants it.
        device = parameter.to_local().device
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def checkpoint_tensors(state: TrainState, with_optimizer: bool) -> dict[str, torch.Tensor]:
    """Flat name -> tensor of everything a checkpoint holds, by parameter name: no positions, no
    groups.

    A tied embedding has one name; where both copies are here it is the first stage's.
    """
    tensors = {}
    for name, parameter in (pair for stage in state.stages for pair in stage.named_parameters()):
        assert isinstance(parameter, nn.Parameter)
        if f"model.{name}" in tensors:
            continue
        tensors[f"model.{name}"] = parameter.detach()
        if with_optimizer:
            moments = state.optimizer.state[parameter]
            tensors |= {
                f"optimizer.{name}.{key}": moments[key] for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return tensors


def fill_tied_copy(state: TrainState) -> None:
    """After a load: give the last stage's tied embedding what the first stage's got, where both are
    on this rank."""
    copies = tied_copies(state.stages)
    if len(copies) == 2:
        (source, target), moments = copies, [state.optimizer.state[copy] for copy in copies]
        with torch.no_grad():
            target.copy_(source)
            for key, value in moments[0].items():
                moments[1][key].copy_(value)


def check_replicas(stages: list[GPTStage], layout: Layout) -> None:
    """Compare copies of a parameter bit for bit: over tp, and of a tied embedding over the first
    and last stage.

    Copies that drift apart (a gradient that was not reduced) look like a healthy run; a checkpoint
    would keep one of them at random.

    Raises:
        RuntimeError: on every rank of the world, naming the parameters on the ranks that hold them.
    """
    named = [pair for stage in stages for pair in stage.named_parameters()]
    problems = _differences(
        [(name, p) for name, p in named if isinstance(p.placements[-1], Replicate)],
        layout.tp,
        layout.device,
    )
    copies = tied_copies(stages)
    if len(copies) == 2 and not torch.equal(copies[0].to_local(), copies[1].to_local()):
        problems.append(f"embedding.weight over the two stages of rank {layout.world.rank}")
    if layout.embedding.size > 1:
        problems += _differences(
            [("embedding.weight", copy) for copy in copies], layout.embedding, layout.device
        )
    found = all_reduce(torch.tensor(len(problems), device=layout.device), layout.world)
    if found > 0:
        raise RuntimeError(
            f"copies of parameters are no longer the same: {'; '.join(problems) or 'on other ranks'}. "
            "Nothing is saved; the last checkpoint is good."
        )


def _differences(
    parameters: list[tuple[str, nn.Parameter]], axis: Axis, device: torch.device
) -> list[str]:
    """What differs over `axis`, one sentence or none."""
    if axis.size == 1 or not parameters:
        return []
    digests = [
        xxhash.xxh3_64_intdigest(p.to_local().detach().cpu().numpy().tobytes()) >> 1
        for _, p in parameters
    ]
    own = torch.tensor(digests, dtype=torch.int64, device=device)
    highest, lowest = (
        all_reduce(own.clone(), axis, op) for op in (dist.ReduceOp.MAX, dist.ReduceOp.MIN)
    )
    differing = [
        name
        for (name, _), same in zip(parameters, (highest == lowest).tolist(), strict=True)
        if not same
    ]
    return [f"{', '.join(differing[:5])} over {axis.name} ranks {axis.ranks}"] if differing else []
