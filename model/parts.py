"""The smallest parts of a layer, over one tp rank's share of a weight, and the ways in and out of
that share."""

import torch
from torch import nn
from torch.nn import functional as F

from model.pointwise import rms_norm
from parallel.collectives import (
    copy_to,
    gather_rows,
    gather_sequence,
    reduce_from,
    scatter_sequence,
)
from parallel.layout import Layout
from parallel.tensor import local_part


class Weight(nn.Module):
    """A weight [out, in] with an optional bias [out]; called, it is a linear layer over this tp
    rank's part."""

    def __init__(self, rows: int, columns: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, device="meta"))
        self.bias = nn.Parameter(torch.empty(rows, device="meta")) if bias else None
        self.partial_gradient = False

    def local_weight(self) -> torch.Tensor:
        return local_part(self.weight, self.partial_gradient)

    def local_bias(self) -> torch.Tensor | None:
        return None if self.bias is None else local_part(self.bias, self.partial_gradient)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.local_weight(), self.local_bias())


class RMSNorm(nn.Module):
    """Root mean square layer normalization (arXiv 1910.07467) over the last dim, statistics in
    fp32."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta"))
        self.epsilon = epsilon
        self.partial_gradient = False

    def local_weight(self) -> torch.Tensor:
        return local_part(self.weight, self.partial_gradient)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.local_weight(), self.epsilon)


def enter_tensor_parallel(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """All tokens of this cp rank, for a part of the weights: gathered over tp where tokens are
    split over it."""
    return gather_sequence(x, layout.tp) if layout.sequence_parallel else copy_to(x, layout.tp)


def leave_tensor_parallel(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Sum the tp ranks' partial results; each keeps all tokens, or its part of them."""
    return scatter_sequence(x, layout.tp) if layout.sequence_parallel else reduce_from(x, layout.tp)


def gradient_before_leaving(grad: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The gradient of `leave_tensor_parallel`'s argument for that of its result."""
    return gather_rows(grad, layout.tp) if layout.sequence_parallel and layout.tp.size > 1 else grad
