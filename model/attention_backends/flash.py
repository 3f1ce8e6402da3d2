"""The attention backend over flash-attn, in the release that suits the GPU."""

import importlib
import inspect
from collections.abc import Callable

import torch

from model.attention_backends.backend import (
    HOPPER,
    Attend,
    Backend,
    HeadShape,
    is_hopper_or_later,
    is_installed,
)
from model.scoring import PLAIN, ScoringNeeds

FLASH = {3: "flash_attn_interface", 4: "flash_attn.cute", 2: "flash_attn"}
"""Major version of flash-attn -> the module that has its flash_attn_varlen_func."""
WITH_SINKS = 4
"""The one major version that takes sinks."""
BACKWARD = "_flash_attn_bwd"
"""Release 4's backward; asked only whether it takes sinks."""


def flash_version(capability: tuple[int, int], present: Callable[[str], bool]) -> int | None:
    """Choose the release for a GPU of this compute capability, of those that are present.

    3 is Hopper's own, 4 is for Hopper and later.
    """
    fitting = {HOPPER: (3, 4, 2)}.get(capability[0], (4, 2) if capability[0] > HOPPER else (2,))
    return next((version for version in fitting if present(FLASH[version])), None)


def installed_flash_version(device: torch.device) -> int | None:
    """Choose the release for this GPU, of those that are installed."""
    return flash_version(torch.cuda.get_device_capability(device), is_installed)


def make_flash(_crossover: int) -> Attend:
    """Make the attend function."""
    version = installed_flash_version(torch.device("cuda"))
    assert version is not None, "Backend.missing was asked before"
    function = importlib.import_module(FLASH[version]).flash_attn_varlen_func
    # Releases differ in the arguments that they know.
    known = inspect.signature(function).parameters

    def attend(q, k, v, documents, scoring=PLAIN, sinks=None, /):
        lengths = {
            "cu_seqlens_q": documents.cu_q,
            "cu_seqlens_k": documents.cu_k,
            "max_seqlen_q": documents.max_q,
            "max_seqlen_k": documents.max_k,
        }
        # Early releases of 4 find the longest document themselves.
        taken = {name: value for name, value in lengths.items() if name in known}
        # All releases count the tokens before the query, and after it.
        if scoring.window is not None:
            taken["window_size"] = (scoring.window - 1, 0)
        if scoring.softcap is not None:
            taken["softcap"] = scoring.softcap
        if sinks is not None:
            taken["learnable_sink"] = sinks
        out = function(q, k, v, causal=True, softmax_scale=scoring.scale, **taken)
        # 3 and 4 may return the log-sum-exp as well.
        return out[0] if isinstance(out, tuple) else out

    return attend


def _no_release_for(device: torch.device, _dtype: torch.dtype, _heads: HeadShape) -> str | None:
    if installed_flash_version(device) is None:
        return "the release of flash-attn that is installed is not for this GPU"
    return None


def _not_scored(needs: ScoringNeeds, device: torch.device) -> str | None:
    """Say why the installed release cannot compute what is needed, or None."""
    version = installed_flash_version(device)
    if version is None:
        return None  # said by _no_release_for
    module = importlib.import_module(FLASH[version])
    known = inspect.signature(module.flash_attn_varlen_func).parameters
    if needs.softcap and "softcap" not in known:
        return f"this release of flash-attn {version} caps no scores"
    if needs.sinks and not has_sink_gradients(version):
        return f"this release of flash-attn {version} has no gradient of attention sinks"
    return None


def has_sink_gradients(version: int) -> bool:
    """Tell whether the installed release of this major version trains sinks; 4 began so later."""
    if version != WITH_SINKS:
        return False
    backward = getattr(importlib.import_module(f"{FLASH[version]}.interface"), BACKWARD, None)
    return backward is not None and "learnable_sink" in inspect.signature(backward).parameters


def _behind_cudnn(device: torch.device) -> str | None:
    if is_hopper_or_later(device) and installed_flash_version(device) == 2:
        return "flash-attn 2 is behind cuDNN on Hopper and later, 3 and 4 are not"
    return None


BACKEND = Backend(
    name="flash",
    make=make_flash,
    modules=tuple(FLASH.values()),
    why_not_scored=_not_scored,
    obstacle=_no_release_for,
    why_behind=_behind_cudnn,
)
