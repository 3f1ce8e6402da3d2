"""Ulysses attention by groups of heads: project, exchange, attend and exchange back, group after
group.

q, k and v exist for one group (and the next, whose exchange runs meanwhile); the results of all
groups are kept, as one call would keep them. Backward walks the groups again: it makes q, k and v a
second time, but never attention's forward.

Source: Untied Ulysses (arXiv 2602.21196). Legend: see attention.py.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from model.activation_memory.saved_attention import AttentionTape, empty
from parallel.ulysses import (
    HeadRound,
    gradient_of_heads,
    heads_to_seq,
    seq_to_heads,
    start_seq_to_heads,
)

if TYPE_CHECKING:
    from model.attention import Attention, Positions, Projections


def attend_in_chunks(
    block: "Attention",
    x_tD: torch.Tensor,
    positions: "Positions",
    rounds: list[HeadRound],
    tape: AttentionTape | None,
    weights: "Projections",
) -> torch.Tensor:
    """[t, D], all tokens of this rank -> the attention's output [t, N, H] before the output
    projection."""
    if torch.is_grad_enabled():
        return _Chunks.apply(block, positions, rounds, tape, type(weights), x_tD, *weights)
    return _forward(block, x_tD, positions, rounds, tape, weights)


def _forward(block, x_tD, positions, rounds, tape, weights) -> torch.Tensor:
    axis = block.layout.cp_a2a
    H = block.head_size
    o_tNH = x_tD.new_empty(x_tD.shape[0], weights.q_rD.shape[0] // H, H)
    if tape is not None and tape.playing:
        for each in rounds:
            for heads in each.query_chunks:
                o_tNH[:, _index(heads, o_tNH.device)] = heads_to_seq(
                    tape.next_call().output, each.query_split, axis
                )
        return o_tNH
    for each, heads, q_smH, k_TkH, v_TkH, is_last in _exchanged(
        block, x_tD, positions, rounds, weights
    ):
        o_smH = block.attend_to(q_smH, k_TkH, v_TkH, positions.documents, tape)
        if tape is not None:
            empty(q_smH, *((k_TkH, v_TkH) if is_last else ()))
        o_tNH[:, _index(heads, o_tNH.device)] = heads_to_seq(o_smH, each.query_split, axis)
    return o_tNH


def _exchanged(block, x_tD, positions, rounds, weights) -> Iterator[tuple]:
    """(round, heads, q, k, v, is it the round's last chunk?) of every chunk; the next exchange is
    on its way."""
    axis = block.layout.cp_a2a

    def start_kv(each: HeadRound) -> Callable:
        part = _part(weights, KV_FIELDS, each.kv_heads, block.head_size)
        k = block.project_k(x_tD, positions, part)
        v = block.project_v(x_tD, part)
        return start_seq_to_heads(k[:, :0], k, v, each.kv_split, axis)

    def start_q(each: HeadRound, heads: tuple[int, ...]) -> Callable:
        q = block.project_q(x_tD, positions, _part(weights, Q_FIELDS, heads, block.head_size))
        return start_seq_to_heads(q, q[:, :0], q[:, :0], each.query_split, axis)

    steps = [(each, heads) for each in rounds for heads in each.query_chunks]
    kv_on_way = start_kv(rounds[0])
    q_on_way = start_q(*steps[0])
    for number, (each, heads) in enumerate(steps):
        if heads is each.query_chunks[0]:
            k_TkH, v_TkH = block.gather(*kv_on_way()[1:])
        q_smH = q_on_way()[0]
        if number + 1 < len(steps):
            following = steps[number + 1]
            if following[0] is not each:
                kv_on_way = start_kv(following[0])
            q_on_way = start_q(*following)
        yield each, heads, q_smH, k_TkH, v_TkH, heads is each.query_chunks[-1]


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, positions, rounds, tape, kind, x_tD, *weights):
        tape = tape or AttentionTape()
        o_tNH = _forward(block, x_tD, positions, rounds, tape, kind(*weights))
        tape.play()
        ctx.block = block
        ctx.positions = positions
        ctx.rounds = rounds
        ctx.tape = tape
        ctx.kind = kind
        ctx.save_for_backward(x_tD, *weights)
        return o_tNH

    @staticmethod
    def backward(ctx, grad_tNH):
        x_tD, *weights = ctx.saved_tensors
        gradients = _Gradients(x_tD, ctx.kind(*weights), ctx.block.head_size)
        for each in ctx.rounds:
            _round_gradients(ctx, each, gradients, grad_tNH)
        return None, None, None, None, None, gradients.of_x, *gradients.narrow_weights()


def _round_gradients(ctx, each: HeadRound, gradients: "_Gradients", grad_tNH: torch.Tensor) -> None:
    """Add what the heads of one round give to the gradients of x and of the weights."""
    part, leaves = gradients.leaves(KV_FIELDS, each.kv_heads)
    with torch.enable_grad():
        kv = _exchange_kv(ctx, each, part, gradients)
    read = [x.detach().requires_grad_() for x in kv]
    sums = None
    for heads in each.query_chunks:
        grads = _chunk_gradients(ctx, each, heads, read, gradients, grad_tNH)
        if sums is None:
            sums = grads if len(each.query_chunks) == 1 else [_widen(grad) for grad in grads]
        else:
            sums = [total.add_(grad) for total, grad in zip(sums, grads, strict=True)]
        del grads  # nothing of one chunk exists while the next one attends
    found = torch.autograd.grad(
        kv, leaves, [total.to(x.dtype) for total, x in zip(sums, kv, strict=True)]
    )
    gradients.add(KV_FIELDS, each.kv_heads, found)


def _exchange_kv(
    ctx, each: HeadRound, part: "Projections", gradients: "_Gradients"
) -> tuple[torch.Tensor, torch.Tensor]:
    block = ctx.block
    x_tD = gradients.x_tD
    linear = gradients.linear
    k = block.project_k(x_tD, ctx.positions, part, linear)
    v = block.project_v(x_tD, part, linear)
    nothing = k.detach()[:, :0]  # with a gradient it would be a whole k of zeros
    return block.gather(*seq_to_heads(nothing, k, v, each.kv_split, block.layout.cp_a2a)[1:])


def _chunk_gradients(
    ctx,
    each: HeadRound,
    heads: tuple[int, ...],
    kv: list[torch.Tensor],
    gradients: "_Gradients",
    grad_tNH: torch.Tensor,
) -> list[torch.Tensor]:
    """The gradients of keys and values from some query heads, whose own are added up."""
    part, leaves = gradients.leaves(Q_FIELDS, heads)
    with torch.enable_grad():
        q_smH = _exchange_q(ctx, each, part, gradients)
        o_smH = ctx.block.attend_to(q_smH, *kv, ctx.positions.documents, ctx.tape)
    grad_smH = gradient_of_heads(
        grad_tNH[:, _index(heads, grad_tNH.device)], each.query_split, ctx.block.layout.cp_a2a
    )
    *found, grad_k, grad_v = torch.autograd.grad(o_smH, [*leaves, *kv], grad_smH)
    gradients.add(Q_FIELDS, heads, found)
    return [grad_k, grad_v]


def _exchange_q(ctx, each: HeadRound, part: "Projections", gradients: "_Gradients") -> torch.Tensor:
    q = ctx.block.project_q(gradients.x_tD, ctx.positions, part, gradients.linear)
    nothing = q.detach()[:, :0]
    return seq_to_heads(q, nothing, nothing, each.query_split, ctx.block.layout.cp_a2a)[0]


def _widen(grad: torch.Tensor) -> torch.Tensor:
    """In at least fp32, to be added to."""
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


class _Linear(torch.autograd.Function):
    """F.linear of an input that needs no gradient of its own: it is added to `sum_tD`, and no
    second [t, D] is made."""

    @staticmethod
    def forward(ctx, x_tD, weight_rD, bias, sum_tD):
        ctx.sum_tD = sum_tD
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x_tD, weight_rD)
        return F.linear(x_tD, weight_rD, bias)

    @staticmethod
    def backward(ctx, grad_tr):
        x_tD, weight_rD = ctx.saved_tensors
        ctx.sum_tD.addmm_(grad_tr, weight_rD)
        return None, grad_tr.T @ x_tD, grad_tr.sum(0) if ctx.has_bias else None, None


class _Gradients:
    """The gradients of x and of the projections, added up group by group."""

    def __init__(self, x_tD: torch.Tensor, weights: "Projections", head_size: int):
        # Detached: a gradient asked for in one group must not walk the graph behind x.
        self.x_tD = x_tD.detach()
        self.weights = weights
        self.head_size = head_size
        self.of_x = torch.zeros_like(x_tD)
        self.of_weights = type(weights)(
            *(self._zeros(name, x) for name, x in weights._asdict().items())
        )

    @staticmethod
    def _zeros(name: str, weight: torch.Tensor | None) -> torch.Tensor | None:
        if weight is None:
            return None
        zeros = torch.zeros_like(weight)
        return _widen(zeros) if name.endswith("_norm") else zeros  # the others get each row once

    def leaves(self, fields: tuple[str, ...], heads: tuple[int, ...]) -> tuple:
        """(the heads' weights, those of them that exist as a list), leaves of a new graph."""
        part = _part(self.weights, fields, heads, self.head_size)
        part = type(part)(*(None if x is None else x.detach().requires_grad_() for x in part))
        return part, [x for x in part if x is not None]

    def linear(
        self, x_tD: torch.Tensor, weight_rD: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """F.linear, whose backward adds to `of_x`."""
        return _Linear.apply(x_tD, weight_rD, bias, self.of_x)

    def narrow_weights(self) -> list[torch.Tensor | None]:
        """`of_weights` in the weights' dtype."""
        return [
            total if weight is None else total.to(weight.dtype)
            for total, weight in zip(self.of_weights, self.weights, strict=True)
        ]

    def add(
        self, fields: tuple[str, ...], heads: tuple[int, ...], found: Sequence[torch.Tensor]
    ) -> None:
        """Take in the gradients of `leaves`."""
        present = [
            name
            for name in self.weights._fields
            if name in fields and getattr(self.weights, name) is not None
        ]
        for name, grad in zip(present, found, strict=True):
            total = getattr(self.of_weights, name)
            if name.endswith("_norm"):
                total.add_(grad)  # one for all heads
            else:
                by_head = total.view(-1, self.head_size, *total.shape[1:])
                by_head[_index(heads, by_head.device)] = grad.view(
                    -1, *by_head.shape[1:]
                )  # no head is in two groups


Q_FIELDS = ("q_rD", "q_bias", "q_norm")
KV_FIELDS = ("k_rD", "v_rD", "k_bias", "v_bias", "k_norm")


def _part(
    weights: "Projections", fields: tuple[str, ...], heads: tuple[int, ...], head_size: int
) -> "Projections":
    """The named weights of some heads; the others are None."""

    def cut(name: str) -> torch.Tensor | None:
        weight = getattr(weights, name)
        if name not in fields or weight is None or name.endswith("_norm"):
            return weight if name in fields else None
        return weight.view(-1, head_size, *weight.shape[1:])[_index(heads, weight.device)].flatten(
            0, 1
        )

    return type(weights)(*(cut(name) for name in weights._fields))


@cache
def _index(heads: tuple[int, ...], device: torch.device) -> slice | torch.Tensor:
    """The heads as a slice where they are neighbours: a view instead of a copy. Else made once per
    device: no transfer in a step."""
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return torch.tensor(heads, device=device)
