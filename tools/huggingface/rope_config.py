"""What a Hugging Face folder's config.json says of the rotary embedding (rope), as our settings.

Some architectures have a second one, in layers with a window; rope_parameters holds both then, by
the kind of layer.
"""

from typing import Any, get_args

from model.hf.architecture import Architecture
from model.hf.config_json import FULL, SLIDING
from model.rope import PARAMETERS, Rope, RopeType
from tools.huggingface.keys import ANOTHER, CORRECT
from tools.shared.message_text import short

_ORIGINAL = "original_max_position_embeddings"
_NAMES = {parameter.name for parameter in PARAMETERS.values()}
"""Parameters of a rope by transformers' names."""
_CHECKED_APART = {"type", "rope_type", "partial_rotary_factor", "finetuned"}
"""Entries beside the parameters: of no effect, or checked by themselves."""
_WINDOW_BASE = "rope_local_base_freq"
"""Older key of the base in layers with a window."""
_LLAMA3_NEEDS = ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)


def rope_form_problems(content: dict[str, Any], architecture: Architecture) -> list[str]:
    """Find what is wrong with the rope as written, before transformers fills in what is missing."""
    older = content.get("rope_scaling") or {}
    newer = content.get("rope_parameters") or {}
    for name, given in (("rope_scaling", older), ("rope_parameters", newer)):
        if not isinstance(given, dict):
            return [f"{name} = {short(given)}: must be an object. {CORRECT}"]
    if not architecture.has_two_ropes:
        # Where both forms are given, transformers reads the older one.
        return _one_form_problems(content, older or newer)

    # The older form is about layers without a window, and is laid over the newer one.
    found = _one_form_problems(content, older)
    for name, given in newer.items():
        if name not in (FULL, SLIDING):
            found.append(
                f"rope_parameters has {name}: {architecture.class_name} reads {FULL} and "
                f"{SLIDING} only. {CORRECT}"
            )
        elif isinstance(given, dict):
            found += _one_form_problems(content, given)
        elif given is not None:
            found.append(f"rope_parameters.{name} = {short(given)}: must be an object. {CORRECT}")
    base = content.get(_WINDOW_BASE, 1.0)
    if _WINDOW_BASE in architecture.older and not _is_number(base):
        found.append(f"{_WINDOW_BASE} = {short(base)}: must be a number. {CORRECT}")
    return found


def _one_form_problems(content: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Find what is wrong with one object of a rope, and with the keys beside it."""
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
    if not _is_number(value):
        return [f"rope parameter {name} = {short(value)}: must be a number. {CORRECT}"]
    if name == _ORIGINAL and value != value // 1:
        return [f"rope parameter {name} = {value}: must be a whole number. {CORRECT}"]
    return []


def _is_number(value: Any) -> bool:
    """Tell whether a value of config.json is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def rope_settings(parsed: Any, architecture: Architecture, *, has_windows: bool) -> dict[str, Any]:
    """Translate the rope of transformers' configuration object into our settings.

    Args:
        has_windows: some layers have a window.

    Raises:
        ValueError: values that give no usable angles.
    """
    if not architecture.has_two_ropes:
        return _settings_of(_rope(parsed, parsed.rope_parameters))
    rope = _rope(parsed, parsed.rope_parameters[FULL])
    settings = _settings_of(rope)
    if not has_windows:
        return settings
    windowed = _rope(parsed, parsed.rope_parameters[SLIDING])
    if windowed == rope:
        return settings
    if windowed.type != "default":
        raise ValueError(
            f"rope of {SLIDING} is {windowed.describe()}: only one without scaling, or that of "
            f"{FULL}, is built. {ANOTHER}"
        )
    return settings | {"window_rotary_base": windowed.base}


def _settings_of(rope: Rope) -> dict[str, Any]:
    """Return our settings that mean a rope."""
    used = {
        setting: getattr(rope, parameter.name)
        for setting, parameter in PARAMETERS.items()
        if getattr(rope, parameter.name) is not None
    }
    return {"rotary_base": rope.base, "rope_type": rope.type} | used


def _rope(parsed: Any, parameters: dict[str, Any]) -> Rope:
    """Make a rope of what transformers' configuration object holds of it.

    Raises:
        ValueError: values that give no usable angles.
    """
    given = dict(parameters)
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
    return rope


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
