"""The configuration as flat keys, one per setting, as YAML files and flags have them."""

import dataclasses
from typing import Any, get_type_hints

from pretrain.config import megatron_flags
from pretrain.config.coerce import choices_of, coerce, takes
from pretrain.config.config import Config, GivenSettings, section_types
from pretrain.config.megatron_flags import Given
from pretrain.config.phase_config import PhaseConfig

IN_TOKENS = {
    "global_batch_size": "global_batch_tokens",
    "train_iters": "train_tokens",
    "train_samples": "train_tokens",
}
"""Settings of the run that a phase has in tokens."""


def field_table() -> dict[str, tuple[str, Any]]:
    """Return every flat key -> (section, type), from the dataclasses themselves."""
    table: dict[str, tuple[str, Any]] = {}
    for section, cls in section_types().items():
        for name, annotation in get_type_hints(cls, include_extras=True).items():
            assert name not in table, f"{name} is declared twice"
            table[name] = (section, annotation)
    return table


def from_flat(values: dict[str, Any], where: str, base: Config | None = None) -> Config:
    """Return a copy of `base` with the flat `values` set, each coerced by its field's type.

    Raises:
        ValueError: unknown keys and wrong types, all at once, each naming `where`.
    """
    table = field_table()
    base = base or Config()
    # Copies, so that `base` stays as it is.
    sections = {name: dataclasses.replace(getattr(base, name)) for name in section_types()}
    settings = set(base.given.settings)
    theirs = dict(base.given.megatron)
    problems: list[str] = []
    for key, value in values.items():
        if key not in table:
            _take_megatron_key(key, value, where, theirs, problems)
            continue
        settings.add(key)
        section, annotation = table[key]
        if key == "phases":
            sections[section].phases = _read_phases(value, where, problems)
        else:
            _set(sections[section], key, value, annotation, where, problems)
    if problems:
        raise ValueError("\n".join(problems))
    return Config(**sections, given=GivenSettings(frozenset(settings), theirs))


def to_flat(config: Config) -> dict[str, Any]:
    """Return every setting as a flat dict that `from_flat` reads back; unset ones are left out."""
    flat = {}
    for section in section_types():
        for key, value in dataclasses.asdict(getattr(config, section)).items():
            if key == "phases":  # each with what it says for itself
                value = [{k: v for k, v in phase.items() if v is not None} for phase in value]
            if value not in (None, []):
                flat[key] = value
    return flat


def _set(
    target: Any, key: str, value: Any, annotation: Any, where: str, problems: list[str]
) -> None:
    """Set a field of `target`; a value of the wrong type becomes a problem with its fix."""
    try:
        setattr(target, key, coerce(value, annotation))
    except ValueError as error:
        # A setting with a list of values: name the nearest one.
        choices = choices_of(annotation)
        alone = value[0] if isinstance(value, list) and len(value) == 1 else value
        fix = megatron_flags.fix_for_value(key, alone, choices)
        fix = fix or ("one of them" if choices else "give a value of that kind")
        problems.append(f"{where}: {key} = {value!r}: {error}. Fix: {fix}.")


def _take_megatron_key(
    key: str, value: Any, where: str, theirs: dict[str, Given], problems: list[str]
) -> None:
    """Put a flag of Megatron-LM into `theirs`, or say why it cannot be."""
    text = value if isinstance(value, str) else " ".join(map(str, value))
    given = megatron_flags.find(key, text)
    if given is None:
        problems.append(_answer_unknown_key(key, field_table(), where))
    elif given.problem:
        problems.append(f"{where}: {given.problem}")
    else:
        theirs[key.removeprefix("--").replace("-", "_")] = given


def _read_phases(value: Any, where: str, problems: list[str]) -> list[PhaseConfig]:
    """Return the entries of `phases`; what is wrong with them goes to `problems`."""
    types_by_key = get_type_hints(PhaseConfig, include_extras=True)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        problems.append(
            f"{where}: phases: must be a list of mappings. "
            "Fix: one `- {name: ..., ...}` per phase."
        )
        return []
    if not value:
        problems.append(
            f"{where}: phases: the list is empty. Fix: give a phase, or remove the key."
        )
    phases = []
    for number, entry in enumerate(value):
        # A name of its own comes with its keys.
        phase = PhaseConfig(name=f"phase{number}")
        place = f"{where}: phases[{number}]"
        for key, item in entry.items():
            if key in types_by_key:
                _set(phase, key, item, types_by_key[key], place, problems)
            else:
                problems.append(_answer_key_of_no_phase(key, types_by_key, place))
        phases.append(phase)
    return phases


def _answer_key_of_no_phase(key: str, known: dict[str, Any], place: str) -> str:
    """Say what to do about a key that an entry of `phases` cannot have."""
    theirs = megatron_flags.find(key)
    # Megatron-LM has no phases, so that none of its flags has a place there.
    if theirs is not None:
        silent = f"{key}: Megatron-LM's, says nothing of a phase. Fix: remove it."
        return f"{place}: {theirs.problem or silent}"
    if key not in field_table():
        return _answer_unknown_key(key, known, place)
    fix = IN_TOKENS.get(key, "write it beside `phases:`, for the whole run")
    return f"{place}: {key}: is a setting of the run, no phase has its own. Fix: {fix}."


def _answer_unknown_key(key: str, known: dict[str, Any], where: str) -> str:
    """Say what to do about a key that is nowhere a setting, with the nearest that is."""
    switch = key.replace("-", "_").removeprefix("no_")
    _, annotation = field_table().get(switch, (None, None))
    # `no_bf16: true` in a file, as the flag --no-bf16 would be written.
    is_negated = not key.startswith(switch) and switch in known and takes(annotation, bool)
    fix = f"{switch}: false." if is_negated else megatron_flags.advice(key, list(known))
    return f"{where}: {key}: no such setting. Fix: {fix}"
