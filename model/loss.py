"""Output projection and cross entropy in one, by chunks of tokens: no [t, V] tensor exists.

Backward of a chunk follows its forward at once, while its logits are there; what is kept is the
gradient of the input and of the weight. Source: Liger Kernel's fused linear cross entropy (arXiv
2410.10989) and ALST's tiled loss (arXiv 2506.13996), here over a vocabulary split over tp
(Megatron-LM, arXiv 1909.08053) and as a sum over targets.

Legend: t tokens, c those of a chunk, r those of a block of a chunk, D hidden, v this tp rank's part
of the vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from model import compiled
from model.pointwise import row_blocks
from model.products import add_product, linear, write_products
from parallel.collectives import all_reduce
from parallel.layout import Axis
from parallel.tensor import vocab_parallel_argmax

BLOCK_LOGITS = 2**21
"""Logits that a CPU widens at once.

The CPU's cache holds them: 2,048 tokens and 8,192 ids in bf16 take 87 ms, forward and backward, in
blocks of 2**21, 98 in those of 2**18 and 94 at once."""
IGNORED_LABEL = -100
"""torch's own convention for a token without a target."""


@dataclass(frozen=True)
class LossSettings:
    """Says over which ranks, tokens and chunks the loss is computed."""

    tp: Axis
    vocab_size: int
    """Tokens that exist; the weight's rows beyond them are padding and take no part."""
    chunk_tokens: int
    """Tokens of a chunk (c); the same on all tp ranks."""
    softcap: float | None = None
    """Bound that tanh puts on the logits; None = none."""


class _FusedLoss(torch.autograd.Function):
    """Computes the gradients with the loss, and keeps them instead of the logits."""

    @staticmethod
    def forward(ctx, x_tD, weight_vD, labels_t, scale, settings, losses_t):
        grad_x_tD = torch.empty_like(x_tD)
        # Several chunks' parts of the weight's gradient are summed up in at least fp32.
        is_sum = x_tD.shape[0] > settings.chunk_tokens
        sum_dtype = _wide(weight_vD) if is_sum else weight_vD.dtype
        grad_weight_vD = torch.zeros_like(weight_vD, dtype=sum_dtype)
        grads = (grad_x_tD, grad_weight_vD)
        loss = _by_chunks(x_tD, weight_vD, labels_t, settings, scale, grads, losses_t)
        ctx.save_for_backward(grad_x_tD, grad_weight_vD.to(weight_vD.dtype))
        return loss.mul_(scale)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        # Not in place: a schedule that splits the backward comes twice.
        return *(kept * grad for kept in ctx.saved_tensors), None, None, None, None


def fused_loss(
    x_tD: torch.Tensor,
    weight_vD: torch.Tensor,
    labels_t: torch.Tensor,
    scale: torch.Tensor | float,
    settings: LossSettings,
    losses_t: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return scale * the sum of the targets' cross entropies in nats.

    It is a scalar in at least fp32, the same on all tp ranks.

    Args:
        x_tD: all tokens of this context-parallel rank on every tp rank; each tp rank gets its part
            of the gradient.
        labels_t: IGNORED_LABEL where there is no target; without any, the result is 0, with
            gradients of 0.
        scale: a number, or a scalar on the device.
        losses_t: is filled with each token's cross entropy, 0 without a target.
    """
    if torch.is_grad_enabled():
        return _FusedLoss.apply(x_tD, weight_vD, labels_t, scale, settings, losses_t)
    return _by_chunks(x_tD, weight_vD, labels_t, settings, losses_t=losses_t).mul_(scale)


def score(
    x_tD: torch.Tensor, weight_vD: torch.Tensor, labels_t: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sum of the targets' cross entropies, how many targets had the largest logit).

    There are no gradients.
    """
    hits_t = torch.empty(labels_t.shape, dtype=torch.bool, device=labels_t.device)
    total = _by_chunks(x_tD, weight_vD, labels_t, settings, hits_t=hits_t)
    return total, hits_t.sum()


def score_each(
    x_tD: torch.Tensor, weight_vD: torch.Tensor, labels_t: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each target's cross entropy in nats, and whether it had the largest logit: two [t].

    There are no gradients. Without a target they are 0 and False.
    """
    losses_t = torch.empty(labels_t.shape, dtype=_wide(x_tD), device=labels_t.device)
    hits_t = torch.empty(labels_t.shape, dtype=torch.bool, device=labels_t.device)
    _by_chunks(x_tD, weight_vD, labels_t, settings, losses_t=losses_t, hits_t=hits_t)
    return losses_t, hits_t


def _wide(x: torch.Tensor) -> torch.dtype:
    """Return the tensor's dtype, or fp32 where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def _by_chunks(
    x_tD,
    weight_vD,
    labels_t,
    settings: LossSettings,
    scale: torch.Tensor | float = 1.0,
    grads: tuple[torch.Tensor, torch.Tensor] | None = None,
    losses_t: torch.Tensor | None = None,
    hits_t: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum of the losses, computed chunk by chunk.

    Args:
        grads: the scaled gradients of x, which are overwritten, and of the weight, which are added
            to.
        losses_t: each token's loss, which is overwritten.
        hits_t: whether each target has the largest logit; it is overwritten.
    """
    total = torch.zeros((), dtype=_wide(x_tD), device=x_tD.device)
    for start in range(0, x_tD.shape[0], settings.chunk_tokens):
        rows = slice(start, start + settings.chunk_tokens)
        # A function of its own: its tensors are gone before the next chunk's are made.
        total += _one_chunk(
            x_tD[rows],
            weight_vD,
            labels_t[rows],
            settings,
            scale,
            grads and (grads[0][rows], grads[1]),
            None if losses_t is None else losses_t[rows],
            None if hits_t is None else hits_t[rows],
        )
    return total


def _one_chunk(
    x_cD: torch.Tensor,
    weight_vD: torch.Tensor,
    labels_c: torch.Tensor,
    settings: LossSettings,
    scale: torch.Tensor | float,
    grads: tuple[torch.Tensor, torch.Tensor] | None,
    out_c: torch.Tensor | None,
    hits_c: torch.Tensor | None,
) -> torch.Tensor:
    """Return the sum of losses of one chunk, and fill its gradients, its losses and its hits."""
    logits_cv = linear(x_cD, weight_vD)
    losses_c = torch.empty_like(labels_c, dtype=_wide(x_cD))
    # What each row's loss counts in the sum: 0 without a target.
    factors_c = None
    if grads is not None:
        factors_c = (labels_c != IGNORED_LABEL).to(losses_c.dtype).mul_(scale)
    # The rows after the vocabulary are padding.
    num_real = max(0, settings.vocab_size - settings.tp.rank * weight_vD.shape[0])
    # A GPU takes all rows at once. The ranks of tp cut alike: each block has its exchanges.
    blocks = [slice(None)]
    if logits_cv.device.type == "cpu":
        blocks = row_blocks(logits_cv, BLOCK_LOGITS)
    for rows in blocks:
        losses_c[rows] = _cross_entropy_(
            logits_cv[rows],
            labels_c[rows],
            settings,
            num_real,
            None if factors_c is None else factors_c[rows],
            None if hits_c is None else hits_c[rows],
        )
    # The gradient is in the logits' place now, and is used up at once.
    if grads is not None:
        write_products(grads[0], (logits_cv, weight_vD))
        add_product(grads[1], logits_cv.T, x_cD)
    if out_c is not None:
        out_c.copy_(losses_c)
    return losses_c.sum()


def _cross_entropy_(
    logits_rv: torch.Tensor,
    labels_r: torch.Tensor,
    settings: LossSettings,
    num_real: int,
    factors_r: torch.Tensor | None,
    hits_r: torch.Tensor | None,
) -> torch.Tensor:
    """Return the losses of some rows of logits in nats, and fill their hits.

    Args:
        logits_rv: what they hold afterwards is the gradient of `(factors * losses).sum()`, or
            nothing of use without factors.
        num_real: how many of the first columns are no padding.
    """
    values_rv = logits_rv
    if not compiled.is_fused(logits_rv):
        values_rv = logits_rv.to(_wide(logits_rv))
    # Another tensor of the same size: the softmax overwrites what the slope could be made from.
    slopes_rv = None
    if settings.softcap is not None:
        cap = _cap if compiled.is_fused(logits_rv) else _cap_
        values_rv, slopes_rv = compiled.run(cap, values_rv, settings.softcap)
    # No probability falls on padding.
    if num_real < values_rv.shape[1]:
        values_rv[:, num_real:] = float("-inf")
    if hits_r is not None:
        torch.eq(vocab_parallel_argmax(values_rv, settings.tp), labels_r, out=hits_r)
    softmax = _Softmax(values_rv, labels_r, settings.tp)
    if factors_r is not None:
        grad_rv = softmax.gradient(factors_r)
        if slopes_rv is not None:
            grad_rv.mul_(slopes_rv)
        # It is there already where nothing was widened or capped into another tensor.
        if grad_rv is not logits_rv:
            logits_rv.copy_(grad_rv)
    return softmax.losses(labels_r)


def _cap_(logits_cv: torch.Tensor, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cap * tanh(logit / cap), in the logits' place, and its slope at each."""
    logits_cv.div_(cap).tanh_()
    slopes_cv = logits_cv.square().neg_().add_(1)
    return logits_cv.mul_(cap), slopes_cv


def _cap(logits_cv: torch.Tensor, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `_cap_` does, in new tensors, computed in at least fp32 and rounded once."""
    shares_cv = (logits_cv.to(_wide(logits_cv)) / cap).tanh()
    slopes_cv = 1 - shares_cv.square()
    return (shares_cv * cap).to(logits_cv.dtype), slopes_cv.to(logits_cv.dtype)


class _Softmax:
    """Softmax over a vocabulary split over tp, without ever writing it.

    Without fused kernels (a CPU) the logits come in at least fp32, and their exponentials take
    their place. With them the logits stay as the product wrote them: one kernel reads them for the
    row's maximum and sum, another one reads them again and puts the gradient in their place, so
    they pass through memory three times.
    """

    def __init__(self, logits_cv: torch.Tensor, labels_c: torch.Tensor, tp: Axis):
        # Labels that another rank holds read column 0 here, and count for nothing.
        v = logits_cv.shape[1]
        ids_c = labels_c - tp.rank * v
        absent_c = (ids_c < 0) | (ids_c >= v)
        self.ids_c = ids_c.masked_fill_(absent_c, 0)
        self.is_here_c = ~absent_c
        self.values_cv = logits_cv
        self.is_fused = compiled.is_fused(logits_cv)
        exp_sums = _exp_sums if self.is_fused else _exp_sums_
        self.own_tops_c, own_sums_c, chosen_c = compiled.run(exp_sums, logits_cv, self.ids_c)
        # Sums over this rank's columns become sums over all: relative to the same maximum.
        self.tops_c = all_reduce(self.own_tops_c.clone(), tp, dist.ReduceOp.MAX)
        own_sums_c = own_sums_c * (self.own_tops_c - self.tops_c).exp()
        self.sums_c, self.chosen_c = all_reduce(
            torch.stack([own_sums_c, chosen_c * self.is_here_c]), tp
        )

    def losses(self, labels_c: torch.Tensor) -> torch.Tensor:
        """Return each token's cross entropy in nats [c], 0 without a target."""
        losses_c = self.sums_c.log() + self.tops_c - self.chosen_c
        return losses_c.masked_fill_(labels_c == IGNORED_LABEL, 0.0)

    def gradient(self, factors_c: torch.Tensor) -> torch.Tensor:
        """Put the gradient of `(factors * losses).sum()` in the logits' place [c, v], once."""
        shares_c = factors_c / self.sums_c
        targets_c = factors_c * self.is_here_c
        if self.is_fused:
            compiled.run(
                _softmax_gradient_, self.values_cv, self.ids_c, self.tops_c, shares_c, targets_c
            )
            return self.values_cv
        shares_c *= (self.own_tops_c - self.tops_c).exp()
        return self.values_cv.mul_(shares_c[:, None]).scatter_add_(
            1, self.ids_c[:, None], -targets_c[:, None]
        )


def _exp_sums_(logits_cv: torch.Tensor, ids_c: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Put exp(logit - the row's maximum) in the place of the logits.

    Returns:
        The rows' maxima, the sums of the exponentials, and the logits at `ids_c`.
    """
    chosen_c = logits_cv.gather(1, ids_c[:, None])[:, 0]
    tops_c = _finite(logits_cv.amax(dim=1))
    sums_c = logits_cv.sub_(tops_c[:, None]).exp_().sum(dim=1)
    return tops_c, sums_c, _finite(chosen_c)


def _exp_sums(logits_cv: torch.Tensor, ids_c: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what `_exp_sums_` does and leave the logits unchanged.

    In this form the compiler reads each row once.
    """
    wide_cv = logits_cv.to(_wide(logits_cv))
    tops_c1 = wide_cv.amax(dim=1, keepdim=True)
    sums_c1 = (wide_cv - tops_c1).exp().sum(dim=1, keepdim=True)
    chosen_c = logits_cv.gather(1, ids_c[:, None])[:, 0].to(wide_cv.dtype)
    sums_c = torch.where(tops_c1 == float("-inf"), 0.0, sums_c1)[:, 0]
    return _finite(tops_c1[:, 0]), sums_c, _finite(chosen_c)


def _finite(values: torch.Tensor) -> torch.Tensor:
    """Replace -inf: a tp rank may hold nothing but padding."""
    return values.clamp(min=torch.finfo(values.dtype).min)


def _softmax_gradient_(
    logits_cv: torch.Tensor,
    ids_c: torch.Tensor,
    tops_c: torch.Tensor,
    shares_c: torch.Tensor,
    targets_c: torch.Tensor,
) -> None:
    """Put exp(logit - top) * share, less `targets_c` in column `ids_c`, in the logits' place."""
    # Compared instead of scattered: one kernel reads and writes each row once.
    columns_v = torch.arange(logits_cv.shape[1], device=logits_cv.device)
    wide_cv = logits_cv.to(tops_c.dtype)
    softmax_cv = (wide_cv - tops_c[:, None]).exp() * shares_c[:, None]
    target_cv = torch.where(columns_v == ids_c[:, None], targets_c[:, None], 0.0)
    logits_cv.copy_(softmax_cv - target_cv)
