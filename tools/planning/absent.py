"""What a run names that is not on this machine: a plan of others does without, and says so."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.blend import parse_blend
from data.config import are_named
from pretrain.config.config import Config

MOST_NAMED = 3
"""Absent files that are named; of more, their number is said."""


def absent_data(config: Config) -> list[str]:
    """List the files of tokenizer and data that the settings name and that are not here."""
    data = config.data
    if data.mock_data:
        return []
    named = [] if data.data_args_path is None else [data.data_args_path]
    if data.tokenizer_model is not None:
        named.append(data.tokenizer_model)
    blends = [data.data_path, data.train_data_path, data.valid_data_path]
    blends += [entry.data_path or [] for entry in config.schedule.entries]
    for words in blends:
        named += [f"{prefix}.idx" for prefix in _prefixes(words)]
    return [name for name in dict.fromkeys(named) if not Path(name).exists()]


def _prefixes(words: Sequence[str]) -> list[str]:
    """List the prefixes of a blend; nothing where it is wrong, which the plan itself says."""
    if are_named(words):
        return [word.partition("=")[2] for word in words]
    try:
        return [source.prefix for _, source in parse_blend(words, "data_path")] if words else []
    except ValueError:
        return []


def without_absent_start(config: Config) -> tuple[Config, list[str]]:
    """Leave out a checkpoint to start from that is not here; returns also a line that says so."""
    settings = config.checkpoint
    lines = []
    for name in ("load", "pretrained_checkpoint"):
        folder = getattr(settings, name)
        if folder is None or folder == settings.save or Path(folder).exists():
            continue
        if name == "load":
            settings = replace(
                settings, load=None, finetune=False, no_load_optim=False, ckpt_step=None
            )
        else:
            settings = replace(settings, pretrained_checkpoint=None)
        lines.append(f"start: {folder} is not on this machine; planned from the first token")
    return replace(config, checkpoint=settings), lines


def describe_absent(names: Sequence[str]) -> str:
    """Say in one line what is not here, and what follows."""
    shown = ", ".join(names[:MOST_NAMED])
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    what = "is" if len(names) == 1 else "are"
    return (
        f"data: not looked at, since {shown}{more} {what} not on this machine; epochs are not "
        "known, and a sample is taken as one document"
    )
