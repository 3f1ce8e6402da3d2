"""What an evaluation asks of a model: how likely texts are, and what it goes on with."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from data.tokenizers.tokenizer import Tokenizer


class TextScore(Protocol):
    """Scores the tokens of one text after its first."""

    @property
    def log_probabilities(self) -> torch.Tensor:
        """Natural logarithm of each token's probability, given those before it: at least fp32."""
        ...

    @property
    def are_likeliest(self) -> torch.Tensor:
        """Whether greedy generation would have taken the token: bool."""
        ...


class LanguageModel(Protocol):
    """A model that all processes of a layout call alike; each of them gets all results."""

    context_length: int
    """Longest context that the model was trained on."""
    batch_tokens: int
    """Tokens of prompts or texts that are given together, but for a single longer one."""
    first_ids: list[int]
    """Ids that a prompt begins with, before those of its words."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def score(self, texts: Sequence[list[int]]) -> Sequence[TextScore]:
        """Score every token of texts that do not see each other."""
        ...

    def continue_prompts(
        self,
        prompts: Sequence[list[int]],
        new_tokens: Sequence[int],
        should_stop: Callable[[str], bool] | None = None,
    ) -> list[str]:
        """Continue prompts greedily, each up to an id that ends a text.

        Args:
            new_tokens: what each may add at most.
            should_stop: tells of a continuation's text so far that no more is needed.
        """
        ...
