"""Is an exported folder the same model? Logits of transformers against ours, in fp64, on real text.

Compared at the first positions and at the last ones of the declared context, where rotary angles
are largest. What differences are allowed: tools/huggingface/compare_logits.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.sources import open_corpus
from model.attention_backends.choice import choose_attention
from model.build import build_whole_model
from model.gpt import GPTStage
from model.windows import tokens_beyond
from pretrain.checkpointing.stored_tensors import read_whole_tensors, tensor_names
from tools.huggingface.compare_logits import (
    ComparedSequence,
    compute_in_double,
    find_differences,
    transformers_logits,
)
from tools.huggingface.stored_model import StoredModel

WINDOW = 1024
"""Tokens of a sequence that is compared."""


def verify_export(
    stored: StoredModel,
    exported: Path,
    max_positions: int,
    text_file: str | None,
    *,
    with_tokenizer: bool = True,
) -> None:
    """Compare the exported folder with the checkpoint, and print how far they differ.

    Args:
        max_positions: the context length that the export declares.
        text_file: text to compare on; None for the run's own data.
        with_tokenizer: compare the token ids of the exported tokenizer as well.

    Raises:
        ValueError: the logits, or the token ids, differ.
    """
    # The same text at both ends of the context.
    # Longer than the layers' windows, so that a wrong one shows.
    asked = tokens_beyond(stored.config.model.windows, WINDOW)
    ids = _real_text(stored, text_file, asked)
    window = min(asked, max_positions, len(ids))
    if window < asked and stored.config.model.window_size:
        print(
            f"note: verify: {window:,} tokens are compared, which may not reach beyond the layers' "
            "windows; --verify-text with a longer text would"
        )
    ids = torch.from_numpy(ids[:window])
    sequences = []
    for start in dict.fromkeys((0, max_positions - window)):
        name = f"positions {start:,} to {start + window - 1:,}"
        sequences.append(ComparedSequence(name, ids, torch.arange(start, start + window)))

    # transformers first: its model is freed before ours is built.
    expected = transformers_logits(exported, sequences)
    model = model_of_checkpoint(stored, exported)
    problems = find_differences(model, stored.vocab_size, sequences, expected)
    if with_tokenizer:
        problems += _tokenizer_problems(stored, exported, ids)
    if problems:
        raise ValueError(
            f"verification of the export failed: {'; '.join(problems)}. "
            "Fix: this is a defect of the conversion; nothing was published."
        )


# ---------------------------------------------------------------- the text


def _real_text(stored: StoredModel, text_file: str | None, tokens: int) -> np.ndarray:
    """Read ids of real text, int64 [T]: all of a file, or some tokens of the run's own data."""
    if text_file is not None:
        return _encode_file(stored, text_file)
    try:
        corpus = open_corpus(stored.config.data, stored.config.optimizer.seed, stored.vocab_size)
    except ValueError as error:
        raise ValueError(
            f"verify: the run's own data cannot be read ({error}). Fix: give --verify-text FILE."
        ) from None
    validation = [stream for blend in corpus.validation.values() for _, stream in blend]
    stream = (validation or list(corpus.train.values()))[0]
    return stream.read(0, min(tokens, stream.tokens_per_epoch))


def _encode_file(stored: StoredModel, text_file: str) -> np.ndarray:
    """Encode a text file with the checkpoint's tokenizer, int64 [T]; ValueError if it cannot be."""
    if stored.tokenizer is None:
        raise ValueError(
            f"verify_text = {text_file}: the checkpoint has no tokenizer. Fix: leave it out."
        )
    path = Path(text_file)
    if not path.is_file():
        raise ValueError(f"verify_text = {text_file}: no such file. Fix: give a text file.")
    try:
        ids = stored.tokenizer.encode(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"verify_text = {text_file}: is not text in UTF-8 ({error.reason}). "
            "Fix: give a text file."
        ) from None
    if len(ids) < 2:
        raise ValueError(f"verify_text = {text_file}: {len(ids)} tokens. Fix: give a longer text.")
    return np.array(ids, dtype=np.int64)


# ---------------------------------------------------------------- our model


def model_of_checkpoint(stored: StoredModel, exported: Path) -> GPTStage:
    """Build our model from the checkpoint itself, its weights rounded to the export's dtype.

    It computes in fp64.
    """
    dtype = getattr(torch, json.loads((exported / "config.json").read_text())["torch_dtype"])
    names = tensor_names(stored.folder)
    tensors = {
        name.removeprefix("model."): tensor.to(dtype).float()
        for name, tensor in read_whole_tensors(stored.folder, names).items()
    }
    device = torch.device("cpu")
    attend, _ = choose_attention("sdpa", device, torch.float64)
    model = build_whole_model(stored.config.model, stored.vocab_size, tensors, attend, device)
    # The rope of the phase that was saved, which may differ from the run's first.
    model.rope = stored.rope
    compute_in_double(model, model.layers.values())
    return model


# ---------------------------------------------------------------- the tokenizer


def _tokenizer_problems(stored: StoredModel, exported: Path, ids: torch.Tensor) -> list[str]:
    """Say whether the exported tokenizer gives other ids than ours for the compared text."""
    tokenizer = stored.tokenizer
    if tokenizer is None:
        return []
    from transformers import AutoTokenizer

    text = tokenizer.decode([token for token in ids.tolist() if token != tokenizer.eod])
    exported_tokenizer: Any = AutoTokenizer.from_pretrained(exported)
    theirs = exported_tokenizer.encode(text, add_special_tokens=False)
    if theirs == tokenizer.encode(text):
        return []
    return ["the exported tokenizer gives other token ids than the one trained with"]
