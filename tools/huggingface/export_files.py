"""What an export holds besides weights: settings, generation, tokenizer and chat templates.

Where the model came from a Hugging Face folder, its own files are written again (their way through
training: pretrain/checkpointing/model_files.py). Only what training changed is changed, each change
in one line.
"""

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from data.tokenizers.tokenizer import HUGGINGFACE_FILES, Tokenizer
from model.config import ModelConfig
from model.hf.architectures import ACTIVATIONS
from model.rope import Rope
from pretrain.checkpointing.model_files import CONFIG, GENERATION, LEGAL, MORE_TEMPLATES, TEMPLATE
from tools.huggingface.config import interpret_config

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Settings that name the tokens of a role."""
_SOURCES_OWN = (
    *TOKEN_IDS,
    "use_cache",
    "attention_dropout",
    "initializer_range",
)
"""Keys of config.json that training never changes: the source's value stays, or its silence."""
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation")
"""Keys of the activation: the source's spelling stays while it means the same."""
_ROPE_KEYS = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "rope_local_base_freq",
)
"""Keys that hold a rope in any form: ours replace the source's."""
_CODE = ("auto_map",)
"""Keys that name Python code, which is not carried."""


def parse_json(content: bytes | None) -> dict[str, Any]:
    """Parse the JSON object of a carried file; empty where there is none that can be read."""
    try:
        parsed = json.loads(content or b"{}")
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as transformers writes its files."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- config.json


def merge_config(ours: dict[str, Any], source: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Make the config.json to write -> (it, what differs from the source's, a line each).

    Args:
        ours: what the trained model means, in Hugging Face's names.
        source: the config.json that the model was imported with; empty where it began here.
    """
    if not source:
        return ours, []
    merged = {name: value for name, value in source.items() if name not in _ROPE_KEYS + _CODE}
    changes = [f"{name} is left out: it names code" for name in _CODE if name in source]
    # Ropes and dtypes have several spellings: their changes are named by meaning, not by key.
    compared_by_meaning = (*_ROPE_KEYS, "torch_dtype")
    for name, value in ours.items():
        if name in _SOURCES_OWN:
            continue
        old = source.get(name)
        if name in _ACTIVATION_KEYS and ACTIVATIONS.get(str(old)) == ACTIVATIONS[value]:
            continue
        if old is not None and old != value and name not in compared_by_meaning:
            changes.append(f"{name} {_spell(old)} -> {_spell(value)}")
        merged[name] = value
    old_dtype = source.get("dtype", source.get("torch_dtype"))
    if "dtype" in source:
        merged["dtype"] = ours["torch_dtype"]
    if old_dtype not in (None, ours["torch_dtype"]):
        changes.append(f"dtype {old_dtype} -> {ours['torch_dtype']}")
    return merged, changes


def source_rope(source: dict[str, Any]) -> Rope | None:
    """Read the rope of the config.json that a model was imported with; None if unknown."""
    model = ModelConfig()
    try:
        for name, value in interpret_config(source).model.items():
            setattr(model, name, value)
        return model.rope
    except (ValueError, KeyError, TypeError, AttributeError):  # nothing that an import would take
        return None


def rope_change(source: dict[str, Any], rope: Rope) -> list[str]:
    """Say in one line that the rope is another than the source's; nothing where it is not."""
    before = source_rope(source)
    if not source or before == rope:
        return []
    return [f"rope {before.describe() if before else 'unknown'} -> {rope.describe()}"]


def _spell(value: Any) -> str:
    """Write a value of config.json for people."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# ---------------------------------------------------------------- generation


def tokens_by_role(folder: Path) -> dict[str, int]:
    """Read the ids of the begin, end and padding tokens that a folder's tokenizer has."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {name: getattr(tokenizer, name) for name in TOKEN_IDS}
    return {name: value for name, value in found.items() if value is not None}


def write_generation(folder: Path, carried: dict[str, bytes], ids: dict[str, int]) -> None:
    """Write generation_config.json: the source's bytes, or for a model that began here `ids`.

    A source without one gets none: transformers makes it from config.json.
    """
    if GENERATION in carried:
        (folder / GENERATION).write_bytes(carried[GENERATION])
    elif CONFIG not in carried and ids:
        write_json(folder / GENERATION, ids)


def stop_ids(folder: Path) -> list[int]:
    """Read the ids at which generation from a Hugging Face folder stops."""
    for name in (GENERATION, CONFIG):
        path = folder / name
        found = parse_json(path.read_bytes() if path.is_file() else None).get("eos_token_id")
        if found is not None:
            return list(found) if isinstance(found, list) else [found]
    return []


# ---------------------------------------------------------------- license


def write_legal_files(folder: Path, carried: dict[str, bytes]) -> None:
    """Write the source's license and the like."""
    for name, content in carried.items():
        if any(fnmatch(name, pattern) for pattern in LEGAL):
            (folder / name).write_bytes(content)


# ---------------------------------------------------------------- tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer | None, carried: dict[str, bytes]) -> bool:
    """Write the tokenizer that was trained with, else the source's -> whether there was one."""
    if tokenizer is not None:
        tokenizer.save_huggingface(str(folder))
        return True
    names = [name for name in HUGGINGFACE_FILES if name in carried]
    for name in names:
        (folder / name).write_bytes(carried[name])
    return bool(names)


def complete_tokenizer(folder: Path, carried: dict[str, bytes], context: int) -> list[str]:
    """Add the source's chat templates and longest text to the tokenizer -> a line per change.

    Args:
        context: the context length that the export declares.
    """
    path = folder / TOKENIZER_CONFIG
    written = parse_json(path.read_bytes() if path.is_file() else None)
    theirs = parse_json(carried.get(TOKENIZER_CONFIG))
    before = dict(written)
    # A template that was trained with stays; else the source's, in the form that it has there.
    if not (folder / TEMPLATE).exists() and "chat_template" not in written:
        if TEMPLATE in carried:
            (folder / TEMPLATE).write_bytes(carried[TEMPLATE])
        if "chat_template" in theirs:
            written["chat_template"] = theirs["chat_template"]
    _write_more_templates(folder, carried)
    if "model_max_length" in theirs:
        written["model_max_length"] = theirs["model_max_length"]
    changes = _change_longest_text(written, parse_json(carried.get(CONFIG)), context)
    if written != before:
        write_json(path, written)
    return changes


def _write_more_templates(folder: Path, carried: dict[str, bytes]) -> None:
    """Write the source's named chat templates, and those of processors, that are not there yet."""
    names = [name for name in carried if name.startswith(f"{MORE_TEMPLATES}/")]
    names += [name for name in ("chat_template.json",) if name in carried]
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_bytes(carried[name])


def _change_longest_text(
    tokenizer: dict[str, Any], source: Mapping[str, Any], context: int
) -> list[str]:
    """Raise model_max_length, in place, where the context changed and it is too short -> a line.

    Args:
        tokenizer: content of tokenizer_config.json.
        source: the config.json that the model was imported with.
        context: the context length that the export declares.
    """
    old_context = source.get("max_position_embeddings")
    length = tokenizer.get("model_max_length")
    if old_context in (None, context) or not isinstance(length, int | float):
        return []
    if length != old_context and length >= context:
        return []
    tokenizer["model_max_length"] = context
    return [f"model_max_length {_spell(length)} -> {_spell(context)}"] if length != context else []
