"""The config.json of an export: our settings in transformers' names."""

from typing import Any

from model.config import ModelConfig
from model.hf.architecture import Architecture
from model.rope import Rope
from model.windows import shortest_skip

FULL = "full_attention"
SLIDING = "sliding_attention"
"""What layer_types calls a layer without and one with a window."""


def context_to_declare(rope: Rope, longest: int) -> int:
    """Return max_position_embeddings of an export: the longest context trained, or yarn's.

    Late versions of transformers 4 take max_position_embeddings / original_max_position_embeddings
    for yarn's factor, and version 5 warns where the two differ: any other value would be another
    model there.
    """
    if rope.type != "yarn":
        return longest
    assert rope.scaled_length is not None, "yarn without its factor is refused"
    return rope.scaled_length


def huggingface_config(
    architecture: Architecture,
    config: ModelConfig,
    vocab_size: int,
    rope: Rope,
    max_position_embeddings: int,
    dtype: str,
    eos_token_id: int | None,
) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        architecture: one that has the model's parts (choice.py).
        rope: of the phase that is exported.
    """
    config = config.without_mup()
    settings = {setting.theirs: setting.their_value(config) for setting in architecture.settings}
    settings |= {key: values[0] for key, values in architecture.only.items()}
    return (
        _rope_keys(architecture, rope, config.window_rope)
        | _window_keys(architecture, config)
        | settings
        | {
            "architectures": [architecture.class_name],
            "model_type": architecture.model_type,
            "vocab_size": vocab_size,
            "attention_dropout": 0.0,
            "max_position_embeddings": max_position_embeddings,
            "torch_dtype": dtype,
            "bos_token_id": None,
            "eos_token_id": eos_token_id,
            "pad_token_id": None,
            "use_cache": True,
        }
    )


def _rope_keys(architecture: Architecture, rope: Rope, window_rope: Rope | None) -> dict[str, Any]:
    """Return the keys of config.json that say how positions turn queries and keys.

    Args:
        window_rope: of layers with a window; None = the same as of the others.
    """
    # Names and values are transformers' own already.
    scaling = {"rope_type": rope.type} | rope.parameters
    # Where transformers before version 5 and other engines read the rope.
    older: dict[str, Any] = {"rope_theta": rope.base}
    if rope.type != "default":
        older["rope_scaling"] = scaling
    # Where transformers reads it from version 5 on.
    newer = {"rope_theta": rope.base} | scaling
    if not architecture.has_two_ropes:
        return older | {"rope_parameters": newer}
    windowed = newer
    if window_rope is not None:
        windowed = {"rope_theta": window_rope.base, "rope_type": window_rope.type}
    if "rope_local_base_freq" in architecture.older:
        older["rope_local_base_freq"] = windowed["rope_theta"]
    return older | {"rope_parameters": {FULL: newer, SLIDING: windowed}}


def _window_keys(architecture: Architecture, config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that say which layers have a window."""
    window = config.window_size[0] + 1 if config.window_size else None
    if architecture.windows == "none":
        return {}
    if architecture.windows == "same":
        return {"sliding_window": window}
    types = [FULL if each is None else SLIDING for each in config.windows]
    if architecture.windows == "by_layer":
        # Without a window transformers' default stays, which its masks need and no layer uses.
        size = {} if window is None else {"sliding_window": window}
        return size | {"layer_types": types} | _pattern_key(architecture, types)
    if window is None:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        # Where transformers reads no layer_types, it has a number of layers without, then those
        # with.
        "max_window_layers": types.index(SLIDING),
        "layer_types": types,
    }


def _pattern_key(architecture: Architecture, types: list[str]) -> dict[str, Any]:
    """Return how often a layer has no window, for versions that read no layer_types."""
    every = shortest_skip([int(kind == SLIDING) for kind in types])
    if "sliding_window_pattern" not in architecture.older or len(every) != 1:
        return {}
    return {"sliding_window_pattern": every[0]}
