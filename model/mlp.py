"""The SwiGLU MLP in tiles of the sequence: nothing of [t, F] outlives a tile.

Source: tiled MLP of ALST (arXiv 2506.13996). There each tile's backward adds to the parameters'
gradients; here the tiles are added up in at least fp32 inside one node of the graph, so each weight
gets one gradient.

Legend: t tokens, D hidden, F MLP width of this tp rank.
"""

import torch

from model.pointwise import gated, gated_gradients
from model.products import add_product


class _SwiGLU(torch.autograd.Function):
    """Keeps its input, and with one tile the two projections as well."""

    @staticmethod
    def forward(ctx, x_tD, gate_FD, up_FD, down_DF, tiles, value):
        # Without a value, nobody reads the result: one number takes its place.
        out_tD = torch.empty_like(x_tD) if value else x_tD.new_zeros(1).expand(x_tD.shape)
        projections = ()
        for rows in _tiles(x_tD.shape[0], tiles) if value else ():
            projections = (x_tD[rows] @ gate_FD.T, x_tD[rows] @ up_FD.T)
            torch.mm(gated(*projections), down_DF.T, out=out_tD[rows])
        ctx.tiles = tiles
        ctx.value = value
        num_kept = 2 if tiles == 1 and value else 0
        ctx.save_for_backward(x_tD, gate_FD, up_FD, down_DF, *projections[:num_kept])
        return out_tD

    @staticmethod
    def backward(ctx, grad_tD):
        x_tD, gate_FD, up_FD, down_DF, *kept = ctx.saved_tensors
        # Without a value, x was made for this backward alone: its gradient takes its place, tile
        # by tile.
        grad_x = torch.empty_like(x_tD) if ctx.value else x_tD
        sums = _Sums((gate_FD, up_FD, down_DF), several=ctx.tiles > 1)
        for rows in _tiles(x_tD.shape[0], ctx.tiles):
            x = x_tD[rows]
            grad = grad_tD[rows]
            projections = kept or (x @ gate_FD.T, x @ up_FD.T)
            hidden, grad_gate, grad_up = gated_gradients(grad @ down_DF, *projections)
            # Before x's gradient is written, which may take the place of x.
            sums.add((grad_gate.T, x), (grad_up.T, x), (grad.T, hidden))
            torch.mm(grad_gate, gate_FD, out=grad_x[rows]).addmm_(grad_up, up_FD)
        return grad_x, *sums.narrow(x_tD.dtype), None, None


class _Sums:
    """The weights' gradients, added up over the tiles in at least fp32."""

    def __init__(self, weights: tuple[torch.Tensor, ...], *, several: bool):
        self.totals: list[torch.Tensor] = []
        if several:
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
    """`count` contiguous parts of the rows, as torch.chunk cuts them (fewer where there are fewer
    rows)."""
    size = -(-total // count)
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def swiglu(
    x_tD: torch.Tensor,
    gate_FD: torch.Tensor,
    up_FD: torch.Tensor,
    down_DF: torch.Tensor,
    tiles: int,
    value: bool = True,
) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202): [t, D] -> [t, D], over tp to be summed by the
    caller.

    Args:
        tiles: parts of the sequence; with more than one, backward computes gate and up again.
        value: False where only the gradients are wanted: the result is then not computed, and
            backward overwrites x.
    """
    return _SwiGLU.apply(x_tD, gate_FD, up_FD, down_DF, tiles, value)
