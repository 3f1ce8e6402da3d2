"""Which architecture of transformers has a model's parts."""

from dataclasses import fields
from typing import Any

from model.config import ModelConfig
from model.hf.architecture import Architecture
from model.hf.architectures import ARCHITECTURES

_COMPARED_APART = {"window_size", "window_attn_skip_freq", "window_rotary_base"}
"""Settings whose effect on the layers is compared."""


def architecture_of(config: ModelConfig, imported_as: str | None = None) -> Architecture:
    """Return the architecture that has this model's parts.

    Args:
        imported_as: model_type of the folder that the model is from: without windows, Llama and
            Mistral are the same model.

    Raises:
        ValueError: no architecture of transformers that we know has them all; the settings that
            keep the model from being the nearest one are named.
    """
    config = config.without_mup()
    # The one that it came from first, then in the order of the table.
    rows = sorted(ARCHITECTURES.values(), key=lambda row: row.model_type != imported_as)
    found = [(row, misfits(row, config)) for row in rows]
    nearest, problems = min(found, key=lambda pair: len(pair[1]))
    if not problems:
        return nearest
    raise ValueError(
        "\n".join(
            f"{problem}, and no other architecture of transformers that we know has the model's "
            f"other parts. Fix: train with what {nearest.class_name} has."
            for problem in problems
        )
    )


def misfits(row: Architecture, config: ModelConfig) -> list[str]:
    """List our settings that an architecture has no place for, as `name = value: what it has`."""
    fixed = row.fixed_settings(config.hidden_size)
    if not config.qk_layernorm:
        fixed = fixed | {"qk_layernorm_scope": config.qk_layernorm_scope}  # without effect
    if config.softmax_scale == config.head_size**-0.5:
        fixed = fixed | {"softmax_scale": config.softmax_scale}  # the usual one, written out
    carried = {setting.ours: setting for setting in row.settings}
    found = []
    for item in fields(ModelConfig):
        name = item.name
        value = getattr(config, name)
        if name in carried:
            setting = carried[name]
            if not setting.can_write(config):
                found.append(f"{name} = {value}: {setting.theirs} of {row.class_name} cannot be it")
        elif name in fixed or _is_part(item):
            expected = fixed.get(name, _default(item))
            if value != expected:
                found.append(f"{name} = {value}: {row.class_name} has {name} = {expected}")
    return found + _window_misfits(row, config)


def _is_part(item: Any) -> bool:
    """Tell whether a setting of ours changes the numbers that a model's weights give.

    A new one does, until a row of the table has a place for it. The rope has its own keys, and a
    setting that a run may change freely is none of the weights'.
    """
    facts = item.metadata
    is_rope = bool(facts.get("per_phase"))
    return item.name not in _COMPARED_APART and not is_rope and facts.get("resume") != "free"


def _default(item: Any) -> Any:
    """Return a field's default."""
    return getattr(ModelConfig(), item.name)


def _window_misfits(row: Architecture, config: ModelConfig) -> list[str]:
    """Say which windows an architecture has no place for."""
    if set(config.windows) == {None}:
        return []
    found = []
    if config.window_rotary_base is not None and not row.has_two_ropes:
        found.append(
            f"window_rotary_base = {config.window_rotary_base}: {row.class_name} has one rotary "
            "embedding for all layers"
        )
    if row.windows == "none":
        found.append(f"window_size = {config.window_size}: {row.class_name} has no windows")
    if row.windows in ("none", "same") and None in config.windows:
        found.append(
            f"window_attn_skip_freq = {config.window_attn_skip_freq}: {row.class_name} has windows "
            "in all layers or in none"
        )
    return found
