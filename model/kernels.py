"""Attention backends behind one signature.

    attend(q [T, m, H], k [T, k, H], v [T, k, H], cu_seqlens int32 [documents + 1], max_seqlen) -> [T, m, H]

Causal within each document, nothing across documents, softmax scale 1 / sqrt(H). Query head i reads
key/value head i // (m // k). Optional packages are imported only inside their backend.
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """What a backend needs; `make` imports and returns its attend function."""

    name: str
    module: str | None
    cuda_only: bool
    half_only: bool
    make: Callable[[], Attend]

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run here, or None."""
        if self.cuda_only and device.type != "cuda":
            return f"it needs a GPU, and tensors live on {device.type}"
        if self.half_only and dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in bf16 or fp16, not {dtype}"
        if self.module is not None and _find_module(self.module) is None:
            return f"the package {self.module} is not installed"
        return None


def _find_module(name: str):
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None


def _sdpa() -> Attend:
    def attend(q, k, v, cu_seqlens, max_seqlen):
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        # [m, T, H] views; a document is a slice of T, so no mask is ever made.
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        bounds = cu_seqlens.tolist()
        parts = [scaled_dot_product_attention(q[None, :, a:b], k[None, :, a:b], v[None, :, a:b], is_causal=True)[0]
                 for a, b in zip(bounds, bounds[1:], strict=False)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return out.transpose(0, 1)
    return attend


def _varlen() -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    options = varlen_options(varlen_attn)

    def attend(q, k, v, cu_seqlens, max_seqlen):
        group = q.shape[1] // k.shape[1]
        if group > 1 and "enable_gqa" not in options:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return attend


def varlen_options(varlen_attn: Callable) -> dict:
    """How this torch's varlen_attn is told "causal" and "grouped": its flags differ between releases."""
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


def _flash() -> Attend:
    from flash_attn import flash_attn_varlen_func

    def attend(q, k, v, cu_seqlens, max_seqlen):
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)
    return attend


def _te() -> Attend:
    from transformer_engine.pytorch import DotProductAttention
    modules = {}

    def attend(q, k, v, cu_seqlens, max_seqlen):
        shape = (q.shape[1], k.shape[1], q.shape[2])
        if shape not in modules:
            modules[shape] = DotProductAttention(shape[0], shape[2], num_gqa_groups=shape[1], qkv_format="thd",
                                                 attn_mask_type="padding_causal", attention_dropout=0.0)
        out = modules[shape](q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=max_seqlen,
                             max_seqlen_kv=max_seqlen)
        return out.view(q.shape)
    return attend


def has_bf16_units(device: torch.device) -> bool:
    """Can the device multiply bf16 matrices in hardware? Without it, bf16 is many times slower than fp32."""
    if device.type != "cpu":
        return True
    known = torch.cpu.get_capabilities()
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


BACKENDS = {backend.name: backend for backend in (
    Backend("flash", "flash_attn", True, True, _flash),
    Backend("te", "transformer_engine", True, True, _te),
    Backend("varlen", "torch.nn.attention.varlen", True, True, _varlen),
    Backend("sdpa", None, False, False, _sdpa),
)}
"""In the order in which `auto` prefers them."""


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Attend, str]:
    """The attend function for `name` and one line that says what was chosen and why.

    Raises:
        ValueError: an explicitly named backend cannot run here.
    """
    if name != "auto":
        reason = BACKENDS[name].missing(device, dtype)
        if reason:
            raise ValueError(f"attention_backend = {name}: {reason}. Fix: --attention-backend auto, or install it.")
        return BACKENDS[name].make(), f"attention: {name} (asked for)"
    passed_over = []
    for backend in BACKENDS.values():
        reason = backend.missing(device, dtype)
        if reason is None:
            why = "; ".join(passed_over) or "first choice"
            return backend.make(), f"attention: {backend.name} ({why})"
        passed_over.append(f"{backend.name}: {reason}")
    raise AssertionError("sdpa runs everywhere")
