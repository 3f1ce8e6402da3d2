"""The gated MLP in tiles of the sequence: nothing of [t, F] outlives a tile.

Source: tiled MLP of ALST (arXiv 2506.13996). There each tile's backward adds to the parameters'
gradients; here the tiles are added up in at least fp32 inside one node of the graph, so each weight
gets one gradient.

Legend: t tokens, c those of a tile, D hidden, F MLP width of this tp rank.
"""

from collections.abc import Sequence

import torch
from torch import nn

from model.parts import Weight
from model.pointwise import Activation, gated, gated_gradients_
from model.products import add_product, linear, multiply, write_products


class MLP(nn.Module):
    """Gated MLP (arXiv 2002.05202: SwiGLU, GEGLU), its width split over tp."""

    def __init__(self, hidden_size: int, width: int, activation: Activation):
        super().__init__()
        self.activation: Activation = activation
        self.gate = Weight(width, hidden_size)
        self.up = Weight(width, hidden_size)
        self.down = Weight(hidden_size, width)

    def local_weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return this rank's parts of gate [F, D], up [F, D] and down [D, F]."""
        return self.gate.local_weight(), self.up.local_weight(), self.down.local_weight()

    def forward(self, x_tD: torch.Tensor, tiles: int) -> torch.Tensor:
        """Compute this tp rank's part of the sum: [t, D] -> [t, D]."""
        return gated_mlp(x_tD, *self.local_weights(), tiles, self.activation)


def gated_mlp(
    x_tD: torch.Tensor,
    gate_FD: torch.Tensor,
    up_FD: torch.Tensor,
    down_DF: torch.Tensor,
    tiles: int,
    activation: Activation = "silu",
) -> torch.Tensor:
    """Compute down(silu(gate(x)) * up(x)): [t, D] -> [t, D], to be summed over tp by the caller.

    Args:
        tiles: parts of the sequence; with more than one, backward computes gate and up again.
    """
    if not torch.is_grad_enabled():
        return _forward(x_tD, gate_FD, up_FD, down_DF, tiles, activation)[0]
    return _GatedMLP.apply(x_tD, gate_FD, up_FD, down_DF, tiles, activation)


def gated_mlp_gradients(
    grad_tD: torch.Tensor,
    x_tD: torch.Tensor,
    weights: Sequence[torch.Tensor],
    tiles: int,
    activation: Activation,
) -> tuple[torch.Tensor, ...]:
    """Compute the gradients of `gated_mlp`'s x, gate, up and down without its result.

    The forward's last product is left out, since no gradient reads it. No graph is made.

    Args:
        x_tD: is overwritten: its gradient takes its place, tile by tile.
        weights: gate, up and down.
    """
    with torch.no_grad():
        return _gradients(grad_tD, x_tD, weights, tiles, activation, projections=(), grad_x_tD=x_tD)


class _GatedMLP(torch.autograd.Function):
    """Keeps its input, and with one tile the two projections as well."""

    @staticmethod
    def forward(ctx, x_tD, gate_FD, up_FD, down_DF, tiles, activation):
        out_tD, projections = _forward(x_tD, gate_FD, up_FD, down_DF, tiles, activation)
        ctx.tiles = tiles
        ctx.activation = activation
        # With one tile they are whole, and not computed again.
        kept = projections if tiles == 1 else ()
        ctx.save_for_backward(x_tD, gate_FD, up_FD, down_DF, *kept)
        return out_tD

    @staticmethod
    def backward(ctx, *grads):
        (grad_tD,) = grads
        x_tD, gate_FD, up_FD, down_DF, *projections = ctx.saved_tensors
        found = _gradients(
            grad_tD,
            x_tD,
            (gate_FD, up_FD, down_DF),
            ctx.tiles,
            ctx.activation,
            projections=projections,
            grad_x_tD=torch.empty_like(x_tD),
        )
        return *found, None, None


def _forward(
    x_tD: torch.Tensor,
    gate_FD: torch.Tensor,
    up_FD: torch.Tensor,
    down_DF: torch.Tensor,
    tiles: int,
    activation: Activation,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Compute `gated_mlp`, and gate(x) and up(x) of the last tile."""
    if tiles == 1:
        gate_and_up = (linear(x_tD, gate_FD), linear(x_tD, up_FD))
        hidden_tF = gated(*gate_and_up, activation=activation)
        return linear(hidden_tF, down_DF), gate_and_up
    out_tD = torch.empty_like(x_tD)
    projections: tuple[torch.Tensor, ...] = ()
    for rows in _tiles(x_tD.shape[0], tiles):
        # [t, F] of one tile, until the next tile's take their name.
        projections = (linear(x_tD[rows], gate_FD), linear(x_tD[rows], up_FD))
        write_products(out_tD[rows], (gated(*projections, activation=activation), down_DF.T))
    return out_tD, projections


def _gradients(
    grad_tD: torch.Tensor,
    x_tD: torch.Tensor,
    weights: Sequence[torch.Tensor],
    tiles: int,
    activation: Activation,
    *,
    projections: Sequence[torch.Tensor],
    grad_x_tD: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Compute the gradients of x, gate, up and down.

    Args:
        projections: gate(x) and up(x) where they were kept, else nothing.
        grad_x_tD: where the gradient of x is written; it may be x.
    """
    # Tile by tile, each from its own gate and up.
    sums = _Sums(weights, several=tiles > 1)
    for rows in _tiles(x_tD.shape[0], tiles):
        # A function of its own: a tile's tensors are gone before the next one's are made.
        _one_tile(
            grad_tD[rows], x_tD[rows], weights, projections, activation, sums, grad_x_tD[rows]
        )
    return grad_x_tD, *sums.narrow(x_tD.dtype)


def _one_tile(
    grad_cD: torch.Tensor,
    x_cD: torch.Tensor,
    weights: Sequence[torch.Tensor],
    projections: Sequence[torch.Tensor],
    activation: Activation,
    sums: "_Sums",
    grad_x_cD: torch.Tensor,
) -> None:
    """Add a tile's part of the weights' gradients to `sums`, and write that of its rows of x."""
    gate_FD, up_FD, down_DF = weights
    gate_and_up = projections or (linear(x_cD, gate_FD), linear(x_cD, up_FD))
    # The gradient of the hidden values, in whose place that of up comes.
    grad_up = multiply(grad_cD, down_DF)
    hidden, grad_gate = gated_gradients_(grad_up, *gate_and_up, activation=activation)
    # Before x's gradient is written, which may take the place of x.
    sums.add((grad_gate.T, x_cD), (grad_up.T, x_cD), (grad_cD.T, hidden))
    write_products(grad_x_cD, (grad_gate, gate_FD), (grad_up, up_FD))


class _Sums:
    """The weights' gradients, added up over the tiles in at least fp32."""

    def __init__(self, weights: Sequence[torch.Tensor], *, several: bool):
        self.totals: list[torch.Tensor] = []
        if several:
            # In bf16, many additions of a part to the sum would lose more than the parts' rounding.
            wide = torch.promote_types(weights[0].dtype, torch.float32)
            self.totals = [torch.zeros_like(weight, dtype=wide) for weight in weights]

    def add(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Add each pair's product to its weight's sum; a single tile's product is the sum."""
        if not self.totals:
            self.totals = [left @ right for left, right in pairs]
            return
        for total, (left, right) in zip(self.totals, pairs, strict=True):
            add_product(total, left, right)

    def narrow(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return the sums in the weights' dtype."""
        return [total.to(dtype) for total in self.totals]


def _tiles(total: int, count: int) -> list[slice]:
    """Cut rows into `count` contiguous parts, as torch.chunk does (fewer where rows are fewer)."""
    size = -(-total // count)
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
