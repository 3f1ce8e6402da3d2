"""Is an imported checkpoint its Hugging Face folder's model? transformers' answers beside ours.

What is compared: tools/huggingface/questions.py; what may differ:
tools/huggingface/compare_logits.py.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from data.config import DataConfig
from data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from model.attention_backends.choice import choose_attention
from model.build import build_whole_model
from model.config import ModelConfig
from model.windows import tokens_beyond
from pretrain.checkpointing.folders import LATEST
from pretrain.checkpointing.retention import delete_checkpoint
from pretrain.config.config import Config
from tools.huggingface.compare_logits import compare_answers
from tools.huggingface.compare_weights import compare_weights
from tools.huggingface.comparison_table import ComparisonTable
from tools.huggingface.questions import Questions, choose_questions
from tools.huggingface.sample_text import sample_ids
from tools.huggingface.transformers_answers import Answers
from tools.huggingface.weights import Entry

WINDOW = 256
"""Tokens of each sequence that is compared, unless a layer has a longer window."""
TEXT_TOKENS = 1024
"""Tokens of text from which the sequences are taken, at least."""


def questions_about(config: Config, vocab_size: int, longest: int) -> Questions:
    """Choose what is compared: a real text, or random tokens where the folder has no tokenizer.

    Args:
        longest: the context length that the folder declares.
    """
    model = config.model
    length = max(TEXT_TOKENS, tokens_beyond(model.windows, WINDOW))
    ids = sample_ids(_open_tokenizer(config.data), vocab_size, length)
    return choose_questions(ids, longest, model.windows, model.rope, WINDOW)


def _open_tokenizer(data: DataConfig) -> Tokenizer | None:
    """Open the folder's tokenizer; None where there is none that can be read."""
    if data.tokenizer_model is None:
        return None
    try:
        return build_tokenizer(
            data.tokenizer_type, data.tokenizer_model, None, ids_from=data.tokenizer_ids_from
        )
    except ValueError:  # warned of when the tokenizer was described
        return None


def verify_import(
    config: ModelConfig,
    vocab_size: int,
    tensors: dict[str, torch.Tensor],
    questions: Questions,
    answers: Answers,
) -> None:
    """Compare the model to be published with what transformers makes of the folder.

    Args:
        tensors: our weights by name.
        answers: transformers', from the folder.

    Raises:
        ValueError: they are not the same model.
    """
    device = torch.device("cpu")
    attend, _ = choose_attention("sdpa", device, torch.float64)
    model = build_whole_model(config, vocab_size, tensors, attend, device)
    table = ComparisonTable()
    compare_answers(table, model, vocab_size, questions, answers)
    table.raise_problems(
        "import",
        "this is a defect of the conversion, or of the folder; nothing was published",
    )


def verify_stored(checkpoint: Path, entries: Mapping[str, Entry], vocab_size: int) -> None:
    """Compare what the published checkpoint stores with the folder, bit for bit; else remove it.

    Args:
        entries: the folder's tensors by our names.

    Raises:
        ValueError: they differ.
    """
    table = ComparisonTable()
    try:
        compare_weights(table, checkpoint, entries, vocab_size)
        table.raise_problems("import", "try again, on another disk; the checkpoint was removed")
    except BaseException:  # also what could not be read, or was not read to its end
        # The pointer first: it must not name what is gone.
        (checkpoint.parent / LATEST).unlink()
        delete_checkpoint(checkpoint)
        raise
