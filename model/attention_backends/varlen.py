"""The attention backend over torch's own varlen_attn, which is FlashAttention 2."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from model.attention_backends.backend import Attend, Backend
from model.attention_backends.kernel_calls import NEVER
from model.attention_backends.mixed import mixed_attention
from model.scoring import PLAIN, Scoring, ScoringNeeds


def varlen_options(varlen_attn: Callable, scoring: Scoring = PLAIN) -> dict:
    """Spell "causal", the scoring and "grouped heads" as this release of torch's varlen_attn does.

    Where it has no flag for grouped heads (torch 2.11) it passes them on to an operator that takes
    them.
    """
    known = inspect.signature(varlen_attn).parameters
    window = scoring.window
    before = -1 if window is None else window - 1
    causal: dict[str, Any] = (
        {"window_size": (before, 0)} if "window_size" in known else {"is_causal": True}
    )
    assert window is None or "window_size" in known, "Backend.missing was asked before"
    if scoring.scale is not None:
        causal["scale"] = scoring.scale
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


def make_varlen(_crossover: int) -> Attend:
    """Make the attend function."""
    from torch.nn.attention.varlen import varlen_attn

    with_sinks = mixed_attention(NEVER)

    def attend(q, k, v, documents, scoring=PLAIN, sinks=None, /):
        assert scoring.softcap is None, "Backend.missing was asked before"
        # varlen_attn keeps its log-sum-exps to itself; the operator under it takes others.
        if sinks is not None:
            return with_sinks(q, k, v, documents, scoring, sinks)
        options = varlen_options(varlen_attn, scoring)
        out = varlen_attn(
            q, k, v, documents.cu_q, documents.cu_k, documents.max_q, documents.max_k, **options
        )
        assert isinstance(out, torch.Tensor), "the log-sum-exp was not asked for"
        return out

    return attend


def why_not_scored(needs: ScoringNeeds, _device: torch.device) -> str | None:
    """Say why torch's varlen_attn cannot compute what is needed, or None."""
    from torch.nn.attention.varlen import varlen_attn

    if needs.softcap:
        return "torch's varlen_attn caps no scores"
    if not needs.windows or "window_size" in inspect.signature(varlen_attn).parameters:
        return None
    return f"varlen_attn of torch {torch.__version__} takes no window"


BACKEND = Backend(
    name="varlen",
    make=make_varlen,
    modules=("torch.nn.attention.varlen",),
    why_not_scored=why_not_scored,
)
