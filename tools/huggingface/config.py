"""What a Hugging Face folder's config.json means to transformers, as settings of our model.

The installed transformers' own configuration class parses the file, so that defaults, types and the
forms of the rope are exactly its own. What each key may hold: tools/huggingface/keys.py; the
rotary embedding: tools/huggingface/rope_config.py.
"""

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.hf.architecture import Architecture
from model.hf.architectures import ARCHITECTURES, head_size_of
from model.hf.config_json import FULL, SLIDING
from model.windows import shortest_skip
from tools.huggingface.keys import ANOTHER, CORRECT, sort_keys
from tools.huggingface.rope_config import rope_form_problems, rope_settings
from tools.shared.message_text import one_line, short

LARGEST_SIZE = 2**31 - 1
"""Largest width, vocabulary or context that is believed; a larger one is a typing error."""
MOST_LAYERS = 100_000
"""Most layers that are believed: transformers makes a list of them before anything is compared."""


@dataclass(frozen=True)
class FolderConfig:
    """Holds the settings that one config.json means."""

    architecture: Architecture
    model: dict[str, Any]
    """Settings of our model, by name; whether weights are tied is what the file says."""
    vocab_size: int
    max_position_embeddings: int
    warnings: list[str] = field(default_factory=list)


def read_config_file(folder: Path) -> dict[str, Any]:
    """Read config.json as an object.

    Raises:
        ValueError: no such file, or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        found = "no config.json in it" if folder.is_dir() else "no such folder"
        raise ValueError(
            f"hf = {folder}: {found}. Fix: give a folder with a model's files; names of the Hub "
            "are not downloaded."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON ({error}). {CORRECT}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {short(content)}, not an object. {CORRECT}")
    return content


def interpret_config(content: dict[str, Any]) -> FolderConfig:
    """Translate the content of a config.json into our settings.

    Raises:
        ValueError: an architecture, or a part of one, that is not built here, or a value that
            transformers refuses; everything found, a line each.
    """
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"model_type = {short(kind)}: not built here. Fix: one of {', '.join(ARCHITECTURES)}."
        )
    architecture = ARCHITECTURES[kind]
    # The file as written: its keys and forms.
    parser = _configuration_class(kind)
    problems, warnings = sort_keys(content, architecture, parser)
    problems += _auto_map_problems(content) + rope_form_problems(content, architecture)
    layers = content.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        problems.append(f"num_hidden_layers = {short(layers)}: is above {MOST_LAYERS}. {CORRECT}")
    if problems:
        raise ValueError("\n".join(problems))
    # The values as transformers understands them.
    parsed = _parse(content, parser)
    problems = _size_problems(parsed)
    problems += _value_problems(parsed, architecture) + _window_problems(parsed, architecture)
    if problems:
        raise ValueError("\n".join(problems))
    model = architecture.fixed_settings(parsed.hidden_size)
    model |= {setting.ours: setting.our_value(parsed) for setting in architecture.settings}
    windows = _window_settings(parsed, architecture)
    model |= windows | rope_settings(parsed, architecture, has_windows=bool(windows))
    return FolderConfig(
        architecture=architecture,
        model=model,
        vocab_size=parsed.vocab_size,
        max_position_embeddings=parsed.max_position_embeddings,
        warnings=warnings + _remarks(content, parsed, architecture),
    )


def _configuration_class(kind: str) -> type:
    """Return transformers' configuration class of a model_type."""
    # Imported late: it takes seconds.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind]


# ---------------------------------------------------------------- the file as a whole


def _auto_map_problems(content: dict[str, Any]) -> list[str]:
    """Find forms of auto_map that transformers fails on, before it reads its own class."""
    given = content.get("auto_map", {})
    classes = given.values() if isinstance(given, dict) else [None]
    if all(isinstance(value, str | list) for value in classes):
        return []
    return [f"auto_map = {short(given)}: must be an object of class names. {CORRECT}"]


def _remarks(content: dict[str, Any], parsed: Any, architecture: Architecture) -> list[str]:
    """Name settings that have no effect and that somebody might count on."""
    found = []
    if parsed.attention_dropout:
        found.append(
            f"attention_dropout = {parsed.attention_dropout}: there is no dropout here; "
            "no logit depends on it, but training would"
        )
    expected = architecture.class_name
    named = content.get("architectures")
    if named not in (None, [expected]):
        found.append(
            f"architectures = {short(named)}: read as {expected}, which model_type = "
            f"{parsed.model_type} means to transformers"
        )
    if content.get("auto_map"):
        found.append(
            f"auto_map = {short(content['auto_map'])}: the folder's own code is not run; "
            f"read as {expected}"
        )
    if not _is_positive(parsed.initializer_range):
        found.append(
            f"initializer_range = {parsed.initializer_range}: is not above 0; ignored, since "
            "no weight is drawn"
        )
    return found


def _parse(content: dict[str, Any], parser: type) -> Any:
    """Make transformers' configuration object of the file.

    Raises:
        ValueError: what transformers refuses, in one line.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is said in one line each, by this module
    try:
        parsed = parser(**copy.deepcopy(content))
        parsed.standardize_rope_params()  # as its rotary embedding does before it computes
    except Exception as error:  # the class may raise anything: its checks and its arithmetic do
        raise ValueError(
            f"config.json: transformers refuses it ({one_line(error)}). {CORRECT}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    return parsed


# ---------------------------------------------------------------- shape


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def _size_problems(parsed: Any) -> list[str]:
    """Find sizes that no model can have."""
    found = []
    for name in _SIZES:
        value = getattr(parsed, name)
        if not 1 <= value <= LARGEST_SIZE:
            found.append(f"{name} = {value}: must be from 1 to {LARGEST_SIZE}. {CORRECT}")
    if found:
        return found  # what follows divides by them
    heads = parsed.num_attention_heads
    groups = parsed.num_key_value_heads
    if heads % groups:
        found.append(
            f"num_key_value_heads = {groups}: must divide num_attention_heads = {heads}. {CORRECT}"
        )
    head_size = head_size_of(parsed)
    is_size = type(head_size) is int and 1 <= head_size <= LARGEST_SIZE
    if not is_size or head_size % 2:  # the rope turns pairs of numbers
        found.append(
            f"head_dim = {short(head_size)}: must be an even whole number above 0. {CORRECT}"
        )
    padding = parsed.pad_token_id
    if padding is not None and not -parsed.vocab_size <= padding < parsed.vocab_size:
        found.append(
            f"pad_token_id = {padding}: is not in the vocabulary of {parsed.vocab_size}; "
            f"transformers cannot build the embedding. {CORRECT}"
        )
    return found


def _value_problems(parsed: Any, architecture: Architecture) -> list[str]:
    """Find values of an architecture's keys that no model can have."""
    found = []
    for setting in architecture.settings:
        value = getattr(parsed, setting.theirs, None)
        if setting.values and value not in setting.values:
            built = ", ".join(setting.values)
            found.append(f"{setting.theirs} = {short(value)}: only {built} are built. {ANOTHER}")
        if setting.is_above_zero and value is not None and not _is_positive(value):
            found.append(f"{setting.theirs} = {value}: must be a finite number above 0. {CORRECT}")
        if setting.is_by_layer and len(value or []) < parsed.num_hidden_layers:
            found.append(
                f"{setting.theirs} = {short(value)}: must have an item for each of the "
                f"{parsed.num_hidden_layers} layers. {CORRECT}"
            )
    return found


def _window_problems(parsed: Any, architecture: Architecture) -> list[str]:
    """Find kinds of attention that are not built here, and windows that no layer can have."""
    kinds = set(map(str, getattr(parsed, "layer_types", None) or [FULL]))
    if not kinds <= {FULL, SLIDING}:
        others = ", ".join(sorted(kinds - {FULL, SLIDING}))
        return [f"layer_types has {others}: only {FULL} and {SLIDING} are built. {ANOTHER}"]
    window = getattr(parsed, "sliding_window", None)
    if architecture.windows == "none" and (window is not None or SLIDING in kinds):
        name = "layer_types" if SLIDING in kinds else "sliding_window"
        return [
            f"{name} = {short(getattr(parsed, name))}: transformers' {architecture.class_name} has "
            "full attention in all layers. Fix: the right model_type, or remove it from "
            "config.json."
        ]
    if architecture.windows == "same" and getattr(parsed, "layer_types", None) is not None:
        # Its modeling file reads sliding_window alone.
        kind = FULL if window is None else SLIDING
        if kinds != {kind}:
            return [
                f"layer_types = {short(parsed.layer_types)}: transformers' "
                f"{architecture.class_name} has {kind} in all layers, as sliding_window = {window} "
                "says. Fix: the right model_type, or remove it from config.json."
            ]
    if SLIDING in kinds and window is None:
        return [f"sliding_window = null: layer_types has {SLIDING}, which needs it. {CORRECT}"]
    is_on = architecture.windows != "switched" or parsed.use_sliding_window
    if SLIDING in kinds and not is_on:
        return [
            f"use_sliding_window = {parsed.use_sliding_window}: but layer_types has {SLIDING}; of "
            f"transformers' attention kernels some follow the one, some the other. {CORRECT}"
        ]
    if window is not None and not (type(window) is int and 1 <= window <= LARGEST_SIZE):
        return [
            f"sliding_window = {short(window)}: must be a whole number from 1 to {LARGEST_SIZE}. "
            f"{CORRECT}"
        ]
    return []


def _window_settings(parsed: Any, architecture: Architecture) -> dict[str, Any]:
    """Translate which layers have a window; nothing where none has."""
    if architecture.windows == "none":
        return {}
    window = getattr(parsed, "sliding_window", None)
    types = getattr(parsed, "layer_types", None)
    # Mistral names no types: its window is that of all layers.
    if types is None:
        types = [FULL if window is None else SLIDING] * parsed.num_hidden_layers
    pattern = [int(kind == SLIDING) for kind in types]
    if not any(pattern):
        return {}
    assert window is not None, "refused before"
    settings = {"window_size": [window - 1, 0]}
    skip = shortest_skip(pattern)
    return settings | ({"window_attn_skip_freq": skip} if skip else {})


def _is_positive(value: float) -> bool:
    """Tell whether a number is finite and above 0."""
    try:
        return math.isfinite(value) and value > 0
    except OverflowError:  # an integer that no float holds
        return False
