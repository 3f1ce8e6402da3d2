"""Rotary position embedding (arXiv 2104.09864), in the half-split form of Hugging Face transformers.

Angles follow transformers' modeling_rope_utils.py and LlamaRotaryEmbedding operation by operation in
fp32: at a million positions another order of operations gives another model.

Legend: t tokens, n heads, H head size.
"""

from functools import cache

import torch


@cache
def inverse_frequencies(head_size: int, base: float) -> torch.Tensor:
    """fp32 [H / 2], computed on the CPU as transformers does: a GPU's power function rounds differently."""
    return 1.0 / (base ** (torch.arange(0, head_size, 2, dtype=torch.int64).to(torch.float32) / head_size))


def rotary_tables(positions_t: torch.Tensor, head_size: int, base: float,
                  dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position's angles: int64 [t] -> two [t, H] tensors of `dtype`."""
    frequencies = inverse_frequencies(head_size, base).to(positions_t.device, non_blocking=True)
    angles = positions_t.to(torch.float32)[:, None] * frequencies[None, :]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_tnH: torch.Tensor, cos_tH: torch.Tensor, sin_tH: torch.Tensor) -> torch.Tensor:
    """Turn each head's pairs (i, i + H/2) by its token's angles."""
    first, second = x_tnH.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x_tnH * cos_tH[:, None, :] + turned * sin_tH[:, None, :]
