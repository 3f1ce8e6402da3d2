"""Which attention backend a run computes with: the one asked for, or the first that can run here.

`auto` goes through the table below in order, passes over a backend that cannot run or is behind
another one on this GPU, and says why.
"""

import torch

from model.attention_backends import cudnn, flash, mixed, sdpa, te, varlen
from model.attention_backends.backend import USUAL_HEADS, Attend, Backend, HeadShape
from model.attention_backends.kernel_calls import assumed_crossover
from model.scoring import NO_NEEDS, ScoringNeeds

BACKENDS: dict[str, Backend] = {
    each.BACKEND.name: each.BACKEND for each in (flash, mixed, te, varlen, sdpa, cudnn)
}
"""In the order in which `auto` prefers them, where the GPU changes nothing (Backend.why_behind).

sdpa runs everywhere: what stands after it is taken only when asked for."""


def pick_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: HeadShape = USUAL_HEADS,
    *,
    on_tape: bool = False,
    needs: ScoringNeeds = NO_NEEDS,
) -> tuple[Backend, str]:
    """Return the backend for `name`, and why it is that one.

    Args:
        heads: what a call of this rank has.
        on_tape: do calls go through activation_memory/saved_attention.py?
        needs: what some layer has beside plain scores.

    Raises:
        ValueError: an explicitly named backend cannot run here.
    """
    # A backend asked for by name runs, or the run is refused.
    if name != "auto":
        reason = BACKENDS[name].missing(device, dtype, heads, on_tape=on_tape, needs=needs)
        if reason:
            # A missing package can be put there; all else needs another backend.
            install = ", or install it" if reason.endswith("is not installed") else ""
            raise ValueError(
                f"attention_backend = {name}: {reason}. Fix: --attention-backend auto{install}."
            )
        return BACKENDS[name], "asked for"
    # auto: the first of the table that is not behind another one here, and can run.
    passed_over = []
    for backend in BACKENDS.values():
        behind = backend.why_behind(device) if device.type == "cuda" else None
        reason = behind or backend.missing(device, dtype, heads, on_tape=on_tape, needs=needs)
        if reason is None:
            return backend, "; ".join(passed_over) or "first choice"
        passed_over.append(f"{backend.name}: {reason}")
    raise AssertionError("sdpa runs everywhere")


def choose_attention(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: HeadShape = USUAL_HEADS,
    *,
    on_tape: bool = False,
    needs: ScoringNeeds = NO_NEEDS,
    crossover: int | None = None,
) -> tuple[Attend, str]:
    """Return the attend function for `name`, and one line that says what was chosen and why.

    Args:
        crossover: tokens from which on `mixed` gives a document to cuDNN; None = what is assumed
            for these heads.

    Raises:
        ValueError: an explicitly named backend cannot run here.
    """
    backend, why = pick_backend(name, device, dtype, heads, on_tape=on_tape, needs=needs)
    if crossover is None:
        crossover = assumed_crossover(heads)
    return backend.make(crossover), f"attention: {backend.name} ({why})"
