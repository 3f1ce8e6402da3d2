"""Pipeline parallelism: torch.distributed.pipelining over our stages.

A stage module is called as `module(x)` once per microbatch, in order: `x` is the previous stage's
output, on the first stage a placeholder. The module looks up everything else about the microbatch by
itself. The last stage returns its share of the loss, already scaled: schedules sum it.

Source: torch.distributed.pipelining (stage.py, schedules.py); 1F1B is PipeDream-Flush (arXiv 2006.09503).
"""

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from parallel.layout import Axis


def layers_of_stage(num_layers: int, stage: int, num_stages: int) -> range:
    """Global indices of the layers that `stage` holds; earlier stages take the remainder."""
    base, extra = divmod(num_layers, num_stages)
    start = stage * base + min(stage, extra)
    return range(start, start + base + (stage < extra))


class Pipeline:
    """One shape of step: a schedule for `num_microbatches` activations of [tokens, hidden].

    Rebuild it when the shape changes; building is cheap and moves no data.
    """

    def __init__(self, module: nn.Module, pp: Axis, device: torch.device, num_microbatches: int, tokens: int,
                 hidden: int, dtype: torch.dtype):
        """Args: tokens: per rank and microbatch; dtype: of the activations between stages."""
        self.shape = (num_microbatches, tokens)
        activation = torch.empty(tokens, hidden, dtype=dtype, device="meta", requires_grad=True)
        placeholder = torch.empty(1, dtype=torch.int64, device="meta")
        loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        loss = torch.empty((), dtype=loss_dtype, device="meta", requires_grad=True)
        # With both given, no stage runs an extra microbatch to find its shapes.
        self.stage = PipelineStage(
            module, pp.rank, pp.size, device, input_args=placeholder if pp.is_first else activation,
            output_args=loss if pp.is_last else activation, group=pp.group)
        self.schedule = Schedule1F1B(self.stage, num_microbatches, loss_fn=lambda output, target: output,
                                     scale_grads=False)
        # The schedule cuts inputs and targets into microbatches; ours carry nothing but their number.
        self.placeholders = torch.zeros(num_microbatches, dtype=torch.int64, device=device)

    def run(self, train: bool) -> torch.Tensor | None:
        """All microbatches forward (and backward if `train`); the summed loss on the last stage, else None."""
        losses: list[torch.Tensor] | None = [] if self.stage.is_last else None
        args = (self.placeholders,) if self.stage.is_first else ()
        options = {"target": self.placeholders if self.stage.is_last else None, "losses": losses}
        if train:
            self.schedule.step(*args, return_outputs=False, **options)
        else:
            with torch.no_grad():
                self.schedule.eval(*args, return_outputs=False, **options)
            self.stage.clear_runtime_states()  # only a backward would let go of the activations
        return torch.stack([loss.detach() for loss in losses]).sum() if losses is not None else None
