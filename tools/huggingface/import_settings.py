"""What an imported checkpoint says of itself: its configuration, its progress and its tokenizer."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.tokenizers.folder import IdsFrom, TwoDefinitions, tokenizer_files
from data.tokenizers.tokenizer import build_tokenizer
from pretrain.checkpointing.progress import Progress
from pretrain.config.config import Config
from pretrain.config.facts import problems_of
from tools.shared.door import warn

IMPORTED_PHASE = "imported"
"""What a checkpoint that an import wrote calls the phase of its last step."""


def make_config(
    model: Mapping[str, Any],
    vocab_size: int,
    folder: Path,
    *,
    vocab_multiple: int,
    ids_from: IdsFrom | None,
) -> Config:
    """Make the configuration that the checkpoint carries.

    Args:
        model: settings of our model, by name.
        folder: the Hugging Face folder.
        vocab_multiple: --make-vocab-size-divisible-by.
        ids_from: --tokenizer-ids-from.

    Raises:
        ValueError: a setting that is not legal here.
    """
    config = Config()
    for name, value in model.items():
        setattr(config.model, name, value)
    config.model.make_vocab_size_divisible_by = vocab_multiple
    config.data.vocab_size = vocab_size
    # A run that starts from the checkpoint finds its tokenizer in the folder.
    has_tokenizer = bool(tokenizer_files(folder))
    config.data.tokenizer_type = "HuggingFaceTokenizer" if has_tokenizer else "NullTokenizer"
    config.data.tokenizer_model = str(folder.resolve()) if has_tokenizer else None
    config.data.tokenizer_ids_from = ids_from if has_tokenizer else None
    # All that the folder says was checked; this finds what --make-vocab-size-divisible-by breaks.
    problems = problems_of(config.model)
    if problems:
        raise ValueError("\n".join(problems))
    return config


def progress_of_import(config: Config, tokenizer: dict | None, longest: int) -> Progress:
    """Describe a checkpoint that holds weights only.

    Args:
        tokenizer: what `describe_tokenizer` returns.
        longest: the context length that the Hugging Face folder declares.
    """
    phase = {
        "name": IMPORTED_PHASE,
        "index": 0,
        "seq_length": longest,
        "rope": asdict(config.model.rope),
    }
    return Progress(
        step=0,
        clock=0,
        phase=phase,
        longest_seq_length=longest,
        data=None,
        tokenizer=tokenizer,
        has_optimizer=False,
        world_size=1,
    )


def describe_tokenizer(config: Config) -> dict | None:
    """Describe the tokenizer that a run's will be compared with; None where none can be read."""
    folder = config.data.tokenizer_model
    ids_from = config.data.tokenizer_ids_from
    if folder is None:
        return None
    try:
        return build_tokenizer("HuggingFaceTokenizer", folder, None, ids_from=ids_from).describe()
    except TwoDefinitions:
        raise  # for the user to decide: --tokenizer-ids-from
    except ValueError as error:
        warn(f"the checkpoint will not know its tokenizer: {error}")
        return None
