"""Spikes of loss and gradient norm: a rule on the last steps alone, and what it remembers.

A spike lies far above the median of the last finite steps, measured in their median absolute
deviation: neither one earlier spike nor a slow trend moves these. What a step may reach follows
from the steps before it, so the device can decide about the update before the host knows the step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from pretrain.config.guards_config import GuardsConfig

DEVIATIONS_PER_MAD = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""
LOSS_FLOOR = 0.05
"""A loss up to this share above the median is no spike, however flat the curve was."""
GRAD_NORM_FLOOR = 1.0
"""The same of the gradient norm, which is noisier."""


@dataclass(frozen=True)
class Limits:
    """What a step may reach; beyond it the device makes no update."""

    loss: float = math.inf
    """In nats."""
    grad_norm: float = math.inf

    def allow(self, loss: float, grad_norm: float) -> bool:
        """Decide on the host as the device does."""
        return loss <= self.loss and grad_norm <= self.grad_norm


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Spike:
    """A step whose loss or gradient norm lies beyond its limit."""

    loss: float
    grad_norm: float
    limits: Limits

    def __str__(self) -> str:
        parts = []
        if self.loss > self.limits.loss:
            parts.append(f"loss {self.loss:.4f} above {self.limits.loss:.4f}")
        if self.grad_norm > self.limits.grad_norm:
            parts.append(f"gradient norm {self.grad_norm:.4g} above {self.limits.grad_norm:.4g}")
        return " and ".join(parts)


def upper_limit(values: Sequence[float], threshold: float, floor: float) -> float:
    """Compute what the next value may reach: median + the larger of threshold x sigma and floor.

    Args:
        threshold: in standard deviations, estimated from the median absolute deviation.
        floor: share of the median that is always allowed.
    """
    middle = median(values)
    spread = median([abs(value - middle) for value in values]) * DEVIATIONS_PER_MAD
    return middle + max(threshold * spread, floor * abs(middle))


@dataclass
class SpikeHistory:
    """The last finite steps of the phase: all that the rule remembers, and a checkpoint keeps."""

    phase: str = ""
    batch_tokens: int = 0
    """The batch of the last step."""
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    def enter(self, phase: str, batch_tokens: int) -> None:
        """Forget what no longer compares: another phase, or a smaller and so noisier batch."""
        if phase != self.phase or batch_tokens < self.batch_tokens:
            self.losses.clear()
            self.grad_norms.clear()
        self.phase = phase
        self.batch_tokens = batch_tokens

    def note(self, loss: float, grad_norm: float, window: int) -> None:
        """Remember a finite step; the oldest beyond the window is forgotten."""
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        del self.losses[:-window]
        del self.grad_norms[:-window]

    def limits(self, settings: GuardsConfig) -> Limits:
        """Compute what the next step may reach; anything before half a window is known."""
        if len(self.losses) < settings.spike_window // 2:
            return NO_LIMITS
        threshold = settings.spike_threshold
        return Limits(
            upper_limit(self.losses, threshold, LOSS_FLOOR),
            upper_limit(self.grad_norms, threshold, GRAD_NORM_FLOOR),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it; every number is kept exactly."""
        return {
            "phase": self.phase,
            "batch_tokens": self.batch_tokens,
            "losses": list(self.losses),
            "grad_norms": list(self.grad_norms),
        }

    @staticmethod
    def from_json(stored: dict[str, Any] | None) -> "SpikeHistory":
        """Read it from a checkpoint; an older one has none."""
        return SpikeHistory(**stored) if stored else SpikeHistory()


Action = Literal["warn", "skip", "rewind"]


class SpikeWatch:
    """Judges every step of a run by those before it, the same on all ranks."""

    def __init__(self, settings: GuardsConfig, history: SpikeHistory):
        self.settings = settings
        self.history = history
        self._limits = NO_LIMITS

    def before_step(self, phase: str, batch_tokens: int) -> Limits:
        """Return the limits beyond which the device makes no update; none where it only warns."""
        self.history.enter(phase, batch_tokens)
        self._limits = self.history.limits(self.settings)
        return NO_LIMITS if self.settings.spike_policy == "warn" else self._limits

    def after_step(self, loss: float, grad_norm: float) -> Spike | None:
        """Note the step -> the spike that it is, if it is one.

        A step that was skipped as a spike is forgotten; one that trained is part of what the next
        ones are measured against, so that a new level is called a spike for half a window at most.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return None
        is_spike = not self._limits.allow(loss, grad_norm)
        if not is_spike or self.settings.spike_policy == "warn":
            self.history.note(loss, grad_norm, self.settings.spike_window)
        return Spike(loss, grad_norm, self._limits) if is_spike else None
