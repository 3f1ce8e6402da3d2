"""The run's configuration from its sources: preset, YAML file, flags, and a checkpoint."""

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable
from typing import Any

import tyro

from data.config import DataConfig
from model.config import ModelConfig
from model.presets import PRESETS
from model.rope import PARAMETERS, Rope
from pretrain.checkpointing.folders import tokenizer_model_in
from pretrain.checkpointing.learning_rate_changes import stored_scheduler
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.start import find_start
from pretrain.config.config import Config
from pretrain.config.config_yaml import read_config_yaml, read_yaml
from pretrain.config.facts import facts_of_section
from pretrain.config.flags import read_flags
from pretrain.config.flat import from_flat
from pretrain.config.translated_flags import with_translated_flags


def load_config(argv: list[str]) -> Config:
    """Return the configuration that `argv` (as `spell` returns it) asks for; --help exits.

    Flags and YAML go through the same coercion, so that both give the same messages.

    Raises:
        ValueError: unknown flags or keys, and values of the wrong type; all of a source at once.
    """
    if "-h" in argv or "--help" in argv:
        tyro.cli(
            Config, args=["--help"], prog="pretrain.train", config=(tyro.conf.OmitArgPrefixes,)
        )
    flags = read_flags(argv)
    path = flags.pop("config", None)
    values = read_yaml(path) if path is not None else {}
    preset = flags.get("model", values.get("model"))
    preset_values = _preset(preset) if preset else {}

    def given_over(base: Config) -> Config:
        """Put preset < file < flags over `base`."""
        with_preset = from_flat(preset_values, "preset", base)
        # What a preset says was not given by the user.
        with_preset = dataclasses.replace(with_preset, given=base.given)
        with_file = from_flat(values, path, with_preset) if path is not None else with_preset
        with_flags = from_flat(flags, "command line", with_file)
        names = with_flags.given.settings & flags.keys()
        given = dataclasses.replace(with_flags.given, flags=names)
        return dataclasses.replace(with_flags, given=given)

    return with_translated_flags(_with_checkpoint(given_over(Config()), given_over))


def _with_checkpoint(config: Config, given_over: Callable[[Config], Config]) -> Config:
    """Return the configuration with what the --use-checkpoint-... flags take from a checkpoint.

    Args:
        given_over: puts what the user gave over a configuration.
    """
    settings = config.checkpoint
    if not settings.use_checkpoint_args and not settings.use_checkpoint_opt_param_scheduler:
        return config
    start = find_start(settings)
    if start.folder is None:
        return config
    stored = read_config_yaml(str(start.folder / "config.yaml"))
    if settings.use_checkpoint_args:
        if start.weights_only:  # the weights know the rope of the phase that was trained last
            _set_rope(stored.model, Progress.read(start.folder).rope)
        # Another run's tokenizer is read from beside the weights. A run that goes on by itself
        # keeps its path, since its own checkpoints are deleted in time, unless nothing is there.
        path = stored.data.tokenizer_model
        if not start.is_restart or (path and not os.path.exists(path)):
            kind = stored.data.tokenizer_type
            stored.data.tokenizer_model = tokenizer_model_in(start.folder, kind)
        config = _over_checkpoint(stored, given_over)
    if settings.use_checkpoint_opt_param_scheduler and not start.weights_only:
        config.optimizer = dataclasses.replace(config.optimizer, **stored_scheduler(stored))
    return config


def _over_checkpoint(stored: Config, given_over: Callable[[Config], Config]) -> Config:
    """Return what the user gave over the checkpoint's model, vocabulary and tokenizer."""
    base = Config(data=dataclasses.replace(Config().data, vocab_size=stored.data.vocab_size))
    _set_tokenizer(base.data, stored.data, given_over(base))
    for name, facts in facts_of_section(ModelConfig).items():
        if facts.of_weights:
            setattr(base.model, name, getattr(stored.model, name))
    config = given_over(base)
    if config.model.rope.type != stored.model.rope.type:  # the parameters belong to the type
        _set_rope(base.model, Rope(stored.model.rotary_base))
        config = given_over(base)
    # Drop parameters that no phase's type of rope reads: the user did not ask for them.
    types = {entry.with_rope(config.model).rope.type for entry in config.schedule.entries}
    for setting, (_, users) in PARAMETERS.items():
        if not types & set(users):
            setattr(base.model, setting, None)
    return given_over(base)


def _set_tokenizer(data: DataConfig, stored: DataConfig, config: Config) -> None:
    """Set the checkpoint's tokenizer, whole, unless the user gave a part of one or needs none.

    Args:
        config: what the user gave.
    """
    names = ("tokenizer_type", "tokenizer_model", "tokenizer_ids_from")
    is_known = stored.tokenizer_model or stored.tokenizer_type == "NullTokenizer"
    if config.data.mock_data or not is_known or config.given.settings & set(names):
        return
    for name in names:
        setattr(data, name, getattr(stored, name))


def _set_rope(model: ModelConfig, rope: Rope) -> None:
    """Set the settings that mean this rotary embedding."""
    model.rotary_base = rope.base
    model.use_rope_scaling = None
    model.rope_type = None if rope.type == "default" else rope.type
    for setting, (name, _) in PARAMETERS.items():
        setattr(model, setting, getattr(rope, name))


def _preset(name: Any) -> dict[str, str]:
    """Return a preset's settings as texts, as a file would have them.

    Raises:
        ValueError: there is no such preset, with the nearest one.
    """
    # `model:` with settings below it is YAML's usual nesting, but keys are flat here.
    if not isinstance(name, str):
        raise ValueError(
            f"model = {name}: must be the name of a preset; settings are not nested. Fix: write "
            "the model's settings as keys of their own."
        )
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        nearest = f"; did you mean {near[0]}?" if near else "."
        names = ", ".join(PRESETS)
        raise ValueError(f"model = {name}: no such preset. Fix: one of {names}{nearest}")
    values: dict[str, Any] = PRESETS[name]
    return {"model": name} | {key: str(value) for key, value in values.items()}


def outcome_path() -> str | None:
    """Return the file in which launch/train.sh wants to read how the run ended."""
    return os.environ.get("ITHACA_OUTCOME_FILE")


def has_gate() -> bool:
    """Tell whether the launcher wants this process to wait for its word: see launch/workers.py."""
    return os.environ.get("ITHACA_GATE") == "stdin"


def facts_path() -> str | None:
    """Return the file in which the launcher wants to read what this node is about to train."""
    return os.environ.get("ITHACA_FACTS")


def warn(text: str) -> None:
    """Print a warning on standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
