"""The text that models are compared on where no run has read any: a page, or random tokens."""

from pathlib import Path

import torch

from data.tokenizers.tokenizer import Tokenizer

TEXT = Path(__file__).parents[2] / "README.md"
"""The page: sentences, tables and code."""


def sample_ids(tokenizer: Tokenizer | None, vocab_size: int, tokens: int) -> torch.Tensor:
    """Return ids of TEXT, int64 [T], at least `tokens` of them; random ones without a tokenizer."""
    ids = torch.empty(0, dtype=torch.long)
    if tokenizer is not None:
        ids = torch.tensor(tokenizer.encode(TEXT.read_text(encoding="utf-8")), dtype=torch.long)
        # A tokenizer may have more ids than the model.
        ids = ids[ids < vocab_size]
    if not len(ids):
        print("verify: on random tokens, since there is no tokenizer that can be read")
        return torch.randint(vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    return ids.repeat(-(-tokens // len(ids)))
