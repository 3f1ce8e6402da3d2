"""What a Hugging Face folder's config.json says of the rotary embedding (rope), as our settings."""

from typing import Any, get_args

from model.rope import PARAMETERS, Rope, RopeType
from tools.huggingface.keys import ANOTHER, CORRECT
from tools.shared.message_text import short

_ORIGINAL = "original_max_position_embeddings"
_NAMES = {parameter.name for parameter in PARAMETERS.values()}
"""Parameters of a rope by transformers' names."""
_CHECKED_APART = {"type", "rope_type", "partial_rotary_factor", "finetuned"}
"""Entries beside the parameters: of no effect, or checked by themselves."""
_LLAMA3_NEEDS = ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)


def rope_form_problems(content: dict[str, Any]) -> list[str]:
    """Find what is wrong with the rope as written, before transformers fills in what is missing."""
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
    # Two parameters may stand outside of the object, too.
    outer = {key: content[key] for key in ("rope_theta", _ORIGINAL) if key in content}
    for name, value in (*outer.items(), *given.items()):
        if name not in _CHECKED_APART and value is not None:
            found += _parameter_problems(name, value)
    return found


def _parameter_problems(name: str, value: Any) -> list[str]:
    """Say what is wrong with the value of one parameter, a line or none."""
    if name not in _NAMES | {"rope_theta"}:
        return [f"rope parameter {name} = {short(value)}: is not built. {ANOTHER}"]
    if name == "truncate":
        if isinstance(value, bool):
            return []
        return [f"rope parameter truncate = {short(value)}: must be true or false. {CORRECT}"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [f"rope parameter {name} = {short(value)}: must be a number. {CORRECT}"]
    if name == _ORIGINAL and value != value // 1:
        return [f"rope parameter {name} = {value}: must be a whole number. {CORRECT}"]
    return []


def rope_settings(parsed: Any) -> dict[str, Any]:
    """Translate the rope of transformers' configuration object into our settings.

    Raises:
        ValueError: values that give no usable angles.
    """
    given = dict(parsed.rope_parameters)
    kind = given["rope_type"]
    if kind == "yarn":
        given = _complete_yarn(given, parsed.max_position_embeddings)
    missing = [name for name in _LLAMA3_NEEDS if kind == "llama3" and given.get(name) is None]
    if missing:
        raise ValueError(
            "\n".join(
                f"rope parameter {name}: missing, and llama3 needs it. {CORRECT}"
                for name in missing
            )
        )

    types = {_ORIGINAL: int, "truncate": bool}
    try:
        values = {
            name: types.get(name, float)(given[name])
            for name in _NAMES
            if given.get(name) is not None
        }
        rope = Rope.make(float(given["rope_theta"]), kind, values)
        problems = rope.problems()
    except OverflowError as error:  # an integer that no float holds, or angles beyond it
        raise ValueError(f"rope_parameters = {short(given)}: {error}. {CORRECT}") from None
    if problems:
        raise ValueError("\n".join(problems))
    used = {
        setting: getattr(rope, parameter.name)
        for setting, parameter in PARAMETERS.items()
        if getattr(rope, parameter.name) is not None
    }
    return {"rotary_base": rope.base, "rope_type": kind} | used


def _complete_yarn(given: dict[str, Any], length: int) -> dict[str, Any]:
    """Apply transformers' rules for yarn's parameters that are null, 0 or left out.

    Args:
        length: max_position_embeddings.
    """
    given = {"truncate": True} | given
    given["truncate"] = bool(given["truncate"])  # null counts as false there
    if given["factor"] is None and given[_ORIGINAL]:
        given["factor"] = length / given[_ORIGINAL]
    for name in ("beta_fast", "beta_slow"):
        given[name] = given.get(name) or None
    # mscale counts only in a pair, and only without a factor of its own.
    is_pair = given.get("mscale") and given.get("mscale_all_dim")
    if given.get("attention_factor") is not None or not is_pair:
        given |= {"mscale": None, "mscale_all_dim": None}
    return given
