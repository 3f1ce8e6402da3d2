"""What a Hugging Face folder's config.json says, with the eyes of transformers.

The installed transformers' own configuration class parses the file, so that defaults, types and the
forms of the rope are exactly its own. What each key may hold: tools/huggingface/keys.py.
"""

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from model.hf import ARCHITECTURES
from model.rope import PARAMETERS, Rope, RopeType
from tools.huggingface.keys import ANOTHER, CORRECT, one_line, short, sort_keys

LARGEST = 2**31 - 1
"""Largest size that is believed: beyond, a file holds a slip of the pen."""
MOST_LAYERS = 100_000
"""transformers writes a list with an entry for each layer before anything is compared."""


@dataclass(frozen=True)
class FolderConfig:
    """One config.json, understood."""

    model: dict[str, Any]
    """Settings of our model, by name; untie_embeddings_and_output_weights as the file says it."""
    vocab_size: int
    max_position_embeddings: int
    warnings: list[str] = field(default_factory=list)


def read_config_file(folder: Path) -> dict:
    """Content of config.json.

    Raises:
        ValueError: no such file, or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        found = "no config.json in it" if folder.is_dir() else "no such folder"
        raise ValueError(
            f"hf = {folder}: {found}. Fix: give a folder with a model's files; names of the Hub are "
            "not downloaded."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON ({error}). {CORRECT}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {short(content)}, not an object. {CORRECT}")
    return content


def understand(content: dict) -> FolderConfig:
    """Our settings from the content of a config.json.

    Raises:
        ValueError: an architecture, or a part of one, that is not built here, or a value that
            transformers refuses; everything found, a line each.
    """
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"model_type = {short(kind)}: not built here. Fix: one of {', '.join(ARCHITECTURES)}."
        )
    parser = _parser(kind)
    problems, warnings = sort_keys(content, kind, parser)
    problems += _auto_map_problems(content) + _rope_form_problems(content)
    layers = content.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        problems.append(f"num_hidden_layers = {short(layers)}: is above {MOST_LAYERS}. {CORRECT}")
    if problems:
        raise ValueError("\n".join(problems))
    parsed = _parse(content, parser)
    problems = _size_problems(parsed) + _part_problems(parsed)
    if problems:
        raise ValueError("\n".join(problems))
    rope = _rope_settings(parsed)
    warnings += _remarks(content, parsed)
    model = ARCHITECTURES[kind] | _shape_settings(parsed) | rope
    return FolderConfig(model, parsed.vocab_size, parsed.max_position_embeddings, warnings)


def _parser(kind: str) -> type:
    """transformers' configuration class of a model_type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # seconds

    return CONFIG_MAPPING[kind]


# ---------------------------------------------------------------- the file as a whole


def _auto_map_problems(content: dict) -> list[str]:
    """Forms of auto_map that transformers stumbles over; it looks before it reads its own class."""
    given = content.get("auto_map", {})
    classes = given.values() if isinstance(given, dict) else [None]
    if all(isinstance(value, str | list) for value in classes):
        return []
    return [f"auto_map = {short(given)}: must be an object of class names. {CORRECT}"]


def _remarks(content: dict, parsed: Any) -> list[str]:
    """Settings that stay without effect and that somebody might count on."""
    found = []
    if parsed.attention_dropout:
        found.append(
            f"attention_dropout = {parsed.attention_dropout}: there is no dropout here; "
            "no logit depends on it, but training would"
        )
    expected = f"{type(parsed).__name__.removesuffix('Config')}ForCausalLM"
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


def _parse(content: dict, parser: type) -> Any:
    """The file as transformers' configuration object.

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


def _size_problems(parsed: Any) -> list[str]:
    found = []
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    ):
        value = getattr(parsed, name)
        if not 1 <= value <= LARGEST:
            found.append(f"{name} = {value}: must be from 1 to {LARGEST}. {CORRECT}")
    if found:
        return found
    heads = parsed.num_attention_heads
    groups = parsed.num_key_value_heads
    if heads % groups:
        found.append(
            f"num_key_value_heads = {groups}: must divide num_attention_heads = {heads}. {CORRECT}"
        )
    head_size = _head_size(parsed)
    if type(head_size) is not int or not 1 <= head_size <= LARGEST or head_size % 2:
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


def _head_size(parsed: Any) -> Any:
    """Size of a head as the modeling files take it: an attribute counts, also if it is null."""
    return getattr(parsed, "head_dim", parsed.hidden_size // parsed.num_attention_heads)


def _part_problems(parsed: Any) -> list[str]:
    """Parts of an architecture that are not built here."""
    found = []
    if parsed.hidden_act not in ("silu", "swish"):
        found.append(f"hidden_act = {short(parsed.hidden_act)}: only silu is built. {ANOTHER}")
    if not _is_positive(parsed.rms_norm_eps):
        found.append(
            f"rms_norm_eps = {parsed.rms_norm_eps}: must be a finite number above 0. {CORRECT}"
        )
    layer_types = getattr(parsed, "layer_types", None)
    if layer_types is not None and set(map(str, layer_types)) != {"full_attention"}:
        found.append(f"layer_types = {short(layer_types)}: only full_attention is built. {ANOTHER}")
    if layer_types is None and getattr(parsed, "sliding_window", None) is not None:
        found.append(
            f"sliding_window = {short(parsed.sliding_window)}: only full attention is built. "
            f"{ANOTHER}"
        )
    return found


def _shape_settings(parsed: Any) -> dict[str, Any]:
    settings = {
        "num_layers": parsed.num_hidden_layers,
        "hidden_size": parsed.hidden_size,
        "ffn_hidden_size": parsed.intermediate_size,
        "num_attention_heads": parsed.num_attention_heads,
        "num_query_groups": parsed.num_key_value_heads,
        "kv_channels": _head_size(parsed),
        "norm_epsilon": parsed.rms_norm_eps,
        "untie_embeddings_and_output_weights": not parsed.tie_word_embeddings,
    }
    if _is_positive(parsed.initializer_range):
        settings["init_method_std"] = parsed.initializer_range
    return settings


def _is_positive(value: Any) -> bool:
    return math.isfinite(value) and value > 0


# ---------------------------------------------------------------- rope

_ORIGINAL = "original_max_position_embeddings"
_NAMES = {name for name, _ in PARAMETERS.values()}
_REMARKS = {"type", "rope_type", "partial_rotary_factor", "finetuned"}
_LLAMA3_NEEDS = ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)


def _rope_form_problems(content: dict) -> list[str]:
    """What is wrong with the rope as written, before transformers fills in what is left out."""
    # Where both forms are given, transformers reads the older one.
    given = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(given, dict):
        return [f"rope_scaling = {short(given)}: must be an object. {CORRECT}"]
    built = get_args(RopeType)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in built:
        return [f"rope_type = {short(kind)}: only {', '.join(built)} are built. {ANOTHER}"]
    found = []
    for share in (content.get("partial_rotary_factor"), given.get("partial_rotary_factor")):
        if share not in (None, 1):
            found.append(f"partial_rotary_factor = {short(share)}: only 1.0 is built. {ANOTHER}")
    if given.get("rope_theta", content.get("rope_theta", 1)) is None:
        found.append(
            "rope_theta = null: transformers computes no angle from it. "
            "Fix: give the base, or remove the key."
        )
    outer = {key: content[key] for key in ("rope_theta", _ORIGINAL) if key in content}
    for name, value in (*outer.items(), *given.items()):
        if name in _REMARKS or value is None:
            continue
        if name not in _NAMES | {"rope_theta"}:
            found.append(f"rope parameter {name} = {short(value)}: is not built. {ANOTHER}")
        elif name == "truncate":
            if not isinstance(value, bool):
                found.append(
                    f"rope parameter truncate = {short(value)}: must be true or false. {CORRECT}"
                )
        elif isinstance(value, bool) or not isinstance(value, int | float):
            found.append(f"rope parameter {name} = {short(value)}: must be a number. {CORRECT}")
        elif name == _ORIGINAL and value != value // 1:
            found.append(f"rope parameter {name} = {value}: must be a whole number. {CORRECT}")
    return found


def _rope_settings(parsed: Any) -> dict[str, Any]:
    """Our settings of the rope.

    Raises:
        ValueError: values that give no usable angles.
    """
    given = dict(parsed.rope_parameters)
    kind = given["rope_type"]
    if kind == "yarn":
        given = _yarn(given, parsed.max_position_embeddings)
    missing = [name for name in _LLAMA3_NEEDS if kind == "llama3" and given.get(name) is None]
    if missing:
        raise ValueError(
            "\n".join(
                f"rope parameter {name}: missing, and llama3 needs it. {CORRECT}"
                for name in missing
            )
        )
    kinds = {_ORIGINAL: int, "truncate": bool}
    try:
        values = {
            name: kinds.get(name, float)(given[name])
            for name in _NAMES
            if given.get(name) is not None
        }
        rope = Rope.make(float(given["rope_theta"]), kind, values)
        problems = rope.problems()
    except OverflowError as error:
        problems = [f"rope_parameters = {short(given)}: {error}. {CORRECT}"]
    if problems:
        raise ValueError("\n".join(problems))
    return {"rotary_base": rope.base, "rope_type": kind} | {
        setting: getattr(rope, name)
        for setting, (name, _) in PARAMETERS.items()
        if getattr(rope, name) is not None
    }


def _yarn(given: dict, length: int) -> dict:
    """The parameters with transformers' rules for what is null, 0 or left out."""
    given = {"truncate": True} | given
    given["truncate"] = bool(given["truncate"])  # null counts as false there
    if given["factor"] is None and given[_ORIGINAL]:
        given["factor"] = length / given[_ORIGINAL]
    for name in ("beta_fast", "beta_slow"):
        given[name] = given.get(name) or None
    if given.get("attention_factor") is not None or not (
        given.get("mscale") and given.get("mscale_all_dim")
    ):
        given |= {"mscale": None, "mscale_all_dim": None}
    return given
