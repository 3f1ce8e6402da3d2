"""The smallest parts of a layer: a tp rank's share of a weight, and the ways in and out of it."""

import torch
from torch import nn

from model.config import ModelConfig
from model.pointwise import rms_norm
from model.products import linear
from parallel.collectives import (
    all_reduce,
    copy_to,
    gather_rows,
    gather_sequence,
    reduce_from,
    reduce_scatter_rows,
    scatter_sequence,
)
from parallel.layout import Layout
from parallel.tensor import local_part


class Weight(nn.Module):
    """A weight [out, in] with an optional bias [out].

    Called, it is a linear layer over this tp rank's part.
    """

    def __init__(self, rows: int, columns: int, *, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, device="meta"))
        self.bias = nn.Parameter(torch.empty(rows, device="meta")) if bias else None
        # parallel/tensor.py sets it, from the sharding table.
        self.partial_gradient = False

    def local_weight(self) -> torch.Tensor:
        """Return this tp rank's part of the weight."""
        return local_part(self.weight, partial_gradient=self.partial_gradient)

    def local_bias(self) -> torch.Tensor | None:
        """Return this tp rank's part of the bias, if there is one."""
        if self.bias is None:
            return None
        return local_part(self.bias, partial_gradient=self.partial_gradient)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.local_weight(), self.local_bias())


class RMSNorm(nn.Module):
    """Root mean square layer normalization (arXiv 1910.07467) over the last dim, in fp32."""

    def __init__(self, size: int, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta"))
        self.epsilon = config.norm_epsilon
        self.one_plus = config.apply_layernorm_1p
        # parallel/tensor.py sets it, from the sharding table.
        self.partial_gradient = False

    def local_weight(self) -> torch.Tensor:
        """Return what this tp rank multiplies by: of most norms the same on all ranks."""
        weight = local_part(self.weight, partial_gradient=self.partial_gradient)
        if not self.one_plus:
            return weight
        # In bf16 a small weight would be lost beside the 1.
        return 1.0 + weight.to(torch.promote_types(weight.dtype, torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.local_weight(), self.epsilon)


def enter_tensor_parallel(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return all tokens of this cp rank, for a tp rank's part of the weights.

    They are gathered over tp where tokens are split over it (Megatron-SP).
    """
    return gather_sequence(x, layout.tp) if layout.sequence_parallel else copy_to(x, layout.tp)


def gradient_before_entering(grad: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Backward of `enter_tensor_parallel`; it overwrites `grad`, except under Megatron-SP."""
    # Each rank's part of the weights gave a part of the gradient.
    if layout.sequence_parallel and layout.tp.size > 1:
        return reduce_scatter_rows(grad, layout.tp)
    return all_reduce(grad, layout.tp)


def leave_tensor_parallel(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Sum the tp ranks' partial results; each keeps all tokens, or its part of them."""
    return scatter_sequence(x, layout.tp) if layout.sequence_parallel else reduce_from(x, layout.tp)


def gradient_before_leaving(grad: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Backward of `leave_tensor_parallel`."""
    return gather_rows(grad, layout.tp) if layout.sequence_parallel and layout.tp.size > 1 else grad
