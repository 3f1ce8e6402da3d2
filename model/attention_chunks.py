"""Ulysses attention by groups of heads: project, exchange, attend and exchange back, group after
group.

q, k and v exist for one group (and the next, whose exchange runs meanwhile); the results of all
groups are kept, as one call would keep them. Backward walks the groups again: it makes q, k and v a
second time, but never attention's forward. A round is what shares key/value heads: one or several
groups of query heads (parallel/ulysses.py: HeadRound).

Source: Untied Ulysses (arXiv 2602.21196). Legend: see attention_core.py.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from model.activation_memory.saved_attention import AttentionTape, free_storage
from model.attention_core import AttentionCore, Projections
from model.positions import Positions
from parallel.ulysses import (
    HeadRound,
    gradient_of_heads,
    heads_to_seq,
    seq_to_heads,
    start_seq_to_heads,
)

Q_FIELDS = ("q_rD", "q_bias", "q_norm", "sinks")
KV_FIELDS = ("k_rD", "v_rD", "k_bias", "v_bias", "k_norm")


def attend_in_chunks(
    core: AttentionCore,
    x_tD: torch.Tensor,
    positions: Positions,
    rounds: list[HeadRound],
    tape: AttentionTape | None,
    weights: Projections,
) -> torch.Tensor:
    """Attend group after group: [t, D], all tokens of this rank -> [t, N, H]."""
    path = _Path(core, positions, rounds, tape)
    if torch.is_grad_enabled():
        return _Chunks.apply(path, x_tD, *weights)
    return _forward(path, x_tD, weights)


class _Path(NamedTuple):
    """What the forward and the backward of one call have in common."""

    core: AttentionCore
    positions: Positions
    rounds: list[HeadRound]
    tape: AttentionTape | None


class _Chunk(NamedTuple):
    """A group of query heads with the key/value heads that it reads, after the exchange."""

    round: HeadRound
    heads: tuple[int, ...]
    q_smH: torch.Tensor
    k_TkH: torch.Tensor
    v_TkH: torch.Tensor
    is_last: bool
    """Is it the last group of its round?"""


def _forward(path: _Path, x_tD: torch.Tensor, weights: Projections) -> torch.Tensor:
    core, positions, rounds, tape = path
    axis = core.layout.cp_a2a
    assert weights.q_rD is not None
    num_heads = weights.q_rD.shape[0] // core.head_size
    o_tNH = x_tD.new_empty(x_tD.shape[0], num_heads, core.head_size)
    if tape is not None and tape.playing:
        # The results are there: only the exchange back is made again.
        for each in rounds:
            for heads in each.query_chunks:
                o_smH = tape.next_call().output
                o_tNH[:, _index(heads, o_tNH.device)] = heads_to_seq(o_smH, each.query_split, axis)
        return o_tNH
    for each, heads, q_smH, k_TkH, v_TkH, is_last in _exchanged(path, x_tD, weights):
        # The heads of one rank are neighbours.
        first_head = heads[each.query_split.query[axis.rank][0]]
        core.measure_logits(q_smH, k_TkH, positions, first_head)
        sinks_m = core.sinks_here(_sinks_of(weights, heads), each.query_split)
        o_smH = core.attend_to(q_smH, k_TkH, v_TkH, positions.documents, tape, sinks_m)
        if tape is not None:
            free_storage(q_smH, *((k_TkH, v_TkH) if is_last else ()))
        o_tNH[:, _index(heads, o_tNH.device)] = heads_to_seq(o_smH, each.query_split, axis)
    return o_tNH


def _exchanged(path: _Path, x_tD: torch.Tensor, weights: Projections) -> Iterator[_Chunk]:
    """Yield every chunk; the exchange of the next one runs while a chunk is worked on."""
    core, positions, rounds, _ = path
    axis = core.layout.cp_a2a

    def start_kv(each: HeadRound) -> Callable:
        part = _part(weights, KV_FIELDS, each.kv_heads, core.head_size)
        k = core.project_k(x_tD, positions, part)
        v = core.project_v(x_tD, part)
        return start_seq_to_heads(k[:, :0], k, v, each.kv_split, axis)

    def start_q(each: HeadRound, heads: tuple[int, ...]) -> Callable:
        q = core.project_q(x_tD, positions, _part(weights, Q_FIELDS, heads, core.head_size))
        return start_seq_to_heads(q, q[:, :0], q[:, :0], each.query_split, axis)

    # Queries and key/values travel apart: several chunks may read one round's.
    steps = [(each, heads) for each in rounds for heads in each.query_chunks]
    kv_TkH: tuple[torch.Tensor, ...] = ()
    kv_on_way = start_kv(rounds[0])
    q_on_way = start_q(*steps[0])
    for number, (each, heads) in enumerate(steps):
        # Wait for this chunk's heads; keys and values come with a round's first chunk.
        if heads is each.query_chunks[0]:
            kv_TkH = core.gather(*kv_on_way()[1:])
        k_TkH, v_TkH = kv_TkH
        q_smH = q_on_way()[0]
        # Start the next exchange before this chunk attends.
        if number + 1 < len(steps):
            following = steps[number + 1]
            if following[0] is not each:
                kv_on_way = start_kv(following[0])
            q_on_way = start_q(*following)
        yield _Chunk(each, heads, q_smH, k_TkH, v_TkH, heads is each.query_chunks[-1])


class _Chunks(torch.autograd.Function):
    """The attention of all groups as one node; it keeps x, the weights and the kernels' results."""

    @staticmethod
    def forward(ctx, path: _Path, x_tD, *weights):
        tape = path.tape or AttentionTape()
        path = path._replace(tape=tape)
        o_tNH = _forward(path, x_tD, Projections(*weights))
        tape.play()
        ctx.path = path
        ctx.save_for_backward(x_tD, *weights)
        return o_tNH

    @staticmethod
    def backward(ctx, *grads):
        (grad_tNH,) = grads
        x_tD, *weights = ctx.saved_tensors
        gradients = _Gradients(x_tD, Projections(*weights), ctx.path.core.head_size)
        for each in ctx.path.rounds:
            _round_gradients(ctx.path, each, gradients, grad_tNH)
        return None, gradients.of_x, *gradients.narrow_weights()


def _round_gradients(
    path: _Path, each: HeadRound, gradients: "_Gradients", grad_tNH: torch.Tensor
) -> None:
    """Add what the heads of one round give to the gradients of x and of the weights."""
    part, leaves = gradients.leaves(KV_FIELDS, each.kv_heads)
    with torch.enable_grad():
        kv = _exchange_kv(path, each, part, gradients)
    # The chunks read k and v as leaves: their gradients go back through the exchange once.
    kv_leaves = [x.detach().requires_grad_() for x in kv]
    sums: list[torch.Tensor] = []
    for heads in each.query_chunks:
        grads = _chunk_gradients(path, each, heads, kv_leaves, gradients, grad_tNH)
        if sums:
            sums = [total.add_(grad) for total, grad in zip(sums, grads, strict=True)]
        else:
            sums = grads if len(each.query_chunks) == 1 else [_widen(grad) for grad in grads]
        del grads  # nothing of one chunk exists while the next one attends
    narrow = [total.to(x.dtype) for total, x in zip(sums, kv, strict=True)]
    found = torch.autograd.grad(kv, leaves, narrow)
    gradients.add(KV_FIELDS, each.kv_heads, found)


def _exchange_kv(
    path: _Path, each: HeadRound, part: Projections, gradients: "_Gradients"
) -> tuple[torch.Tensor, torch.Tensor]:
    core = path.core
    k = core.project_k(gradients.x_tD, path.positions, part, gradients.linear)
    v = core.project_v(gradients.x_tD, part, gradients.linear)
    no_q = k.detach()[:, :0]  # with a gradient it would be a whole k of zeros
    _, k, v = seq_to_heads(no_q, k, v, each.kv_split, core.layout.cp_a2a)
    return core.gather(k, v)


def _chunk_gradients(
    path: _Path,
    each: HeadRound,
    heads: tuple[int, ...],
    kv: list[torch.Tensor],
    gradients: "_Gradients",
    grad_tNH: torch.Tensor,
) -> list[torch.Tensor]:
    """Return the gradients of keys and values from some query heads; add up those heads' own."""
    part, leaves = gradients.leaves(Q_FIELDS, heads)
    # Forward again up to the kernel, whose result the tape has.
    with torch.enable_grad():
        q_smH = _exchange_q(path, each, part, gradients)
        k_TkH, v_TkH = kv
        sinks_m = path.core.sinks_here(part.sinks, each.query_split)
        o_smH = path.core.attend_to(
            q_smH, k_TkH, v_TkH, path.positions.documents, path.tape, sinks_m
        )
    grad_of_heads = grad_tNH[:, _index(heads, grad_tNH.device)]
    grad_smH = gradient_of_heads(grad_of_heads, each.query_split, path.core.layout.cp_a2a)
    *found, grad_k, grad_v = torch.autograd.grad(o_smH, [*leaves, *kv], grad_smH)
    gradients.add(Q_FIELDS, heads, found)
    return [grad_k, grad_v]


def _exchange_q(
    path: _Path, each: HeadRound, part: Projections, gradients: "_Gradients"
) -> torch.Tensor:
    core = path.core
    q = core.project_q(gradients.x_tD, path.positions, part, gradients.linear)
    no_kv = q.detach()[:, :0]
    return seq_to_heads(q, no_kv, no_kv, each.query_split, core.layout.cp_a2a)[0]


def _widen(grad: torch.Tensor) -> torch.Tensor:
    """Return the gradient in at least fp32, to be added to."""
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


class _Linear(torch.autograd.Function):
    """F.linear whose backward adds the gradient of x to `sum_tD`, and makes no second [t, D]."""

    @staticmethod
    def forward(ctx, x_tD, weight_rD, bias, sum_tD):
        ctx.sum_tD = sum_tD
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x_tD, weight_rD)
        return F.linear(x_tD, weight_rD, bias)

    @staticmethod
    def backward(ctx, *grads):
        (grad_tr,) = grads
        x_tD, weight_rD = ctx.saved_tensors
        ctx.sum_tD.addmm_(grad_tr, weight_rD)
        return None, grad_tr.T @ x_tD, grad_tr.sum(0) if ctx.has_bias else None, None


class _Gradients:
    """The gradients of x and of the projections, added up group by group."""

    def __init__(self, x_tD: torch.Tensor, weights: Projections, head_size: int):
        # Detached: a gradient asked for in one group must not walk the graph behind x.
        self.x_tD = x_tD.detach()
        self.weights = weights
        self.head_size = head_size
        self.of_x = torch.zeros_like(x_tD)
        zeros = (self._zeros(name, x) for name, x in weights._asdict().items())
        self.of_weights = Projections(*zeros)

    @staticmethod
    def _zeros(name: str, weight: torch.Tensor | None) -> torch.Tensor | None:
        if weight is None:
            return None
        zeros = torch.zeros_like(weight)
        # Every group adds to a norm's gradient; the others get each row once.
        return _widen(zeros) if name.endswith("_norm") else zeros

    def leaves(
        self, fields: tuple[str, ...], heads: tuple[int, ...]
    ) -> tuple[Projections, list[torch.Tensor]]:
        """Return the heads' weights as leaves of a new graph, and a list of those that exist."""
        part = _part(self.weights, fields, heads, self.head_size)
        part = Projections(*(None if x is None else x.detach().requires_grad_() for x in part))
        return part, [x for x in part if x is not None]

    def linear(
        self, x_tD: torch.Tensor, weight_rD: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply F.linear; its backward adds to `of_x`."""
        return _Linear.apply(x_tD, weight_rD, bias, self.of_x)

    def narrow_weights(self) -> list[torch.Tensor | None]:
        """Return `of_weights` in the weights' dtype."""
        return [
            total if total is None or weight is None else total.to(weight.dtype)
            for total, weight in zip(self.of_weights, self.weights, strict=True)
        ]

    def add(
        self, fields: tuple[str, ...], heads: tuple[int, ...], found: Sequence[torch.Tensor]
    ) -> None:
        """Add the gradients of `leaves` in their places."""
        # `leaves` lists the weights in the order of their fields, and leaves out what is None.
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
                by_head = _by_head(name, total, self.head_size)
                # No head is in two groups.
                by_head[_index(heads, by_head.device)] = grad.view(-1, *by_head.shape[1:])


def _part(
    weights: Projections, fields: tuple[str, ...], heads: tuple[int, ...], head_size: int
) -> Projections:
    """Cut the named weights of some heads out; the others are None."""

    def cut(name: str) -> torch.Tensor | None:
        if name not in fields:
            return None
        weight = getattr(weights, name)
        # A norm is the same for all heads.
        if weight is None or name.endswith("_norm"):
            return weight
        return _by_head(name, weight, head_size)[_index(heads, weight.device)].flatten(0, 1)

    return Projections(*(cut(name) for name in weights._fields))


def _sinks_of(weights: Projections, heads: tuple[int, ...]) -> torch.Tensor | None:
    """Cut the sinks of some heads out."""
    return None if weights.sinks is None else weights.sinks[_index(heads, weights.sinks.device)]


def _by_head(name: str, weight: torch.Tensor, head_size: int) -> torch.Tensor:
    """View a weight's rows by their heads; a sink is one row."""
    rows = 1 if name == "sinks" else head_size
    return weight.view(-1, rows, *weight.shape[1:])


@cache
def _index(heads: tuple[int, ...], device: torch.device) -> slice | torch.Tensor:
    """Return an index of the heads: a slice where they are neighbours, which copies nothing.

    A tensor is made once per device, so that no step transfers one.
    """
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return torch.tensor(heads, device=device)
