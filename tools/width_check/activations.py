"""The activations of a forward pass by kind, taken beside the model's own code."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from model.gpt import GPTStage, Layer

KINDS = ("embedding", "attention", "mlp", "stream", "logits")
"""What is measured: what enters the residual stream, what attention and MLP of all layers add to
it, what leaves it before the final norm, and the output's logits."""

Activations = dict[str, list[torch.Tensor]]
"""Kind -> its tensors, of all layers and microbatches."""


@contextmanager
def recorded(stage: GPTStage) -> Iterator[Activations]:
    """Keep the activations of a whole model's forward passes."""
    found: Activations = defaultdict(list)

    def keep(kind: str, tensor: torch.Tensor) -> None:
        found[kind].append(tensor.detach().float().clone())

    layers = [layer for layer in stage.layers.values() if isinstance(layer, Layer)]
    with ExitStack() as hooks:
        hooks.enter_context(
            layers[0].register_forward_pre_hook(lambda _, inputs: keep("embedding", inputs[0]))
        )
        for layer in layers:
            for kind, module in (("attention", layer.attention), ("mlp", layer.mlp)):
                hook = module.register_forward_hook(
                    lambda _, inputs, output, kind=kind: keep(kind, output)
                )
                hooks.enter_context(hook)
        hooks.enter_context(
            stage.final_norm.register_forward_pre_hook(lambda _, inputs: keep("stream", inputs[0]))
        )
        head_inputs = stage.head_inputs

        def with_logits(x_tD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            normed_tD, weight_vD = head_inputs(x_tD)
            # Without the rows that pad the vocabulary.
            keep("logits", normed_tD @ weight_vD[: stage.vocab_size].T)
            return normed_tD, weight_vD

        stage.head_inputs = with_logits  # pyrefly: ignore[bad-assignment]
        hooks.callback(delattr, stage, "head_inputs")
        yield found


def mean_size(tensors: list[torch.Tensor]) -> float:
    """Return the mean absolute value of all elements."""
    return float(torch.stack([tensor.abs().mean() for tensor in tensors]).mean())


def mean_change(before: Activations, after: Activations, kind: str) -> float:
    """Return the mean absolute difference of a kind."""
    return mean_size([new - old for old, new in zip(before[kind], after[kind], strict=True)])
