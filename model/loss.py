"""Output projection and cross entropy in one, by chunks of tokens: nothing of [t, V] exists.

Backward of a chunk follows its forward at once, while its logits are there; what is kept is the gradient of the input
and of the weight. Source: Liger Kernel's fused linear cross entropy (arXiv 2410.10989) and ALST's tiled loss
(arXiv 2506.13996), here over a vocabulary split over tp (Megatron-LM, arXiv 1909.08053) and as a sum over targets.

Legend: t tokens, c those of a chunk, D hidden, v this tp rank's part of the vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.collectives import all_reduce
from parallel.layout import Axis
from parallel.tensor import vocab_parallel_first_choices

IGNORED_LABEL = -100
"""torch's own convention for a token without a target."""


@dataclass(frozen=True)
class Head:
    """What the loss needs to know beside tensors."""

    tp: Axis
    vocab_size: int
    """Tokens that exist; the weight's rows beyond them are padding and take no part."""
    chunk_tokens: int
    """c; the same on all tp ranks."""


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_tD, weight_vD, labels_t, scale, head):
        grads = torch.empty_like(x_tD), torch.zeros_like(weight_vD, dtype=_wide(x_tD))
        loss, _ = _by_chunks(x_tD, weight_vD, labels_t, head, scale, grads)
        ctx.save_for_backward(grads[0], grads[1].to(weight_vD.dtype))
        return loss.mul_(scale)

    @staticmethod
    def backward(ctx, grad):
        # Not in place: a schedule that splits the backward comes twice.
        return *(kept * grad for kept in ctx.saved_tensors), None, None, None


def fused_loss(x_tD: torch.Tensor, weight_vD: torch.Tensor, labels_t: torch.Tensor, scale: float,
               head: Head) -> torch.Tensor:
    """scale * sum of the targets' cross entropies in nats: a scalar in at least fp32, the same on all tp ranks.

    Args:
        x_tD: all tokens of this context-parallel rank on every tp rank; each tp rank gets its part of the gradient.
        labels_t: IGNORED_LABEL where there is no target; without any, the result is 0, with gradients of 0.
    """
    if torch.is_grad_enabled():
        return _FusedLoss.apply(x_tD, weight_vD, labels_t, scale, head)
    return _by_chunks(x_tD, weight_vD, labels_t, head)[0].mul_(scale)


def score(x_tD: torch.Tensor, weight_vD: torch.Tensor, labels_t: torch.Tensor,
          head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the targets' cross entropies, how many targets were the largest logit), without gradients."""
    return _by_chunks(x_tD, weight_vD, labels_t, head, count_hits=True)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_chunks(x_tD, weight_vD, labels_t, head: Head, scale: float = 1.0,
               grads: tuple[torch.Tensor, torch.Tensor] | None = None,
               count_hits: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of losses and hits; fills `grads` (of x, overwritten; of the weight, added to), scaled."""
    total = torch.zeros((), dtype=_wide(x_tD), device=x_tD.device)
    hits = torch.zeros((), dtype=torch.int64, device=x_tD.device)
    for start in range(0, x_tD.shape[0], head.chunk_tokens):
        rows = slice(start, start + head.chunk_tokens)
        # A function of its own: its tensors are gone before the next chunk's are made.
        loss, found = _one_chunk(x_tD[rows], weight_vD, labels_t[rows], head, scale,
                                 grads and (grads[0][rows], grads[1]), count_hits)
        total += loss
        hits += found
    return total, hits


def _one_chunk(x_cD, weight_vD, labels_c, head: Head, scale: float, grads: tuple[torch.Tensor, torch.Tensor] | None,
               count_hits: bool) -> tuple[torch.Tensor, torch.Tensor | int]:
    logits_cv = (x_cD @ weight_vD.T).to(_wide(x_cD))
    logits_cv[:, max(0, head.vocab_size - head.tp.rank * weight_vD.shape[0]):] = float("-inf")
    hits = (vocab_parallel_first_choices(logits_cv, head.tp) == labels_c).sum() if count_hits else 0
    losses_c, powers_cv, sums_c, target = _cross_entropy(logits_cv, labels_c, head.tp)
    if grads is not None:
        # The gradient of the logits takes the place of their powers; the softmax in between is not written.
        factors_c = (labels_c != IGNORED_LABEL).to(sums_c.dtype).mul_(scale)
        powers_cv.mul_((factors_c / sums_c)[:, None])
        grad_cv = powers_cv.scatter_add_(1, target.ids[:, None], -(target.here * factors_c)[:, None]).to(x_cD.dtype)
        torch.mm(grad_cv, weight_vD, out=grads[0])
        if grads[1].dtype == grad_cv.dtype:
            grads[1].addmm_(grad_cv.T, x_cD)
        else:
            grads[1].add_(grad_cv.T @ x_cD)
    return losses_c.sum(), hits


@dataclass(frozen=True)
class _Target:
    """The label's column on this tp rank."""

    ids: torch.Tensor  # int64 [c]; 0 where it is elsewhere
    here: torch.Tensor  # [c] 1 where it is here, else 0


def _cross_entropy(logits_cv: torch.Tensor, labels_c: torch.Tensor,
                   tp: Axis) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, _Target]:
    """(losses [c], exp(logits - largest) [c, v] in the place of the logits, its sums over all v [c], target)."""
    v = logits_cv.shape[1]
    ids = labels_c - tp.rank * v
    absent = (ids < 0) | (ids >= v)
    target = _Target(ids.masked_fill_(absent, 0), (~absent).to(logits_cv.dtype))
    chosen = logits_cv.gather(1, target.ids[:, None])[:, 0].masked_fill_(absent, 0.0)
    top = all_reduce(logits_cv.amax(dim=1), tp, dist.ReduceOp.MAX)
    powers_cv = logits_cv.sub_(top[:, None]).exp_()
    sums = all_reduce(torch.stack([powers_cv.sum(dim=1), chosen]), tp)
    losses = (sums[0].log() + top - sums[1]).masked_fill_(labels_c == IGNORED_LABEL, 0.0)
    return losses, powers_cv, sums[0], target

