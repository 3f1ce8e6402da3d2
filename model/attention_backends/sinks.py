"""Attention sinks over any kernel that gives its log-sum-exps: one more term in a softmax's sum.

A sink is a logit to which no value belongs. With the softmax's sum S of a query, its output o and
the sink's exp(z), the output becomes o * S / (S + exp(z)), and the log-sum-exp log(S + exp(z)).
A kernel's backward that is given these two makes the gradients of q, k and v right; the sink's own
is made here. Source: gpt-oss (arXiv 2508.10925); streaming attention (arXiv 2309.17453).

Legend: m query heads, L queries, H head size; any dims may come before them.
"""

import torch

ROWS = 4096
"""Queries whose outputs are widened at once."""


def put_sinks(
    out_mLH: torch.Tensor, log_sums_mL: torch.Tensor, sinks_m: torch.Tensor
) -> torch.Tensor:
    """Put the sinks into a kernel's output, in place; return the log-sum-exps with them."""
    sinks_m1 = sinks_m[:, None].to(log_sums_mL.dtype)
    out_mLH.mul_(torch.sigmoid(log_sums_mL - sinks_m1)[..., None])
    return torch.logaddexp(log_sums_mL, sinks_m1)


class SinkGradients:
    """Adds up the gradient of a call's sinks over its parts; without sinks it does nothing."""

    def __init__(self, sinks_m: torch.Tensor | None):
        self.sinks_m = sinks_m
        self.sum_m: torch.Tensor | None = None

    def add(
        self, grad_mLH: torch.Tensor, out_mLH: torch.Tensor, log_sums_mL: torch.Tensor | None
    ) -> None:
        """Add what some queries give, from their output and log-sum-exps with the sinks in them."""
        if self.sinks_m is None:
            return
        assert log_sums_mL is not None, "the kernel keeps them"
        wide = log_sums_mL.dtype
        # Some kernels' log-sum-exps have one more dim, of size 1.
        log_sums_mL = log_sums_mL.view(out_mLH.shape[:-1])
        shares_mL = (self.sinks_m[:, None].to(wide) - log_sums_mL).exp_()
        parts = (x.split(ROWS, dim=-2) for x in (grad_mLH, out_mLH, shares_mL[..., None]))
        for grad, out, shares in zip(*parts, strict=True):
            dots = torch.linalg.vecdot(grad.to(wide), out.to(wide))
            found_m = (dots * shares[..., 0]).sum(-1).view(-1, len(self.sinks_m)).sum(0)
            self.sum_m = found_m if self.sum_m is None else self.sum_m + found_m

    def total(self) -> torch.Tensor | None:
        """Return the gradient [m] in the sinks' dtype, or None without sinks."""
        if self.sinks_m is None:
            return None
        # No part was added where a call has no query.
        if self.sum_m is None:
            return torch.zeros_like(self.sinks_m)
        return self.sum_m.neg().to(self.sinks_m.dtype)
