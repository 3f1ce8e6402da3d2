"""Is an imported checkpoint the model of its Hugging Face folder? Logits in fp64, on random tokens.

What differences are allowed: tools/huggingface/compare_logits.py.
"""

from collections.abc import Sequence

import torch

from model.attention_backends.choice import choose_attention
from model.build import build_whole_model
from model.config import ModelConfig
from model.windows import Window, tokens_beyond
from tools.huggingface.compare_logits import ComparedSequence, compute_in_double, find_differences

WINDOW = 256
"""Tokens of each sequence that is compared, unless a layer has a longer window."""


def compared_sequences(
    vocab_size: int, longest: int, windows: Sequence[Window]
) -> list[ComparedSequence]:
    """Draw random tokens at the first positions, the last ones, and spread over the context.

    Args:
        windows: of the model's layers: the sequences are longer.
        longest: the context length that the folder declares.
    """
    length = min(tokens_beyond(windows, WINDOW), longest)
    generator = torch.Generator().manual_seed(0)
    positions = {f"positions 0 to {length - 1:,}": torch.arange(length)}
    if longest > length:
        last = f"positions {longest - length:,} to {longest - 1:,}"
        positions[last] = torch.arange(longest - length, longest)
        step = (longest - 1) // max(1, length - 1)
        spread = f"each {step:,}th position to {step * (length - 1):,}"
        positions[spread] = torch.arange(length) * step
    return [
        ComparedSequence(name, torch.randint(vocab_size, (length,), generator=generator), places)
        for name, places in positions.items()
    ]


def verify_import(
    config: ModelConfig,
    vocab_size: int,
    tensors: dict[str, torch.Tensor],
    sequences: list[ComparedSequence],
    expected: list[torch.Tensor],
) -> None:
    """Compare the model to be published with what transformers makes of the folder.

    Args:
        tensors: our weights by name.
        expected: transformers' logits of each sequence.

    Raises:
        ValueError: they are not the same model.
    """
    device = torch.device("cpu")
    attend, _ = choose_attention("sdpa", device, torch.float64)
    model = build_whole_model(config, vocab_size, tensors, attend, device)
    compute_in_double(model, model.layers.values())
    problems = find_differences(model, vocab_size, sequences, expected)
    if problems:
        raise ValueError(
            f"verification of the import failed: {'; '.join(problems)}. Fix: this is a defect of "
            "the conversion, or of the folder; nothing was published."
        )
