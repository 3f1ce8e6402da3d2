"""What a layer keeps for its backward: all of it, or only its input, on the device or in the host's memory."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.utils.checkpoint import checkpoint


def run_layer(layer: Callable[..., torch.Tensor], x: torch.Tensor, inputs: tuple, recompute: str | None,
              offload: bool) -> torch.Tensor:
    """layer(x, *inputs), kept for backward as asked.

    With recompute full only x is kept, and backward runs the layer's forward again. With `offload`, too, x waits in
    host memory (pinned beside a GPU); torch's own saved-tensor hooks copy it there and back. `inputs` are shared by
    the layers, need no gradient and stay on the device.
    """
    if recompute != "full" or not torch.is_grad_enabled():
        return layer(x, *inputs)
    assert not any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs)
    to_host = torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda) if offload else nullcontext()
    with to_host:  # an argument of `checkpoint` is a saved tensor of the outer graph, what the layer saves is not
        return checkpoint(lambda x: layer(x, *inputs), x, use_reentrant=False, preserve_rng_state=False)
