"""Which architecture of transformers has a model's parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from model.config import ModelConfig
from model.hf.architecture import Architecture
from model.hf.architectures import ARCHITECTURES
from model.hf.folding import fold

_COMPARED_APART = {"window_size", "window_attn_skip_freq", "window_rotary_base"}
"""Settings whose effect on the layers is compared."""


@dataclass(frozen=True)
class ExportForm:
    """Describes how a model is written in an architecture of transformers."""

    architecture: Architecture
    config: ModelConfig
    """What config.json says, without muP."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Part of the model -> what its weights are multiplied by (folding.py)."""


def export_form(config: ModelConfig, imported_as: str | None = None) -> ExportForm:
    """Choose how to write a model: by its settings alone, else with factors in its weights.

    Args:
        imported_as: model_type of the folder that the model is from: without windows, Llama and
            Mistral are the same model.

    Raises:
        ValueError: no architecture of transformers that we know has all parts; the settings that
            keep the model from being the nearest one are named.
    """
    plain = config.without_mup()
    row, problems = _nearest(plain, imported_as)
    if not problems:
        return ExportForm(row, plain)
    folded, factors = fold(plain)
    row, problems = _nearest(folded, imported_as)
    if not problems:
        return ExportForm(row, folded, factors)
    raise _no_architecture(row, problems, config)


def architecture_of(config: ModelConfig, imported_as: str | None = None) -> Architecture:
    """Return the architecture that has this model's parts, with its weights as they are.

    Args:
        imported_as: as in `export_form`.

    Raises:
        ValueError: there is none, as in `export_form`.
    """
    row, problems = _nearest(config.without_mup(), imported_as)
    if problems:
        raise _no_architecture(row, problems, config)
    return row


def _nearest(config: ModelConfig, imported_as: str | None) -> tuple[Architecture, list[str]]:
    """Find the architecture with the fewest misfits -> it and these; the earliest of several."""
    # The one that it came from first, then in the order of the table.
    rows = sorted(ARCHITECTURES.values(), key=lambda row: row.model_type != imported_as)
    found = [(row, misfits(row, config)) for row in rows]
    return min(found, key=lambda pair: len(pair[1]))


def _no_architecture(nearest: Architecture, problems: list[str], config: ModelConfig) -> ValueError:
    """Make the error of a model that no architecture has all parts of.

    Args:
        problems: of the nearest one.
        config: as it was given, with muP's settings.
    """
    lines = []
    for problem in problems:
        name = problem.split(" = ")[0]
        fix = f"train with what {nearest.class_name} has"
        by_mup = _said_by_mup(name, config)
        if by_mup is not None:
            # The user gave other settings, from which this one follows.
            given, fix = by_mup
            problem = f"{given}: makes {problem.replace(': ', ', and ', 1)}"
        lines.append(
            f"{problem}, and no other architecture of transformers that we know has the model's "
            f"other parts. Fix: {fix}."
        )
    return ValueError("\n".join(lines))


def _said_by_mup(name: str, config: ModelConfig) -> tuple[str, str] | None:
    """Return the settings of muP that make another one, and the fix; None where they do not."""
    if not config.use_mup:
        return None
    if name == "logits_scaling" and config.width_ratio != 1:
        given = f"use_mup = True, mup_base_hidden_size = {config.base_hidden_size}"
        fix = f"--mup-base-hidden-size {config.hidden_size}, or train without --use-mup"
        if config.logits_scaling != 1:
            given += f", logits_scaling = {config.logits_scaling}"
            fix = f"--logits-scaling 1; and {fix}"
        return given, fix
    if name == "softmax_scale" and config.softmax_scale is None:
        base = config.mup_base_head_dim
        power = config.mup_attn_scale_power
        given = f"use_mup = True, mup_base_head_dim = {base}, mup_attn_scale_power = {power}"
        # The base with which scores are as without muP, with all its digits: scores are compared.
        usual = config.head_size ** (2 * power - 1)
        return given, f"--mup-base-head-dim {usual:.17g}, or train without --use-mup"
    return None


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
