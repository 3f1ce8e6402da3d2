"""Attention backends behind one signature.

    attend(q [n, m, H], k [s, k, H], v [s, k, H], segments) -> [n, m, H]

Causal within each document, nothing across documents, softmax scale 1 / sqrt(H). Query head i reads
key/value head i // (m // k). The queries are a range of the sample's tokens; the keys begin where
the first of their documents begins, and end with the queries: a document's last query and last key
are the same token ("bottom right"). Optional packages are imported only inside their backend.
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from model.attention_backends.mixed import (
    ASSUMED_CROSSOVER_TOKENS,
    Part,
    mixed_attention,
    why_mixed_cannot_run,
)
from model.attention_backends.sdpa import sdpa_attention


@dataclass(frozen=True)
class Segments:
    """The documents of one attention call over tokens [start, stop) of the microbatch."""

    queries: slice
    """Rows of the rank's queries that the call is for."""
    keys: slice
    """Rows of all keys that it reads: from the first document's begin to `stop`."""
    bounds_q: list[int]
    """Where each document's queries begin, and the end: [documents + 1], from 0."""
    bounds_k: list[int]
    cu_q: torch.Tensor
    """`bounds_q` as int32 on the device."""
    cu_k: torch.Tensor
    max_q: int
    """Queries of the longest document."""
    max_k: int
    parts: dict[int, list[Part]] = field(default_factory=dict, compare=False, repr=False)
    """What the backend `mixed` makes of the documents, by its crossover (attention_backends/mixed.py: split_parts)."""


def make_segments(
    cu_seqlens: torch.Tensor, pieces: list[tuple[int, int]], device: torch.device
) -> list[Segments]:
    """The attention calls for queries that are the given ranges of the tokens, one after the other.

    Args:
        cu_seqlens: int32 [documents + 1] on the host, over all tokens of the microbatch.
        pieces: half-open ranges (parallel/context.py: group_pieces).
    """
    edges = cu_seqlens.numpy()
    found = []
    row = 0
    for start, stop in pieces:
        first = int(np.searchsorted(edges, start, side="right")) - 1
        last = int(np.searchsorted(edges, stop, side="left"))
        inside = edges[first : last + 1]
        begin = int(edges[first])
        bounds_q = np.clip(inside, start, stop) - start
        bounds_k = np.minimum(inside, stop) - begin
        cu_q, cu_k = (
            torch.from_numpy(bounds.astype(np.int32)).to(device, non_blocking=True)
            for bounds in (bounds_q, bounds_k)
        )
        found.append(
            Segments(
                slice(row, row + stop - start),
                slice(begin, stop),
                bounds_q.tolist(),
                bounds_k.tolist(),
                cu_q,
                cu_k,
                int(np.diff(bounds_q).max()),
                int(np.diff(bounds_k).max()),
            )
        )
        row += stop - start
    return found


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """What a backend needs; `make` imports and returns its attend function."""

    name: str
    modules: tuple[str, ...]
    """Packages, of which one is enough; none = torch's own."""
    needs_gpu: bool
    """It needs a GPU, and computes in bf16 or fp16 only."""
    make: Callable[[int], Attend]
    """Takes the crossover in tokens, which only `mixed` has."""
    keeps_graph: bool = True
    """Is its graph good after q, k and v were emptied and filled again? (activation_memory/saved_attention.py)"""

    def missing(
        self,
        device: torch.device,
        dtype: torch.dtype,
        on_tape: bool = False,
        heads: "HeadShape | None" = None,
    ) -> str | None:
        """Why it cannot run here, or None."""
        if self.needs_gpu and device.type != "cuda":
            return f"it needs a GPU, and tensors live on {device.type}"
        if self.needs_gpu and dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in bf16 or fp16, not {dtype}"
        if on_tape and not self.keeps_graph:
            return "it is not proven to outlive its q, k and v (recompute attention_kept, attention_head_chunks)"
        if self.modules and not any(_is_installed(name) for name in self.modules):
            return f"the package {' or '.join(self.modules)} is not installed"
        if self.name == "flash" and installed_flash_version(device) is None:
            return "the release of flash-attn that is installed is not for this GPU"
        if self.name == "mixed":
            return why_mixed_cannot_run(device, dtype, heads or USUAL_HEADS)
        return None

    def why_not_first(self, device: torch.device) -> str | None:
        """Why `auto` leaves it to others on this card although it may run there, or None."""
        if device.type != "cuda":
            return None
        is_hopper_or_later = torch.cuda.get_device_capability(device)[0] >= HOPPER
        if self.name == "mixed" and not is_hopper_or_later:
            return "cuDNN is ahead of FlashAttention 2 on Hopper and later only"
        if self.name == "flash" and is_hopper_or_later and installed_flash_version(device) == 2:
            return "flash-attn 2 is behind cuDNN on Hopper and later, 3 and 4 are not"
        return None


HOPPER = 9
"""Major compute capability of Hopper; later architectures have higher ones."""
HeadShape = tuple[int, int, int]
"""A rank's query heads and key/value heads at one call, and the size of a head."""
USUAL_HEADS: HeadShape = (4, 1, 128)
"""Tried where the caller does not say its own."""


def _is_installed(module: str) -> bool:
    """Is there a module of this name, not just a folder? Of flash-attn 4 alone, `flash_attn` is an
    empty folder."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # a package around it is missing, or broken
        return False
    return spec is not None and spec.origin is not None


def _sdpa(_crossover: int) -> Attend:
    def attend(q, k, v, segments):
        rows_q, rows_k = (
            [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
            for bounds in (segments.bounds_q, segments.bounds_k)
        )
        return sdpa_attention(q, k, v, rows_q, rows_k)

    return attend


def _varlen(_crossover: int) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    options = varlen_options(varlen_attn)

    def attend(q, k, v, segments):
        return varlen_attn(
            q, k, v, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k, **options
        )

    return attend


def varlen_options(varlen_attn: Callable) -> dict:
    """How this torch's varlen_attn is told "causal" and "grouped": its flags differ between
    releases.

    Where it has no flag for grouped heads (torch 2.11) it passes them on to an operator that takes
    them.
    """
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


FLASH = {3: "flash_attn_interface", 4: "flash_attn.cute", 2: "flash_attn"}
"""Major version of flash-attn -> the module that has its flash_attn_varlen_func; the first that
fits is taken."""


def flash_version(capability: tuple[int, int], present: Callable[[str], bool]) -> int | None:
    """The release to use on a GPU of this compute capability: 3 is Hopper's own, 4 is for Hopper
    and later."""
    fitting = {HOPPER: (3, 4, 2)}.get(capability[0], (4, 2) if capability[0] > HOPPER else (2,))
    return next((version for version in fitting if present(FLASH[version])), None)


def installed_flash_version(device: torch.device) -> int | None:
    """The release to use on this GPU, of those that are installed."""
    return flash_version(torch.cuda.get_device_capability(device), _is_installed)


def _flash(_crossover: int) -> Attend:
    version = installed_flash_version(torch.device("cuda"))
    function = importlib.import_module(FLASH[version]).flash_attn_varlen_func
    known = inspect.signature(function).parameters

    def attend(q, k, v, segments):
        lengths = {
            "cu_seqlens_q": segments.cu_q,
            "cu_seqlens_k": segments.cu_k,
            "max_seqlen_q": segments.max_q,
            "max_seqlen_k": segments.max_k,
        }
        # Early releases of 4 find the longest document themselves; 3 and 4 may return the
        # log-sum-exp as well.
        out = function(
            q,
            k,
            v,
            causal=True,
            **{name: value for name, value in lengths.items() if name in known},
        )
        return out[0] if isinstance(out, tuple) else out

    return attend


def _te(_crossover: int) -> Attend:
    from transformer_engine.pytorch import DotProductAttention

    modules = {}

    def attend(q, k, v, segments):
        mask = (
            "padding_causal"
            if segments.bounds_q == segments.bounds_k
            else "padding_causal_bottom_right"
        )
        key = (q.shape[1], k.shape[1], q.shape[2], mask)
        if key not in modules:
            modules[key] = DotProductAttention(
                q.shape[1],
                q.shape[2],
                num_gqa_groups=k.shape[1],
                qkv_format="thd",
                attn_mask_type=mask,
                attention_dropout=0.0,
            )
        out = modules[key](
            q,
            k,
            v,
            cu_seqlens_q=segments.cu_q,
            cu_seqlens_kv=segments.cu_k,
            max_seqlen_q=segments.max_q,
            max_seqlen_kv=segments.max_k,
        )
        return out.view(q.shape)

    return attend


def _cudnn(_crossover: int) -> Attend:
    """cuDNN over packed documents, by its frontend: a plan for each new count of documents and
    longest document."""
    from cudnn import sdpa_torch

    def attend(q, k, v, segments):
        # The log-sum-exp is asked for since the backward needs it.
        out, _ = sdpa_torch(
            q,
            k,
            v,
            is_causal=True,
            causal_bottom_right=segments.bounds_q != segments.bounds_k,
            cu_seqlens_q=segments.cu_q,
            cu_seqlens_kv=segments.cu_k,
            max_seqlen_q=segments.max_q,
            max_seqlen_kv=segments.max_k,
            return_lse=True,
        )
        return out

    return attend


def has_bf16_units(device: torch.device) -> bool:
    """Can the device multiply bf16 matrices in hardware? Without it, bf16 is many times slower than
    fp32."""
    if device.type != "cpu":
        return True
    known = torch.cpu.get_capabilities()
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("flash", tuple(FLASH.values()), True, _flash),
        Backend("mixed", (), True, mixed_attention),
        Backend("te", ("transformer_engine",), True, _te, keeps_graph=False),
        Backend("varlen", ("torch.nn.attention.varlen",), True, _varlen),
        Backend("sdpa", (), False, _sdpa),
        Backend("cudnn", ("cudnn.sdpa.fwd.torch_op",), True, _cudnn, keeps_graph=False),
    )
}
"""In the order in which `auto` prefers them, where the card changes nothing
(Backend.why_not_first). sdpa runs everywhere: what stands after it is taken only when asked for."""


def pick_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    on_tape: bool = False,
    heads: HeadShape | None = None,
) -> tuple[Backend, str]:
    """The backend for `name`, and why it is that one.

    Args:
        on_tape: do calls go through activation_memory/saved_attention.py?
        heads: what a call of this rank has.

    Raises:
        ValueError: an explicitly named backend cannot run here.
    """
    if name != "auto":
        reason = BACKENDS[name].missing(device, dtype, on_tape, heads)
        if reason:
            install = ", or install it" if reason.endswith("is not installed") else ""
            raise ValueError(
                f"attention_backend = {name}: {reason}. Fix: --attention-backend auto{install}."
            )
        return BACKENDS[name], "asked for"
    passed_over = []
    for backend in BACKENDS.values():
        reason = backend.why_not_first(device) or backend.missing(device, dtype, on_tape, heads)
        if reason is None:
            return backend, "; ".join(passed_over) or "first choice"
        passed_over.append(f"{backend.name}: {reason}")
    raise AssertionError("sdpa runs everywhere")


def choose_attention(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    on_tape: bool = False,
    heads: HeadShape | None = None,
    crossover: int = ASSUMED_CROSSOVER_TOKENS,
) -> tuple[Attend, str]:
    """The attend function for `name` and one line that says what was chosen and why.

    Args:
        crossover: tokens from which on `mixed` gives a document to cuDNN.

    Raises:
        ValueError: an explicitly named backend cannot run here.
    """
    backend, why = pick_backend(name, device, dtype, on_tape, heads)
    return backend.make(crossover), f"attention: {backend.name} ({why})"
