"""Models that compute in fp64, ours and transformers', with the weights that they have.

In fp32, rounding alone moves logits by 1e-6 to 2e-5 of the largest one, in transformers as here,
and hides small faults: rms_norm_eps 1e-5 for 1e-6 moved those of a random model by 5e-6 only. In
fp64 the same models differ by 1e-15, and that fault stands out.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def compute_in_double(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Make a model compute in fp64 with the weights that it has.

    The weights of a layer are fp64 while it computes, so that memory holds one layer twice; those
    beside the layers stay fp64. Buffers (the rope's frequencies) keep their dtype.
    """
    inside = set()
    for layer in layers:
        parameters = list(layer.parameters())
        inside |= set(parameters)
        _widen_while_computing(layer, parameters)
    for parameter in model.parameters():
        if parameter not in inside:
            parameter.data = parameter.data.double()


def _widen_while_computing(layer: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Hook a layer so that its weights are fp64 during its forward pass only."""
    stored = [parameter.data for parameter in parameters]

    def widen(*_: Any) -> None:
        for parameter, values in zip(parameters, stored):
            parameter.data = values.double()

    def narrow(*_: Any) -> None:
        for parameter, values in zip(parameters, stored):
            parameter.data = values

    layer.register_forward_pre_hook(widen)
    layer.register_forward_hook(narrow, always_call=True)


class KeepDouble(TorchFunctionMode):
    """Keeps fp64 where code asks for fp32, as transformers' norms and softmax do for precision."""

    def __torch_function__(self, func, types, args: tuple[Any, ...] = (), kwargs=None):
        kwargs = kwargs or {}
        is_double = bool(args) and getattr(args[0], "dtype", None) == torch.float64
        if is_double and func is torch.Tensor.float:
            return args[0]
        if is_double and func is torch.Tensor.to and torch.float32 in (*args[1:], *kwargs.values()):
            return args[0]
        if is_double and func is nn.functional.softmax and kwargs.get("dtype") == torch.float32:
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)
