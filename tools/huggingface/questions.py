"""What our model and transformers' are both asked: tokens at positions, and a beginning of a text.

Logits of the sequences are compared in fp64, which finds small faults, and in fp32, which is what
users compute in; then the tokens that follow the beginning when each has the largest logit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.rope import Rope
from model.windows import Window, tokens_beyond

MOST_ROWS = 256
"""Tokens of a sequence whose logits are compared: memory holds those of all sequences."""
INNER_TOKENS = 256
"""Tokens of a sequence inside the context, unless a layer has a longer window."""
PROMPT_TOKENS = 64
"""Tokens of the text that is continued, unless a layer has a longer window."""
NEW_TOKENS = 64
"""Tokens that are continued."""


@dataclass(frozen=True)
class ComparedSequence:
    """Holds tokens at positions, which both models see as one document."""

    name: str
    ids: torch.Tensor
    """int64 [T]."""
    positions: torch.Tensor
    """int64 [T], rising; with gaps too."""

    @property
    def rows(self) -> torch.Tensor:
        """Places of tokens whose logits are compared, int64: all, or some at equal distances."""
        count = min(len(self.ids), MOST_ROWS)
        return torch.linspace(0, len(self.ids) - 1, count, dtype=torch.float64).round().long()


@dataclass(frozen=True)
class Questions:
    """Holds all that is compared of two models."""

    sequences: list[ComparedSequence]
    prompt: torch.Tensor
    """int64 [T]: the beginning of a text."""
    new_tokens: int
    """Tokens that follow it; 0 where the context has no room."""


def choose_questions(
    ids: torch.Tensor, longest: int, windows: Sequence[Window], rope: Rope, tokens: int
) -> Questions:
    """Choose what is compared of a text, each place with another part of it.

    The first, the middle and the last positions of the context, those from the original context of
    a scaled rope on, and some spread over all of it.

    Args:
        ids: int64 [T].
        longest: the context length that the folder declares.
        windows: of the model's layers: all sequences are longer.
        tokens: of the sequences at both ends.
    """
    length = min(tokens_beyond(windows, tokens), longest, len(ids))
    last = longest - length
    inner = min(tokens_beyond(windows, INNER_TOKENS), length)
    # Start -> tokens from there on.
    places = {0: length, last: length}
    if last:
        places.setdefault((longest - inner) // 2, inner)
    original = _original_context(rope, longest)
    if original is not None and original <= longest - inner:
        places.setdefault(original, inner)

    sequences = [
        _sequence_from(start, _part(ids, number, places[start]))
        for number, start in enumerate(sorted(places))
    ]
    if longest >= 2 * inner:
        sequences.append(_spread_sequence(_part(ids, len(places), inner), longest))
    asked = tokens_beyond(windows, PROMPT_TOKENS)
    prompt = ids[: max(1, min(asked, longest - NEW_TOKENS, len(ids)))]
    return Questions(sequences, prompt, max(0, min(NEW_TOKENS, longest - len(prompt))))


def _original_context(rope: Rope, longest: int) -> int | None:
    """Return the context before the rope was scaled; None where it was not."""
    if rope.original_max_position_embeddings is not None or rope.factor is None:
        return rope.original_max_position_embeddings
    return round(longest / rope.factor)


def _part(ids: torch.Tensor, number: int, length: int) -> torch.Tensor:
    """Return the number-th part of a text; it begins again where the text is too short."""
    beginnings = len(ids) - length + 1
    start = number * length % beginnings
    return ids[start : start + length]


def _sequence_from(start: int, ids: torch.Tensor) -> ComparedSequence:
    """Return tokens that follow each other from a position on."""
    last = start + len(ids) - 1
    return ComparedSequence(
        f"positions {start:,} to {last:,}", ids, torch.arange(start, start + len(ids))
    )


def _spread_sequence(ids: torch.Tensor, longest: int) -> ComparedSequence:
    """Return tokens at equal distances over a whole context, so that the rope turns far."""
    step = (longest - 1) // max(1, len(ids) - 1)
    last = step * (len(ids) - 1)
    return ComparedSequence(
        f"each {step:,}th position to {last:,}", ids, torch.arange(len(ids)) * step
    )
