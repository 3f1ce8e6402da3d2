"""Is an exported folder the same model? Logits of transformers against ours, in fp64, on real text.

Compared at the first positions and at the last ones of the declared context, where rotary angles
are largest. What differences are allowed: tools/huggingface/compare_logits.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.sources import open_corpus
from model.attention_backends.choice import choose_attention
from model.build import build_whole_model
from model.gpt import GPTStage
from pretrain.checkpointing.stored_tensors import read_whole_tensors, tensor_names
from tools.huggingface.compare_logits import (
    Sequence,
    compute_in_double,
    judge,
    our_logits,
    transformers_logits,
)

if TYPE_CHECKING:
    from tools.export_hf import Source

WINDOW = 1024
"""Tokens per comparison."""


def verify(
    source: Source,
    exported: Path,
    max_positions: int,
    text_file: str | None,
    with_tokenizer: bool = True,
) -> None:
    """Compare and print.

    Raises:
        ValueError: the logits, or the token ids of the exported tokenizer, differ.
    """
    ids = _real_text(source, text_file)
    window = min(WINDOW, max_positions, len(ids))
    ids = torch.from_numpy(ids[:window])
    sequences = []
    for start in dict.fromkeys((0, max_positions - window)):
        name = f"positions {start:,} to {start + window - 1:,}"
        sequences.append(Sequence(name, ids, torch.arange(start, start + window)))
    expected = transformers_logits(exported, sequences)
    model = model_of_checkpoint(source, exported)
    problems = []
    for sequence, theirs in zip(sequences, expected):
        problem = judge(sequence, our_logits(model, source.vocab_size, sequence), theirs)
        if problem:
            problems.append(problem)
    if with_tokenizer:
        problems += _tokenizer_problems(source, exported, ids)
    if problems:
        raise ValueError(
            f"verification of the export failed: {'; '.join(problems)}. "
            "Fix: this is a defect of the conversion; nothing was published."
        )


def _real_text(source: Source, text_file: str | None) -> np.ndarray:
    """Token ids of real text, int64."""
    if text_file is not None:
        if source.tokenizer is None:
            raise ValueError(
                f"verify_text = {text_file}: the checkpoint has no tokenizer. Fix: leave it out."
            )
        path = Path(text_file)
        if not path.is_file():
            raise ValueError(f"verify_text = {text_file}: no such file. Fix: give a text file.")
        try:
            ids = source.tokenizer.encode(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"verify_text = {text_file}: is not text in UTF-8 ({error.reason}). "
                "Fix: give a text file."
            ) from None
        if len(ids) < 2:
            raise ValueError(
                f"verify_text = {text_file}: {len(ids)} tokens. Fix: give a longer text."
            )
        return np.array(ids, dtype=np.int64)
    try:
        corpus = open_corpus(source.config.data, source.config.optimizer.seed, source.vocab_size)
    except ValueError as error:
        raise ValueError(
            f"verify: the run's own data cannot be read ({error}). Fix: give --verify-text FILE."
        ) from None
    streams = [stream for blend in corpus.validation.values() for _, stream in blend] or list(
        corpus.train.values()
    )
    stream = streams[0]
    return stream.read(0, min(WINDOW, stream.tokens_per_epoch))


def model_of_checkpoint(source: Source, exported: Path) -> GPTStage:
    """Our model from the checkpoint itself, its weights rounded to the exported dtype, in fp64."""
    dtype = getattr(torch, json.loads((exported / "config.json").read_text())["torch_dtype"])
    names = tensor_names(source.folder)
    tensors = {
        name.removeprefix("model."): tensor.to(dtype).float()
        for name, tensor in read_whole_tensors(source.folder, names).items()
    }
    device = torch.device("cpu")
    attend, _ = choose_attention("sdpa", device, torch.float64)
    model = build_whole_model(source.config.model, source.vocab_size, tensors, attend, device)
    model.rope = source.rope
    compute_in_double(model, model.layers.values())
    return model


def _tokenizer_problems(source: Source, exported: Path, ids: torch.Tensor) -> list[str]:
    if source.tokenizer is None:
        return []
    from transformers import AutoTokenizer

    text = source.tokenizer.decode([i for i in ids.tolist() if i != source.tokenizer.eod])
    theirs = AutoTokenizer.from_pretrained(exported).encode(text, add_special_tokens=False)
    if theirs == source.tokenizer.encode(text):
        return []
    return ["the exported tokenizer gives other token ids than the one trained with"]
