"""Pipeline parallelism: torch.distributed.pipelining over our stages.

A stage module is called as `module(x)` once per microbatch, in order: `x` is the previous stage's
output, on the first stage a placeholder. The module looks up everything else about the microbatch
by itself. The last stage returns its share of the loss, already scaled: schedules sum it.

Source: torch.distributed.pipelining (stage.py, schedules.py); parallel/schedule.py names the
papers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FULL_BACKWARD,
    REDUCE_GRAD,
)

from parallel.layout import Layout
from parallel.schedule import SCHEDULES, ScheduleName
from parallel.shard import accumulate_gradients


def torch_schedule(name: ScheduleName) -> Callable[..., Any]:
    """Look up a schedule's class in torch.distributed.pipelining."""
    return getattr(pipelining, SCHEDULES[name].torch_class)


class Stage(PipelineStage):
    """A stage that adds up gradients in the reduction's dtype.

    It does so also where a schedule splits the backward.
    """

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)
        accumulate_gradients(self.submod)


class Pipeline:
    """A schedule for steps of `num_microbatches` activations of [tokens, hidden].

    Build another when one of these changes, and have one for training and one for evaluation:
    building is cheap and moves no data.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        layout: Layout,
        num_microbatches: int,
        tokens: int,
        hidden: int,
        dtype: torch.dtype,
        *,
        train: bool,
    ):
        """Build the stages and their schedule.

        Args:
            modules: of this rank's stages, in the order of `layout.stages`.
            tokens: per rank and microbatch.
            dtype: of the activations between stages.
            train: also run the backward.
        """
        self.train = train
        # What goes between stages, and what the last one gives.
        activation = torch.empty(tokens, hidden, dtype=dtype, device="meta", requires_grad=True)
        placeholder = torch.empty(1, dtype=torch.int64, device="meta")
        loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        loss = torch.empty((), dtype=loss_dtype, device="meta", requires_grad=True)
        # With inputs and outputs given, no stage runs an extra microbatch to find its shapes.
        self.stages = [
            Stage(
                module,
                number,
                layout.num_stages,
                layout.device,
                input_args=activation if number else placeholder,
                output_args=loss if number == layout.num_stages - 1 else activation,
                group=layout.pp.group,
            )
            for number, module in zip(layout.stages, modules, strict=True)
        ]
        # The stages give scaled losses already: sum them, and scale nothing.
        is_single = SCHEDULES[layout.schedule].takes_one_stage
        self.schedule = torch_schedule(layout.schedule)(
            self.stages[0] if is_single else self.stages,
            num_microbatches,
            loss_fn=lambda output, target: output,
            scale_grads=False,
        )
        if not train and not is_single:
            # With two stages on one rank in a row, torch's own evaluation asks for gradients that
            # do not exist.
            for backward in (FULL_BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, REDUCE_GRAD):
                self.schedule.register_custom_function(backward, _skip)
        # The schedule cuts inputs and targets into microbatches; ours carry nothing but their
        # number.
        self.placeholders = torch.zeros(num_microbatches, dtype=torch.int64, device=layout.device)

    def run(self) -> torch.Tensor | None:
        """Run all microbatches; return the summed loss on the last stage's rank, else None."""
        has_first = any(stage.is_first for stage in self.stages)
        has_last = any(stage.is_last for stage in self.stages)
        losses: list[torch.Tensor] | None = [] if has_last else None
        # The first stage is given the inputs, the last one the targets.
        args = (self.placeholders,) if has_first else ()
        options = {
            "target": self.placeholders if has_last else None,
            "losses": losses,
            "return_outputs": False,
        }
        if self.train:
            self.schedule.step(*args, **options)
        else:
            with torch.no_grad():
                self.schedule.eval(*args, **options)
            # Only a backward would free the activations.
            for stage in self.stages:
                stage.clear_runtime_states()
        return None if losses is None else torch.stack([x.detach() for x in losses]).sum()


def _skip(action, context) -> None:
    """Do nothing in place of a backward, but clear what was prepared for it.

    Its gradient is not received, and parameters that were gathered for it are waited for.
    """
    schedule = context.schedule_ref
    stage = action.stage_index
    schedule.bwd_recv_ops.pop((stage, action.microbatch_index), None)
    if stage in schedule.unshard_ops:
        for gathered in schedule.unshard_ops.pop(stage):
            gathered.wait()
        schedule.unsharded_stages.add(stage)
