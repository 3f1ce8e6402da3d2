"""How a layer's attention scores its pairs of tokens: settings that every backend gets.

    score = scale * (q . k), softcap * tanh(score / softcap) where there is a cap, -inf beyond the
    window; the softmax's sum has one more term, exp(sink), where a head has a sink.

Sinks are learned, so they come beside these settings as a tensor: a logit for each query head.
"""

from dataclasses import dataclass

from model.windows import Window


@dataclass(frozen=True)
class Scoring:
    """Says how one layer scores; the defaults are those of Llama."""

    window: Window = None
    """Tokens that a token sees, itself included; None = all of its document up to itself."""
    scale: float | None = None
    """Factor on the product of a query and a key; None = 1 / sqrt(head size)."""
    softcap: float | None = None
    """Bound that tanh puts on scores, before the mask and the softmax (Gemma 2); None = none."""

    def factor(self, head_size: int) -> float:
        """Return the scale as a number."""
        return head_size**-0.5 if self.scale is None else self.scale


PLAIN = Scoring()
"""Scores as in Llama: all of the document, 1 / sqrt(head size), no cap."""


@dataclass(frozen=True, kw_only=True)
class ScoringNeeds:
    """Says what some layer of a model has that a backend may not be able to compute."""

    windows: bool = False
    softcap: bool = False
    sinks: bool = False

    def named(self) -> str:
        """Name what is needed, as the subject of a sentence in the plural."""
        names = {
            "sliding windows": self.windows,
            "capped scores": self.softcap,
            "attention sinks": self.sinks,
        }
        return " and ".join(name for name, is_needed in names.items() if is_needed)


NO_NEEDS = ScoringNeeds()
"""What a model like Llama asks for: nothing that not every backend has."""
