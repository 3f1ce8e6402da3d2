"""The attention backend over torch's own varlen_attn, which is FlashAttention 2."""

import inspect
from collections.abc import Callable

import torch

from model.attention_backends.backend import Attend, Backend


def varlen_options(varlen_attn: Callable) -> dict:
    """Spell "causal" and "grouped heads" as this release of torch's varlen_attn wants them.

    Where it has no flag for grouped heads (torch 2.11) it passes them on to an operator that takes
    them.
    """
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


def make_varlen(_crossover: int) -> Attend:
    """Make the attend function."""
    from torch.nn.attention.varlen import varlen_attn

    options = varlen_options(varlen_attn)

    def attend(q, k, v, documents, /):
        out = varlen_attn(
            q, k, v, documents.cu_q, documents.cu_k, documents.max_q, documents.max_k, **options
        )
        assert isinstance(out, torch.Tensor), "the log-sum-exp was not asked for"
        return out

    return attend


BACKEND = Backend(name="varlen", make=make_varlen, modules=("torch.nn.attention.varlen",))
