"""Is an exported folder the same model? Weights bit for bit, and transformers' answers beside ours.

The text is real. What is compared: tools/huggingface/questions.py; what may differ:
tools/huggingface/compare_logits.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.sources import open_corpus
from data.tokenizers.tokenizer import Tokenizer
from model.attention_backends.choice import choose_attention
from model.build import build_whole_model
from model.gpt import GPTStage
from model.hf.folding import factor_of
from model.windows import tokens_beyond
from pretrain.checkpointing.stored_tensors import read_whole_tensors, tensor_names
from tools.huggingface.compare_logits import compare_answers
from tools.huggingface.compare_weights import compare_weights
from tools.huggingface.comparison_table import ComparisonTable
from tools.huggingface.double import compute_in_double
from tools.huggingface.export_weights import multiplied
from tools.huggingface.questions import choose_questions
from tools.huggingface.sample_text import sample_ids
from tools.huggingface.stored_model import StoredModel
from tools.huggingface.transformers_answers import ask_transformers
from tools.huggingface.weights import open_weights
from tools.shared.message_text import count_of

WINDOW = 512
"""Tokens of a sequence at either end of the context, unless a layer has a longer window."""
TEXT_TOKENS = 4096
"""Tokens of text from which all sequences are taken, at least where there are as many."""


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
        ValueError: the weights, the logits, the text that follows or the token ids differ.
    """
    ids = _text_beyond_windows(stored, text_file, max_positions)
    windows = stored.config.model.windows
    questions = choose_questions(ids, max_positions, windows, stored.rope, WINDOW)
    table = ComparisonTable()
    dtype = getattr(torch, json.loads((exported / "config.json").read_text())["torch_dtype"])
    entries = open_weights(exported, stored.architecture).entries
    compare_weights(
        table,
        stored.folder,
        entries,
        stored.vocab_size,
        exported_as=dtype,
        factors=stored.form.factors,
    )
    # transformers first: its model is freed before ours is built.
    try:
        answers = ask_transformers(exported, questions)
    except ValueError as error:
        table.add("transformers", "does not run", "", str(error))
    else:
        model = _build(stored, dtype)
        compare_answers(table, model, stored.vocab_size, questions, answers)
    if with_tokenizer and stored.tokenizer is not None:
        _add_tokenizer(table, stored.tokenizer, exported, ids[:WINDOW])
    table.raise_problems("export", "this is a defect of the conversion; nothing was published")


def _text_beyond_windows(
    stored: StoredModel, text_file: str | None, max_positions: int
) -> torch.Tensor:
    """Read real text, int64 [T], if possible so long that a wrong window shows."""
    windows = stored.config.model.windows
    ids = torch.from_numpy(_real_text(stored, text_file, tokens_beyond(windows, TEXT_TOKENS)))
    compared = min(max_positions, len(ids))
    if compared < tokens_beyond(windows, 0):
        print(
            f"note: verify: {compared:,} tokens are compared, which may not reach beyond the "
            "layers' windows; --verify-text with a longer text would"
        )
    return ids


# ---------------------------------------------------------------- the text


def _real_text(stored: StoredModel, text_file: str | None, tokens: int) -> np.ndarray:
    """Read ids of text, int64 [T]: all of a file, or some tokens of the run's own data."""
    if text_file is not None:
        return _encode_file(stored, text_file)
    if stored.progress.data is None:  # an import, which was trained on nothing
        return sample_ids(stored.tokenizer, stored.vocab_size, tokens).numpy()
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
    try:
        ids = stored.tokenizer.encode(Path(text_file).read_text(encoding="utf-8"))
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
    model = _build(stored, dtype)
    compute_in_double(model, model.layers.values())
    return model


def _build(stored: StoredModel, dtype: torch.dtype) -> GPTStage:
    """Build our model from the checkpoint, its weights rounded as in the folder, in `dtype`.

    It computes in fp32, with its own factors of logits and scores.
    """
    tensors = {}
    names = tensor_names(stored.folder)
    for stored_name, tensor in read_whole_tensors(stored.folder, names).items():
        name = stored_name.removeprefix("model.")
        # What the folder has multiplied in is rounded with it, and taken out again.
        factor = factor_of(name, stored.form.factors)
        rounded = multiplied(tensor, factor).to(dtype).float()
        tensors[name] = multiplied(rounded, 1 / factor)
    device = torch.device("cpu")
    attend, _ = choose_attention("sdpa", device, torch.float64)
    model = build_whole_model(stored.config.model, stored.vocab_size, tensors, attend, device)
    # The rope of the phase that was saved, which may differ from the run's first.
    model.rope = stored.rope
    return model


# ---------------------------------------------------------------- the tokenizer


def _add_tokenizer(
    table: ComparisonTable, tokenizer: Tokenizer, exported: Path, ids: torch.Tensor
) -> None:
    """Add whether the exported tokenizer gives our ids for the compared text."""
    from transformers import AutoTokenizer

    text = tokenizer.decode([token for token in ids.tolist() if token != tokenizer.eod])
    exported_tokenizer: Any = AutoTokenizer.from_pretrained(exported)
    ours = tokenizer.encode(text)
    problem = None
    if exported_tokenizer.encode(text, add_special_tokens=False) != ours:
        problem = "the exported tokenizer gives other token ids than the one trained with"
    what = f"ids of the tokenizer, {count_of(len(ours), 'token')}"
    table.add(what, "different" if problem else "none", "none", problem)
