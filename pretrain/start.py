"""Where a run starts, decided before anything is allocated.

A published checkpoint in --save always wins: this is a restart. Otherwise --load, --pretrained-checkpoint
or nothing (fresh weights). --load equal to an empty --save is a fresh start; any other missing source is
an error.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from model.rope import ROPE_SETTINGS
from pretrain import checkpoint
from pretrain.config import Config
from pretrain.load_config import read_config_yaml

# Settings of the model section that may differ between a checkpoint and the run that continues it.
_FREE_MODEL_SETTINGS = {"model", "group_query_attention", "max_position_embeddings", "init_method_std",
                        "attention_backend", "recompute_granularity", "attention_dropout", "hidden_dropout",
                        *ROPE_SETTINGS}


@dataclass(frozen=True)
class Start:
    folder: Path | None
    """Published checkpoint to read; None = fresh weights."""
    weights_only: bool = False
    """Clock 0 and a fresh optimizer on the checkpoint's weights."""
    reason: str = "fresh weights"
    is_restart: bool = False
    """From --save itself: the same run goes on."""


def find_start(config: Config) -> Start:
    """Apply the rules above.

    Raises:
        ValueError: a source that is missing, or that holds another model.
    """
    settings = config.checkpoint
    start = _choose(config)
    if start.folder is not None:
        problems = model_differences(config, start.folder)
        if problems:
            fix = ("give another --save for a new model" if settings.save and start.folder.parent == Path(settings.save)
                   else "use the model settings in its config.yaml")
            raise ValueError(f"checkpoint {start.folder} holds another model: {'; '.join(problems)}. Fix: {fix}.")
    return start


def _choose(config: Config) -> Start:
    settings = config.checkpoint
    found = checkpoint.published(settings.save)
    if found:
        return Start(found, reason=f"continuing {found}", is_restart=True)
    if settings.load:
        found = checkpoint.published(settings.load, settings.ckpt_step)
        if found:
            return Start(found, settings.finetune, f"{'weights of' if settings.finetune else 'loading'} {found}")
        if settings.save and os.path.abspath(settings.load) == os.path.abspath(settings.save):
            return Start(None, reason="fresh weights (--load is the empty --save)")
        raise ValueError(f"load = {settings.load}: no checkpoint is published there (no {checkpoint.LATEST}). "
                         "Fix: give a folder that holds one, or remove --load to start from fresh weights.")
    if settings.pretrained_checkpoint:
        found = checkpoint.published(settings.pretrained_checkpoint)
        if found:
            return Start(found, True, f"weights of {found}")
        raise ValueError(f"pretrained_checkpoint = {settings.pretrained_checkpoint}: no checkpoint is published there. "
                         "Fix: give a folder that holds one.")
    return Start(None)


def model_differences(config: Config, folder: Path) -> list[str]:
    """Settings of the model that differ between the run and the checkpoint, `name: checkpoint a, run b`."""
    stored = read_config_yaml(str(folder / "config.yaml"))
    names = [field.name for field in dataclasses.fields(config.model) if field.name not in _FREE_MODEL_SETTINGS]
    pairs = {name: (getattr(stored.model, name), getattr(config.model, name)) for name in names}
    for name, default in (("kv_channels", "head_size"), ("num_query_groups", "num_kv_heads")):
        pairs[name] = (getattr(stored.model, default), getattr(config.model, default))
    pairs["vocab_size"] = (stored.data.vocab_size, config.data.vocab_size)
    return [f"{name}: checkpoint {theirs}, run {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours]


def check_continuation(progress: dict, tokenizer: dict | None, seed: int) -> None:
    """Refuse to continue the clock with another tokenizer or another seed (for data see data/ledger.py).

    Raises:
        ValueError: names what changed.
    """
    problems = []
    for name, theirs, ours in (("tokenizer", progress["tokenizer"], tokenizer), ("seed", progress["seed"], seed)):
        if theirs != ours:
            problems.append(f"{name}: checkpoint {theirs}, run {ours}")
    if problems:
        raise ValueError(f"the checkpoint was trained on something else: {'; '.join(problems)}. Fix: give the same "
                         "tokenizer and seed, or start a new run from its weights with --finetune and a new "
                         "--save.")
