"""Collectives over an `Axis`, with their gradients.

On an axis of size 1 each of them is the identity. Each pair is a Function and its mirror image: the
forward of one is the backward of the other.

Source of the pair copy_to / reduce_from: Megatron-LM (arXiv 1909.08053), its functions f and g.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from parallel.layout import Axis


def all_reduce(
    x: torch.Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> torch.Tensor:
    """Reduce `x` in place over `axis` (no gradient) and return it."""
    if axis.size > 1:
        dist.all_reduce(x, op=op, group=axis.group)
    return x


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        # A view: a Function must not return its input itself.
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        # Others may read the same gradient, so a copy is reduced.
        return all_reduce(grad.contiguous().clone(), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return all_reduce(x.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        return grad, None


def copy_to(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Enter a region where each rank of `axis` computes its part from the same `x`.

    The ranks' gradients are summed.
    """
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Leave such a region: sum the ranks' partial results.

    The gradient passes to each rank unchanged.
    """
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def gather_rows(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Join the rows of all ranks, in their order: [t / size, ...] -> [t, ...]. No gradient."""
    out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=axis.group)
    return out


def reduce_scatter_rows(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum over the ranks and keep this rank's rows: [t, ...] -> [t / size, ...]. No gradient."""
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=axis.group)
    return out


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return gather_rows(x, axis)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        return reduce_scatter_rows(grad, ctx.axis), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return reduce_scatter_rows(x, axis)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        return gather_rows(grad, ctx.axis), None


def gather_sequence(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Do what `copy_to` does for tokens that are split over `axis`: [t / size, ...] -> [t, ...].

    Gradients are summed and split. Source: Megatron's sequence parallelism (arXiv 2205.05198), its
    functions g and g-bar.
    """
    return x if axis.size == 1 else _GatherSequence.apply(x, axis)


def scatter_sequence(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Do what `reduce_from` does, for a part of the tokens: [t, ...] -> [t / size, ...]."""
    return x if axis.size == 1 else _ScatterSequence.apply(x, axis)


def all_to_all(
    x: torch.Tensor, send_rows: list[int], receive_rows: list[int], axis: Axis
) -> torch.Tensor:
    """Exchange rows (dim 0) over `axis`: block r of `x` goes to rank r. No gradient.

    Shapes: x [sum(send_rows), ...] contiguous -> [sum(receive_rows), ...].
    """
    return start_all_to_all(x, send_rows, receive_rows, axis)()


def start_all_to_all(
    x: torch.Tensor, send_rows: list[int], receive_rows: list[int], axis: Axis
) -> Callable[[], torch.Tensor]:
    """Start `all_to_all` and return a function that waits for it and gives its result.

    `x` must not change before.
    """
    if axis.size == 1:
        return lambda: x
    out = x.new_empty(sum(receive_rows), *x.shape[1:])
    work = dist.all_to_all_single(out, x, receive_rows, send_rows, group=axis.group, async_op=True)
    assert work is not None, "only a rank outside the group gets none"
    sent = [x]  # alive until the exchange is over

    def finish() -> torch.Tensor:
        work.wait()
        # Whoever still holds `finish` does not hold what was sent.
        sent.clear()
        return out

    return finish
