"""The size of activations by kind, taken beside the model's own code.

Only some tokens are looked at, and only a first pass is kept: what is held for it does not grow
with the context. A size is a root mean square, which narrow widths disturb least: what unrelated
vectors of n dims share by chance adds 1/n to a mean square, and up to 1/sqrt(n) to a mean |x|.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from model.gpt import GPTStage, Layer

KINDS = ("embedding", "attention", "mlp", "stream", "logits")
"""What is measured: what enters the residual stream, what attention and MLP of all layers add to
it, what leaves it before the final norm, and the output's logits."""

MEASURED_TOKENS = 1024
"""Most tokens of the probe whose activations are measured."""

Activations = dict[str, list[torch.Tensor]]
"""Kind -> its tensors [measured tokens, dims], of all layers and microbatches."""

Keep = Callable[[str, torch.Tensor], None]
"""Is given a kind and a tensor of it, which is its own."""


def draw_measured(tokens: Sequence[int], limit: int = MEASURED_TOKENS) -> list[torch.Tensor]:
    """Draw which tokens of each microbatch are measured, in their order; all, where they are few.

    Args:
        tokens: of each microbatch.
        limit: most tokens of all microbatches; each has one at least.
    """
    # By chance: at even distances they could all stand at one place of their documents.
    generator = torch.Generator().manual_seed(0)
    most = max(1, limit // len(tokens))
    return [torch.randperm(count, generator=generator)[:most].sort().values for count in tokens]


@contextmanager
def observed(stage: GPTStage, measured: Sequence[torch.Tensor], keep: Keep) -> Iterator[None]:
    """Show `keep` the activations of a whole model's forward pass.

    Args:
        measured: places of the measured tokens, of each microbatch.
    """
    coming = iter(measured)
    current = torch.empty(0)

    def show(kind: str, x_tD: torch.Tensor) -> None:
        keep(kind, x_tD.detach()[current].float())

    def begin(_: torch.nn.Module, inputs: tuple) -> None:
        nonlocal current
        current = next(coming).to(inputs[0].device)
        show("embedding", inputs[0])

    layers = [layer for layer in stage.layers.values() if isinstance(layer, Layer)]
    with ExitStack() as hooks:
        hooks.enter_context(layers[0].register_forward_pre_hook(begin))
        for layer in layers:
            for kind, module in (("attention", layer.attention), ("mlp", layer.mlp)):
                hook = module.register_forward_hook(
                    lambda _, inputs, output, kind=kind: show(kind, output)
                )
                hooks.enter_context(hook)
        hooks.enter_context(
            stage.final_norm.register_forward_pre_hook(lambda _, inputs: show("stream", inputs[0]))
        )
        head_inputs = stage.head_inputs

        def with_logits(x_tD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            normed_tD, weight_vD = head_inputs(x_tD)
            # Without the rows that pad the vocabulary.
            logits_tv = normed_tD.detach()[current] @ weight_vD.detach()[: stage.vocab_size].T
            keep("logits", logits_tv.float())
            return normed_tD, weight_vD

        stage.head_inputs = with_logits  # pyrefly: ignore[bad-assignment]
        hooks.callback(delattr, stage, "head_inputs")
        yield


@dataclass
class MeanSquares:
    """The mean square of a kind's activations, and of their change since a first pass."""

    size: float = 0.0
    change: float = 0.0


class Comparison:
    """Compares the activations of a pass with those of a first one, and holds none of them."""

    def __init__(self, before: Activations):
        """
        Args:
            before: of the first pass; each tensor is freed once it was compared.
        """
        self._before = before
        self._sizes: dict[str, float] = defaultdict(float)
        self._changes: dict[str, float] = defaultdict(float)
        self._elements: dict[str, int] = defaultdict(int)

    def add(self, kind: str, x: torch.Tensor) -> None:
        """Take in the next tensor of a kind."""
        self._sizes[kind] += _sum_of_squares(x)
        self._changes[kind] += _sum_of_squares(x - self._before[kind].pop(0))
        self._elements[kind] += x.numel()

    def mean_squares(self) -> dict[str, MeanSquares]:
        """Return what was found of each kind."""
        return {
            kind: MeanSquares(self._sizes[kind] / count, self._changes[kind] / count)
            for kind, count in self._elements.items()
        }


def _sum_of_squares(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
