"""What an attention backend is: one function behind one signature, and what it needs to run.

    attend(q [n, m, H], k [s, k, H], v [s, k, H], documents, scoring, sinks [m]) -> [n, m, H]

Causal within each document, nothing across documents. Scores are those of model/scoring.py: with a
window of W tokens a query sees its own key and the W - 1 before it; a sink is one more term in the
sum of its head's softmax, and None = no head has one. Query head i
reads key/value head i // (m // k). The queries are a range of the sample's tokens; the keys begin
where the first of their documents begins, and end with the queries: a document's last query and
last key are the same token ("bottom right"). Each backend is a file of this folder, which imports
an optional package only inside the function that makes its attend function.

Legend: n queries and s keys of a call, m query and k key/value heads of a rank, H head size.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from model.attention_backends.documents import PackedDocuments
from model.scoring import NO_NEEDS, PLAIN, Scoring, ScoringNeeds

HOPPER = 9
"""Major compute capability of Hopper; later architectures have higher ones."""
HeadShape = tuple[int, int, int]
"""A rank's query heads and key/value heads at one call, and the size of a head."""
USUAL_HEADS: HeadShape = (4, 1, 128)
"""What is tried where the caller does not say its own."""


class Attend(Protocol):
    """Attention over packed documents: differentiable, and on one rank."""

    def __call__(
        self,
        q_nmH: torch.Tensor,
        k_skH: torch.Tensor,
        v_skH: torch.Tensor,
        documents: PackedDocuments,
        scoring: Scoring = PLAIN,
        sinks_m: torch.Tensor | None = None,
        /,
    ) -> torch.Tensor: ...


def _no_obstacle(_device: torch.device, _dtype: torch.dtype, _heads: HeadShape) -> None:
    return None


def _scores_all(_needs: ScoringNeeds, _device: torch.device) -> None:
    return None


def _first_everywhere(_device: torch.device) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One backend: how its attend function is made, and what it declares of itself."""

    name: str
    make: Callable[[int], Attend]
    """Import what the backend needs and return its attend function.

    The argument is the crossover in tokens, which only `mixed` has."""
    modules: tuple[str, ...] = ()
    """Packages, of which one is enough; none = torch's own."""
    needs_gpu: bool = True
    """It needs a GPU, and computes in bf16 or fp16 only."""
    keeps_graph: bool = True
    """Is its graph good after q, k and v were freed and filled again?

    (activation_memory/saved_attention.py does so.)"""
    why_not_scored: Callable[[ScoringNeeds, torch.device], str | None] = _scores_all
    """Say why it cannot compute what a model's layers need, or None; asked where they need any."""
    obstacle: Callable[[torch.device, torch.dtype, HeadShape], str | None] = _no_obstacle
    """Say why the installed release cannot run on this GPU, or None."""
    why_behind: Callable[[torch.device], str | None] = _first_everywhere
    """Say why `auto` prefers others on this GPU although this one may run there, or None."""

    def missing(
        self,
        device: torch.device,
        dtype: torch.dtype,
        heads: HeadShape = USUAL_HEADS,
        *,
        on_tape: bool = False,
        needs: ScoringNeeds = NO_NEEDS,
    ) -> str | None:
        """Say why it cannot run here, or None.

        Args:
            on_tape: are q, k and v freed between a call's forward and backward?
            needs: what some layer has beside plain scores.
        """
        # What the device and the settings rule out comes first: it needs no package to be found.
        if self.needs_gpu and device.type != "cuda":
            return f"it needs a GPU, and tensors live on {device.type}"
        if self.needs_gpu and dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in bf16 or fp16, not {dtype}"
        if on_tape and not self.keeps_graph:
            return (
                "it is not proven to outlive its q, k and v "
                "(recompute attention_kept, attention_head_chunks)"
            )
        if self.modules and not any(is_installed(name) for name in self.modules):
            return f"the package {' or '.join(self.modules)} is not installed"
        reason = None if needs == NO_NEEDS else self.why_not_scored(needs, device)
        if reason:
            return reason
        # The backend's own reason may run its kernels, so it is asked last.
        return self.obstacle(device, dtype, heads)


def is_installed(module: str) -> bool:
    """Tell whether there is a module of this name, not just a folder.

    Where flash-attn 4 alone is installed, `flash_attn` is an empty folder.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # a package around it is missing, or broken
        return False
    return spec is not None and spec.origin is not None


def is_hopper_or_later(device: torch.device) -> bool:
    """Tell whether the GPU is a Hopper or of a later architecture."""
    return torch.cuda.get_device_capability(device)[0] >= HOPPER
