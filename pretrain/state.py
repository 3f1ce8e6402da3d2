"""The train state: this rank's stages of the model, their optimizer, and how far the run is."""

from dataclasses import dataclass, field

import torch
from torch import nn

from model.attention_backends.choice import Attend
from model.build import build_stages, tied_copies
from model.gpt import GPTStage
from model.init import initialize
from parallel.collectives import all_reduce
from parallel.layout import Layout
from parallel.shard import own_shard
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.progress import Progress
from pretrain.config.config import OptimizerConfig
from pretrain.guards.spikes import SpikeHistory
from pretrain.optimizer import build_optimizer, state_of
from pretrain.plan import Plan
from pretrain.schedule.phases import Phase


@dataclass
class TrainState:
    """What training changes, and what it has counted."""

    stages: list[GPTStage]
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Number of the last step."""
    clock: int = 0
    """Consumed tokens: positions, padding included."""
    last_batch: int = 0
    """Tokens of the last step's global batch."""
    real_tokens: int = 0
    """Consumed tokens that were not padding."""
    skipped_in_a_row: int = 0
    """Steps in a row without an update, since loss or gradient were not finite or a spike."""
    spikes: SpikeHistory = field(default_factory=SpikeHistory)
    """The last steps, against which spikes are measured."""
    wandb_run_id: str | None = None

    def resume(self, progress: Progress) -> None:
        """Continue the counts of a checkpoint."""
        # The step is not computed from the clock: with another batch size the same clock is another
        # number of steps.
        self.step = progress.step
        self.clock = progress.clock
        self.last_batch = progress.last_batch_tokens
        self.real_tokens = progress.real_tokens
        self.skipped_in_a_row = progress.skipped_in_a_row
        self.spikes = SpikeHistory.from_json(progress.spikes)
        self.wandb_run_id = progress.wandb_run_id

    def advance(self, batch_tokens: int, *, skipped: bool) -> None:
        """Count a step that was trained, or skipped: its data are consumed either way."""
        self.step += 1
        self.clock += batch_tokens
        self.last_batch = batch_tokens
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0


def master_dtype(config: OptimizerConfig) -> torch.dtype:
    """Choose the dtype of the stored weights and of the optimizer's state."""
    return torch.float64 if config.fp64 else torch.float32


def compute_dtype(config: OptimizerConfig) -> torch.dtype:
    """Choose the dtype of forward and backward."""
    return torch.bfloat16 if config.bf16 else master_dtype(config)


def build_state(plan: Plan, phase: Phase, layout: Layout, attend: Attend) -> TrainState:
    """Build this rank's part of the model and its optimizer, with fresh or loaded weights."""
    config = plan.config
    stages = build_stages(
        config.model,
        plan.vocab_size,
        layout,
        attend,
        strategy=phase.layout.sharding_strategy,
        master_dtype=master_dtype(config.optimizer),
        compute_dtype=compute_dtype(config.optimizer),
        optimizer_on_host=config.optimizer.optimizer_cpu_offload,
    )
    # The state of the optimizer exists before a load fills it.
    state = TrainState(stages, build_optimizer(stages, config.model, config.optimizer))
    folder = plan.start.folder
    if folder is None:
        initialize(stages, config.model, layout, config.optimizer.seed)
        return state
    tensors = checkpoint_tensors(state, with_optimizer=not plan.starts_fresh_optimizer)
    checkpoint.load(folder, tensors, layout.world, vocab_size=plan.vocab_size)
    fill_tied_copy(state)
    if plan.resumed is not None:
        state.resume(plan.resumed)
    return state


def checkpoint_tensors(state: TrainState, *, with_optimizer: bool) -> dict[str, torch.Tensor]:
    """Collect everything that a checkpoint holds, flat, by parameter name.

    Names say nothing of positions or groups, so that any layout can load them. A tied embedding has
    one name; where both copies are here it is the first stage's.
    """
    tensors: dict[str, torch.Tensor] = {}
    for stage in state.stages:
        for name, parameter in stage.named_parameters():
            assert isinstance(parameter, nn.Parameter)
            if f"model.{name}" in tensors:
                continue  # the last stage's copy of a tied embedding
            tensors[f"model.{name}"] = parameter.detach()
            if with_optimizer:
                moments = state_of(state.optimizer, parameter)
                tensors |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    return tensors


def fill_tied_copy(state: TrainState) -> None:
    """Give the last stage's tied embedding what a load gave to the first stage's.

    Only where both are on this rank; on others each has loaded its own.
    """
    copies = tied_copies(state.stages)
    if len(copies) != 2:
        return
    source, target = copies
    # Weights and moments: the two copies must stay the same bit for bit.
    to_fill = state_of(state.optimizer, target)
    with torch.no_grad():
        target.copy_(source)
        for key, value in state_of(state.optimizer, source).items():
            to_fill[key].copy_(value)


def weights_are_finite(state: TrainState, layout: Layout) -> bool:
    """Tell whether no weight of any rank is NaN or infinite; collective over the world."""
    shards = [own_shard(parameter) for stage in state.stages for parameter in stage.parameters()]
    spoilt = sum(int(not torch.isfinite(shard).all()) for shard in shards)
    count = torch.full((), spoilt, dtype=torch.int64, device=layout.device)
    return int(all_reduce(count, layout.world)) == 0
