"""One training step: forward and backward over the microbatches, reduce, clip, update.

The loss is the sum over targets divided by the target count of the whole global batch, counted
before the first forward; gradients are then summed over all ranks that saw different tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from model.build import tied_copies
from model.gpt import GPTStage, Microbatch
from parallel.collectives import all_reduce
from parallel.config import ShardingStrategy
from parallel.layout import Layout
from parallel.shard import own_shard, set_microbatch
from parallel.tensor import tp_placement
from pretrain.guards.spikes import NO_LIMITS, Limits
from pretrain.optimizer import update
from pretrain.processes.heartbeat import WAITING_FOR_DEVICE, Heartbeat
from pretrain.processes.stop import StopRequest
from pretrain.qk_clip import LogitWatch

if TYPE_CHECKING:
    # It brings torch's compiler, of a second: a run without pipeline stages needs neither.
    from parallel.pipeline import Pipeline

CLIP_EPSILON = 1e-6
"""Added to the norm before dividing by it, as torch's clip_grad_norm_ does."""


class CountedMicrobatch(Microbatch, Protocol):
    """A microbatch that knows how many targets this rank's slice of it has."""

    num_targets: int


@dataclass(frozen=True)
class StepResult:
    """What one training step came to."""

    loss: float
    """Mean over the global batch's targets, nats."""
    num_targets: int
    grad_norm: float
    """Global L2 norm before clipping."""
    skipped: bool
    """True = nothing was updated: the loss or the norm was not finite, or beyond its limit."""
    max_attention_logit: float | None = None
    """The largest of all heads, before any cap; None where it is not measured."""
    qk_clipped_heads: int | None = None
    """Query heads that QK-clip scaled down; None without it."""


@dataclass(frozen=True)
class Scores:
    """The scores of a global batch: one entry per microbatch and dp rank.

    That of microbatch j of data rank d is number j x dp_size + d.
    """

    loss_sums: np.ndarray
    """fp64, nats, summed over the microbatch's targets."""
    num_targets: np.ndarray
    """int64."""
    num_correct: np.ndarray
    """int64, targets to which the model gave the largest logit of all ids."""

    def in_order(self, numbers: np.ndarray) -> "Scores":
        """Sort the entries by what they are of, where that was dealt by cost.

        Args:
            numbers: of what each entry is, int64 [entries].
        """
        order = np.argsort(numbers)
        return Scores(self.loss_sums[order], self.num_targets[order], self.num_correct[order])


# ---------------------------------------------------------------- forward and backward


def count_targets(microbatches: Sequence[CountedMicrobatch], layout: Layout) -> torch.Tensor:
    """Count the targets of the global batch over all microbatches, dp and cp ranks.

    Returns:
        int64 scalar on the device.
    """
    own = sum(batch.num_targets for batch in microbatches)
    # Filled by a kernel: a copy from the host would wait for the device.
    count = torch.full((), own, dtype=torch.int64, device=layout.device)
    return all_reduce(count, layout.dp_cp)


class Stepper:
    """Runs steps of this rank's stages; keeps the pipelines of the shapes that it has met.

    With a `stop`, any step ends with `Interrupted` between two of its microbatches once somebody
    asked to stop (under pipeline parallelism before the first). Gradients and gathered weights are
    then left as they are.
    """

    def __init__(
        self,
        stages: list[GPTStage],
        layout: Layout,
        hidden_size: int,
        compute_dtype: torch.dtype,
        strategy: ShardingStrategy,
        stop: StopRequest | None = None,
        heartbeat: Heartbeat | None = None,
        logit_watch: LogitWatch | None = None,
    ):
        self.stop = stop
        self.logit_watch = logit_watch
        self.heartbeat = heartbeat or Heartbeat()
        self.stages = stages
        self.layout = layout
        self.strategy: ShardingStrategy = strategy
        self.hidden_size = hidden_size
        self.compute_dtype = compute_dtype
        self.pipelines: dict[tuple[int, int, bool], Pipeline] = {}

    def run(self, microbatches: Sequence[CountedMicrobatch], *, train: bool) -> tuple[float, int]:
        """Run forward (and backward) over all microbatches.

        Returns:
            The global loss in nats and the global number of targets, on every rank.
        """
        loss, num_targets = self.start(microbatches, train=train)
        return float(loss), int(num_targets)

    def start(
        self,
        microbatches: Sequence[CountedMicrobatch],
        *,
        train: bool,
        source_losses: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what `run` does without waiting for the device.

        Args:
            source_losses: fp64 [sources]; ranks of the last stage add their slices' sums of target
                losses, by source.

        Returns:
            Loss (fp64) and number of targets (int64), scalars on the device.
        """
        num_targets = count_targets(microbatches, self.layout)
        share = self._forward(microbatches, num_targets, train=train, source_losses=source_losses)
        return self._global_loss(share), num_targets

    def score(self, microbatches: Sequence[CountedMicrobatch]) -> Scores:
        """Score every microbatch of the global batch, without gradients, on every rank."""
        layout = self.layout
        parts: list[torch.Tensor] = []
        self._forward(microbatches, 1, train=False, scores=parts)
        # [microbatch, dp rank, (loss sum, targets, correct ones)]
        shape = (len(microbatches), layout.dp.size, 3)
        scores = torch.zeros(shape, dtype=torch.float64, device=layout.device)
        # Only the last stage has scores, the same on its tp ranks; cp ranks add their slices.
        if parts and layout.tp.is_first:
            scores[:, layout.dp.rank] = torch.stack(parts)
        columns = all_reduce(scores, layout.world).view(-1, 3).cpu().numpy().T
        loss_sums, num_targets, num_correct = columns
        return Scores(loss_sums, num_targets.astype(np.int64), num_correct.astype(np.int64))

    def _forward(
        self,
        microbatches: Sequence[CountedMicrobatch],
        num_targets: torch.Tensor | int,
        *,
        train: bool,
        scores: list[torch.Tensor] | None = None,
        source_losses: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Run all microbatches through this rank's stages, and back.

        Returns:
            The last stage's share of the loss; None on ranks without the last stage.
        """
        watch = self.logit_watch if train else None
        largest_logits = watch.largest if watch else None
        for stage in self.stages:
            stage.begin_step(microbatches, num_targets, scores, source_losses, largest_logits)
        try:
            if self.layout.pp.size > 1:
                self._check_stop()
                if train:
                    self.heartbeat.enter("forward and backward")
                return self._pipeline_for(microbatches, train=train).run()
            return self._accumulate(len(microbatches), train=train)
        finally:
            for stage in self.stages:
                stage.begin_step((), 1)

    def _check_stop(self) -> None:
        if self.stop is not None:
            self.stop.check()

    def _pipeline_for(
        self, microbatches: Sequence[CountedMicrobatch], *, train: bool
    ) -> "Pipeline":
        """Build the pipeline of this shape, or take the one that was built before."""
        from parallel.pipeline import Pipeline

        key = self._pipeline_key(microbatches, train=train)
        if key not in self.pipelines:
            self.pipelines[key] = Pipeline(
                self.stages,
                self.layout,
                len(microbatches),
                key[1],
                self.hidden_size,
                self.compute_dtype,
                train=train,
            )
        return self.pipelines[key]

    def _pipeline_key(
        self, microbatches: Sequence[CountedMicrobatch], *, train: bool
    ) -> tuple[int, int, bool]:
        """Return microbatches, tokens per rank and microbatch, and whether there is a backward."""
        tokens = microbatches[0].tokens.shape[0]
        if self.layout.sequence_parallel:
            tokens //= self.layout.tp.size
        return len(microbatches), tokens, train

    def has_trained(self, microbatches: Sequence[CountedMicrobatch]) -> bool:
        """Tell whether the pipeline of this shape has run: its first run meets its neighbours."""
        return self._pipeline_key(microbatches, train=True) in self.pipelines

    def _accumulate(self, count: int, *, train: bool) -> torch.Tensor:
        """Run the microbatches one after another, without a pipeline -> the sum of their losses."""
        (stage,) = self.stages
        # The first stage looks its tokens up itself (model/gpt.py: begin_step).
        no_input = torch.empty(0, device=self.layout.device)
        total: torch.Tensor | None = None
        with torch.set_grad_enabled(train):
            for i in range(count):
                self._check_stop()
                if train:
                    set_microbatch(stage, self.strategy, is_last=i == count - 1)
                    self.heartbeat.enter("forward")
                else:
                    self.heartbeat.record.sign()
                loss = stage(no_input)
                if train:
                    self.heartbeat.enter("backward")
                    loss.backward()
                total = loss.detach() if total is None else total + loss.detach()
        assert total is not None, "a step has at least one microbatch"
        return total

    def _global_loss(self, share: torch.Tensor | None) -> torch.Tensor:
        """Sum the last stage's shares over dp x cp; the same on its tp ranks, so one counts."""
        layout = self.layout
        total = torch.zeros((), dtype=torch.float64, device=layout.device)
        if share is not None and layout.tp.is_first:
            total += share
        return all_reduce(total, layout.world)


# ---------------------------------------------------------------- gradients


def sum_tied_gradients(stages: list[GPTStage], layout: Layout) -> None:
    """Add up the two gradients of a tied embedding, of its copies on the first and last stage."""
    grads = [own_shard(copy.grad) for copy in tied_copies(stages)]
    if len(grads) == 2:
        # Both copies are on this rank.
        grads[0].add_(grads[1])
        grads[1].copy_(grads[0])
    elif layout.embedding.size > 1 and grads:
        # The shard may be in the host's memory; the exchange is between devices.
        on_device = grads[0].to(layout.device)
        grads[0].copy_(all_reduce(on_device, layout.embedding))


def global_grad_norm(stages: list[GPTStage], layout: Layout) -> torch.Tensor:
    """Compute the L2 norm of the whole model's gradient, each element counted once.

    Shards over dp x cp and tp add up; a parameter replicated over tp counts on tp rank 0 only, a
    tied embedding on the first stage only.

    Returns:
        fp64 scalar on the device, the same on every rank.
    """
    grads = []
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert isinstance(parameter, DTensor)
            is_copy_of_first_stage = name == "embedding.weight" and not stage.is_first
            is_replicated = not isinstance(tp_placement(parameter), Shard)
            if not is_copy_of_first_stage and (layout.tp.is_first or not is_replicated):
                grads.append(own_shard(parameter.grad))
    norm = torch.zeros((), device=layout.device)
    if grads:
        norm = nn.utils.get_total_norm(grads, foreach=True)
    square = norm.to(layout.device, torch.float64) ** 2
    return all_reduce(square, layout.world).sqrt()


def clip_gradients(stages: list[GPTStage], norm: torch.Tensor, limit: float) -> None:
    """Scale all gradients so that their global norm is at most `limit`.

    The device decides, and the host does not wait for it.
    """
    grads = [own_shard(parameter.grad) for stage in stages for parameter in stage.parameters()]
    scale = torch.clamp(limit / (norm + CLIP_EPSILON), max=1.0)
    torch._foreach_mul_(grads, scale.to(grads[0].device, grads[0].dtype))


# ---------------------------------------------------------------- the step


def train_step(
    stepper: Stepper,
    optimizer: torch.optim.Optimizer,
    microbatches: Sequence[CountedMicrobatch],
    lr: float,
    clip_grad: float,
    limits: Limits = NO_LIMITS,
    before_update: Callable[[], None] | None = None,
    source_losses: torch.Tensor | None = None,
) -> StepResult:
    """Run forward, backward, reduction, clipping, and update with learning rate `lr`.

    The host waits for the device once, at the end, when all kernels of the step are on their way.

    Args:
        limits: of loss and gradient norm, beyond which nothing is updated.
        before_update: is called when nothing has written to the weights since the last update.
        source_losses: see `Stepper.start`.
    """
    values = queue_step(
        stepper, optimizer, microbatches, lr, clip_grad, limits, before_update, source_losses
    )
    # One transfer for all of them: here the host waits.
    stepper.heartbeat.enter(WAITING_FOR_DEVICE)
    loss_value, norm_value, target_count, *logits = values.tolist()
    is_finite = math.isfinite(loss_value) and math.isfinite(norm_value)
    is_good = is_finite and limits.allow(loss_value, norm_value)
    result = StepResult(loss_value, int(target_count), norm_value, skipped=not is_good)
    watch = stepper.logit_watch
    return result if watch is None else dataclasses.replace(result, **watch.describe(*logits))


def queue_step(
    stepper: Stepper,
    optimizer: torch.optim.Optimizer,
    microbatches: Sequence[CountedMicrobatch],
    lr: float,
    clip_grad: float,
    limits: Limits = NO_LIMITS,
    before_update: Callable[[], None] | None = None,
    source_losses: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do what `train_step` does without waiting for the device.

    Returns:
        Loss, gradient norm and number of targets, and what the stepper's `logit_watch` found:
        fp64 [3 or more] on the device.
    """
    stages = stepper.stages
    layout = stepper.layout
    watch = stepper.logit_watch
    if watch is not None:
        watch.begin_step()
    loss, num_targets = stepper.start(microbatches, train=True, source_losses=source_losses)
    stepper.heartbeat.enter("reducing gradients")
    sum_tied_gradients(stages, layout)
    norm = global_grad_norm(stages, layout)
    if clip_grad > 0:
        clip_gradients(stages, norm, clip_grad)
    if before_update is not None:
        stepper.heartbeat.enter("before the update")
        before_update()
    stepper.heartbeat.enter("updating the weights")
    is_good = is_good_step(loss, norm, limits)
    update(optimizer, lr, is_good)
    logits = [] if watch is None else watch.after_update(is_good)
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss, norm, num_targets.to(norm), *logits])


def is_good_step(loss: torch.Tensor, norm: torch.Tensor, limits: Limits) -> torch.Tensor:
    """Decide on the device whether the step may update: finite, and within the limits.

    Loss and norm are sums over all ranks, so that all decide alike.
    """
    is_finite = torch.isfinite(loss) & torch.isfinite(norm)
    return is_finite & (loss <= limits.loss) & (norm <= limits.grad_norm)
