"""One training step: forward and backward over the microbatches, reduce, clip, update.

The loss is the sum over targets divided by the target count of the whole global batch, counted
before the first forward; gradients are then summed over all ranks that saw different tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import Shard

from model.build import tied_copies
from model.gpt import GPTStage, Microbatch
from parallel.collectives import all_reduce
from parallel.layout import Layout
from parallel.pipeline import Pipeline
from parallel.shard import set_microbatch
from pretrain.processes.stop import StopRequest


class CountedMicrobatch(Microbatch, Protocol):
    num_targets: int  # of this rank's slice


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean over the global batch's targets, nats."""
    num_targets: int
    grad_norm: float
    """Global L2 norm before clipping."""
    skipped: bool
    """True = the norm was not finite and nothing was updated."""


@dataclass(frozen=True)
class Scores:
    """Of each microbatch of a global batch, in the order of its samples: one entry per microbatch
    and dp rank."""

    loss_sums: np.ndarray
    """fp64, nats, summed over the microbatch's targets."""
    num_targets: np.ndarray
    """int64."""
    first_choices: np.ndarray
    """int64, targets to which the model gave the largest logit of all ids."""


def count_targets(microbatches: Sequence[CountedMicrobatch], layout: Layout) -> torch.Tensor:
    """Count the targets of the global batch: all microbatches, dp and cp ranks -> int64 scalar on
    the device."""
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
        strategy: str,
        stop: StopRequest | None = None,
    ):
        self.stop = stop
        self.stages = stages
        self.layout = layout
        self.strategy = strategy
        self.hidden_size = hidden_size
        self.compute_dtype = compute_dtype
        self.pipelines: dict[tuple, Pipeline] = {}

    def run(self, microbatches: Sequence[CountedMicrobatch], train: bool) -> tuple[float, int]:
        """Forward (and backward) over all microbatches -> (global loss in nats, global targets), on
        every rank."""
        loss, num_targets = self.start(microbatches, train)
        return float(loss), int(num_targets)

    def start(
        self, microbatches: Sequence[CountedMicrobatch], train: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what `run` does without waiting for the device -> (fp64 scalar, int64 scalar) on the
        device."""
        num_targets = count_targets(microbatches, self.layout)
        share = self._forward(microbatches, train, num_targets)
        return self._global_loss(share), num_targets

    def score(self, microbatches: Sequence[CountedMicrobatch]) -> Scores:
        """Forward without gradients -> the scores of every microbatch of the global batch, on every
        rank.

        Microbatch j of data rank d is number j x dp_size + d, as the loader deals the samples.
        """
        layout = self.layout
        parts = []
        self._forward(microbatches, False, 1, parts)
        scores = torch.zeros(
            len(microbatches), layout.dp.size, 3, dtype=torch.float64, device=layout.device
        )
        if (
            parts and layout.tp.is_first
        ):  # the same on the last stage's tp ranks; cp ranks add their slices
            scores[:, layout.dp.rank] = torch.stack(parts)
        scores = all_reduce(scores, layout.world).view(-1, 3).cpu().numpy()
        return Scores(scores[:, 0], scores[:, 1].astype(np.int64), scores[:, 2].astype(np.int64))

    def _forward(
        self,
        microbatches: Sequence[CountedMicrobatch],
        train: bool,
        num_targets: torch.Tensor | int,
        scores: list[torch.Tensor] | None = None,
    ) -> torch.Tensor | None:
        """All microbatches through this rank's stages, and back -> the last stage's share of the
        loss."""
        for stage in self.stages:
            stage.begin_step(microbatches, num_targets, scores)
        try:
            if self.layout.pp.size > 1:
                self._check_stop()
                return self._pipeline_for(microbatches, train).run()
            return self._accumulate(len(microbatches), train)
        finally:
            for stage in self.stages:
                stage.begin_step((), 1)

    def _check_stop(self) -> None:
        if self.stop is not None:
            self.stop.check()

    def _pipeline_for(self, microbatches: Sequence[CountedMicrobatch], train: bool) -> Pipeline:
        tokens = microbatches[0].tokens.shape[0]
        if self.layout.sequence_parallel:
            tokens //= self.layout.tp.size
        key = (len(microbatches), tokens, train)
        if key not in self.pipelines:
            self.pipelines[key] = Pipeline(
                self.stages,
                self.layout,
                len(microbatches),
                tokens,
                self.hidden_size,
                self.compute_dtype,
                train,
            )
        return self.pipelines[key]

    def _accumulate(self, count: int, train: bool) -> torch.Tensor:
        total, nothing, (stage,) = None, torch.empty(0, device=self.layout.device), self.stages
        with torch.set_grad_enabled(train):
            for i in range(count):
                self._check_stop()
                if train:
                    set_microbatch(stage, self.strategy, is_last=i == count - 1)
                loss = stage(nothing)
                if train:
                    loss.backward()
                total = loss.detach() if total is None else total + loss.detach()
        return total

    def _global_loss(self, share: torch.Tensor | None) -> torch.Tensor:
        """Sum of the last stage's shares over dp x cp; the same on its tp ranks, so one of them
        counts."""
        layout = self.layout
        total = torch.zeros((), dtype=torch.float64, device=layout.device)
        if share is not None and layout.tp.is_first:
            total += share
        return all_reduce(total, layout.world)


def sum_tied_gradients(stages: list[GPTStage], layout: Layout) -> None:
    """Add up the two gradients of a tied embedding whose copies live on the first and the last
    stage."""
    grads = [copy.grad.to_local() for copy in tied_copies(stages)]
    if len(grads) == 2:
        grads[0].add_(grads[1])
        grads[1].copy_(grads[0])
    elif layout.embedding.size > 1 and grads:
        grads[0].copy_(
            all_reduce(grads[0].to(layout.device), layout.embedding)
        )  # they may be in the host's memory


def global_grad_norm(stages: list[GPTStage], layout: Layout) -> torch.Tensor:
    """L2 norm of the whole model's gradient, each element counted once -> fp64 scalar, same on
    every rank.

    Shards over dp x cp and tp add up; a parameter replicated over tp counts on tp rank 0 only, a
    tied embedding on the first stage only.
    """
    grads = []
    for stage in stages:
        for name, parameter in stage.named_parameters():
            copy_of_first_stage = name == "embedding.weight" and not stage.is_first
            replicated = not isinstance(parameter.placements[-1], Shard)
            if not copy_of_first_stage and (layout.tp.is_first or not replicated):
                grads.append(parameter.grad.to_local())
    norm = (
        nn.utils.get_total_norm(grads, foreach=True)
        if grads
        else torch.zeros((), device=layout.device)
    )
    square = norm.to(layout.device, torch.float64) ** 2
    return all_reduce(square, layout.world).sqrt()


def clip_gradients(stages: list[GPTStage], norm: torch.Tensor, limit: float) -> None:
    """Scale all gradients so that their global norm is at most `limit`; the device decides, nobody
    waits for it."""
    grads = [parameter.grad.to_local() for stage in stages for parameter in stage.parameters()]
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(grads, scale.to(grads[0].device, grads[0].dtype))


def update(optimizer: torch.optim.Optimizer, lr: float, norm: torch.Tensor) -> None:
    """Take an optimizer step with learning rate `lr`, or none where the gradient's norm is not
    finite.

    The fused kernel reads that from the device, as torch.amp.GradScaler tells it: parameters,
    moments and their step counts then stay as they are.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    place = optimizer.param_groups[0]["params"][0].to_local().device
    optimizer.found_inf = (~torch.isfinite(norm)).to(place, torch.float32)
    optimizer.step()


def train_step(
    stepper: Stepper,
    optimizer: torch.optim.Optimizer,
    microbatches: Sequence[CountedMicrobatch],
    lr: float,
    clip_grad: float,
) -> StepResult:
    """Forward, backward, reduction, clipping and update with learning rate `lr`.

    The host waits for the device once, at the end, when all kernels of the step are on their way.
    """
    stages = stepper.stages
    layout = stepper.layout
    loss, num_targets = stepper.start(microbatches, train=True)
    sum_tied_gradients(stages, layout)
    norm = global_grad_norm(stages, layout)
    if clip_grad > 0:
        clip_gradients(stages, norm, clip_grad)
    update(optimizer, lr, norm)
    optimizer.zero_grad(set_to_none=True)
    loss_value, norm_value, target_count = torch.stack([loss, norm, num_targets.to(norm)]).tolist()
    return StepResult(
        loss_value, int(target_count), norm_value, skipped=not math.isfinite(norm_value)
    )
