"""How the next token is chosen from its logits: the likeliest, or drawn.

A draw depends on the seed, the prompt's number and the position alone, so that a batch gives what
its prompts give one by one, in every layout. The filters are those of transformers' generate, in
its order: repetition penalty, temperature, top-k, top-p.

Legend: b sequences, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash

UNIT = 2.0**-53
"""Distance of two neighbouring numbers of which one is drawn, from [0, 1)."""


@dataclass(frozen=True)
class Sampling:
    """Says how tokens are chosen."""

    temperature: float = 0.0
    """0 = always the likeliest token."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 = from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities reach this."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that came before less likely."""
    seed: int = 1234

    def describe(self) -> str:
        """Write the settings in a few words."""
        penalty = ""
        if self.repetition_penalty != 1.0:
            penalty = f", repetition penalty {self.repetition_penalty:g}"
        if self.temperature == 0:
            return f"the likeliest token each time{penalty}"
        words = [f"temperature {self.temperature:g}"]
        words += [f"top-k {self.top_k}"] if self.top_k else []
        words += [f"top-p {self.top_p:g}"] if self.top_p < 1 else []
        return f"drawn with {', '.join(words)}{penalty}, seed {self.seed}"


def choose_tokens(
    logits_bV: torch.Tensor,
    sampling: Sampling,
    numbers: Sequence[int],
    positions: Sequence[int],
    seen_bV: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose a token for each sequence: logits [b, V] -> int64 [b].

    Args:
        numbers: of the sequences' prompts.
        positions: that the tokens will have.
        seen_bV: tokens that came before; needed with a repetition penalty.
    """
    logits_bV = logits_bV.to(torch.promote_types(logits_bV.dtype, torch.float32))
    if sampling.repetition_penalty != 1.0:
        assert seen_bV is not None
        penalty = sampling.repetition_penalty
        lowered_bV = torch.where(logits_bV < 0, logits_bV * penalty, logits_bV / penalty)
        logits_bV = torch.where(seen_bV, lowered_bV, logits_bV)
    if sampling.temperature == 0:
        return logits_bV.argmax(dim=1)
    logits_bV = logits_bV / sampling.temperature
    logits_bV = keep_top_p(keep_top_k(logits_bV, sampling.top_k), sampling.top_p)

    # The token in whose share of [0, 1) the drawn number lies.
    ends_bV = logits_bV.double().softmax(dim=1).cumsum(dim=1)
    drawn = [
        draw(sampling.seed, number, position)
        for number, position in zip(numbers, positions, strict=True)
    ]
    drawn_b1 = torch.tensor(drawn, dtype=torch.float64, device=logits_bV.device)[:, None]
    return torch.searchsorted(ends_bV, drawn_b1 * ends_bV[:, -1:], right=True)[:, 0]


def draw(seed: int, number: int, position: int) -> float:
    """Draw a number of [0, 1) for one token."""
    digest = xxhash.xxh64_intdigest(f"{seed}/{number}/{position}".encode())
    return (digest >> 11) * UNIT


def keep_top_k(logits_bV: torch.Tensor, count: int) -> torch.Tensor:
    """Leave the `count` largest logits of each row, and those equal to the last; 0 = all."""
    if count == 0 or count >= logits_bV.shape[1]:
        return logits_bV
    least_b1 = logits_bV.topk(count, dim=1).values[:, -1:]
    return logits_bV.masked_fill(logits_bV < least_b1, float("-inf"))


def keep_top_p(logits_bV: torch.Tensor, share: float) -> torch.Tensor:
    """Leave the fewest largest logits of each row whose probabilities reach `share`."""
    if share >= 1:
        return logits_bV
    ordered_bV, order_bV = logits_bV.sort(dim=1)
    # From the smallest on: what is left out together has at most the rest.
    is_out_bV = ordered_bV.softmax(dim=1).cumsum(dim=1) <= 1 - share
    is_out_bV[:, -1] = False
    return logits_bV.masked_fill(is_out_bV.scatter(1, order_bV, is_out_bV), float("-inf"))
