"""Reading the configuration: preset, YAML file and flags into one checked `Config`, and back into
YAML."""

import dataclasses
import difflib
import os
import sys
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from data.units import parse_tokens
from model.config import PRESETS, ModelConfig
from model.rope import PARAMETERS, Rope
from pretrain.checkpointing.learning_rate_changes import stored_scheduler
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.start import find_start
from pretrain.config import megatron_flags
from pretrain.config.config import Config, GivenSettings
from pretrain.config.phase_config import PhaseConfig
from pretrain.config.token_count import Tokens
from pretrain.config.translated_flags import with_translated_flags

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
# What --use-checkpoint-args leaves to the run: the machine's, and checks on other settings.
_NOT_OF_THE_WEIGHTS = {
    "attention_backend",
    "attention_crossover_tokens",
    "max_position_embeddings",
    "group_query_attention",
}
IN_TOKENS = {
    "global_batch_size": "global_batch_tokens",
    "train_iters": "train_tokens",
    "train_samples": "train_tokens",
}
"""Settings of the run that a phase has in tokens."""
# Flags with a second spelling that scripts use.
ALIASES = {"--ds-sequence-parallel-size": "--context-parallel-size"}


def load_config(argv: list[str]) -> Config:
    """The configuration that `argv` (spelled as `spell` returns it) asks for; --help prints and
    exits.

    Flags and YAML go through the same coercion, so that both give the same messages.

    Raises:
        ValueError: unknown flags or keys, and values of the wrong type; all of a source at once.
    """
    if "-h" in argv or "--help" in argv:
        tyro.cli(
            Config, args=["--help"], prog="pretrain.train", config=(tyro.conf.OmitArgPrefixes,)
        )
    flags = _read_flags(argv)
    path = flags.pop("config", None)
    values = _read_yaml(path) if path is not None else {}
    preset = flags.get("model", values.get("model"))
    preset_values = _preset(preset) if preset else {}

    def given_over(base: Config) -> Config:
        with_preset = from_flat(preset_values, "preset", base)
        with_preset = dataclasses.replace(
            with_preset, given=base.given
        )  # a preset isn't the user's
        return from_flat(flags, "command line", from_flat(values, path, with_preset))

    return with_translated_flags(_with_checkpoint(given_over(Config()), given_over))


def _with_checkpoint(config: Config, given_over: Callable[[Config], Config]) -> Config:
    """The configuration with what --use-checkpoint-args and --use-checkpoint-opt_param-scheduler
    take.

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
        base = Config(data=dataclasses.replace(Config().data, vocab_size=stored.data.vocab_size))
        for name in vars(stored.model).keys() - _NOT_OF_THE_WEIGHTS:
            setattr(base.model, name, getattr(stored.model, name))
        config = given_over(base)
        if config.model.rope.type != stored.model.rope.type:  # the parameters belong to the type
            _set_rope(base.model, Rope(stored.model.rotary_base))
            config = given_over(base)
        entries = config.schedule.phases or [PhaseConfig()]
        types_of_phases = {entry.with_rope(config.model).rope.type for entry in entries}
        for setting, (_, users) in PARAMETERS.items():
            if not types_of_phases & set(users):  # where every phase has another type
                setattr(base.model, setting, None)
        config = given_over(base)
    if settings.use_checkpoint_opt_param_scheduler and not start.weights_only:
        config.optimizer = dataclasses.replace(config.optimizer, **stored_scheduler(stored))
    return config


def _set_rope(model: ModelConfig, rope: Rope) -> None:
    """The settings that mean this rotary embedding."""
    model.rotary_base = rope.base
    model.use_rope_scaling = None
    model.rope_type = None if rope.type == "default" else rope.type
    for setting, (name, _) in PARAMETERS.items():
        setattr(model, setting, getattr(rope, name))


def spell(argv: list[str]) -> list[str]:
    """Hyphens in flag names, known aliases replaced."""
    spelled = []
    for arg in argv:
        if arg.startswith("--"):
            name, equals, value = arg.partition("=")
            name = name.replace("_", "-")
            name = ALIASES.get(name, name)
            spelled.append(f"{name}={value}" if equals else name)
        else:
            spelled.append(arg)
    return spelled


def _read_flags(argv: list[str]) -> dict[str, Any]:
    """Flags as a flat dict of texts, `config` among them; the last of a repeated flag wins.

    Raises:
        ValueError: unknown flags, stray words and missing values, all at once, with the nearest
        flag.
    """
    types_by_key = {
        name: annotation for name, (_, annotation) in field_table().items() if name != "phases"
    }
    types_by_key["config"] = str
    known = {
        "--" + name.replace("_", "-"): (name, annotation)
        for name, annotation in types_by_key.items()
    }
    values = {}
    problems = []
    at = 0
    while at < len(argv):
        flag, equals, attached = argv[at].partition("=")
        at = at + 1
        given = [attached] if equals else []
        while not equals and at < len(argv) and not argv[at].startswith("--"):
            given.append(argv[at])
            at += 1
        positive = "--" + flag[5:] if flag.startswith("--no-") and flag not in known else flag
        name, annotation = known.get(positive, (None, None))
        if name is None or (positive != flag and not _is(annotation, bool)):
            theirs = megatron_flags.find(flag, " ".join(given) or "true")
            if theirs is None:
                problems.append(f"{flag}: no such flag. Fix: {_flag_advice(flag, positive, known)}")
            elif theirs.problem:
                problems.append(theirs.problem)
            else:
                values[flag] = " ".join(given) or "true"
        elif _is(annotation, bool):
            values[name] = given[0] if given else str(positive == flag)
            problems += [
                f"{flag} {' '.join(given)}: takes no value. Fix: {positive} or --no-{positive[2:]}."
            ] * (len(given) > 1 or positive != flag and bool(given))
        elif _is(annotation, list):
            values[name] = given
        elif len(given) == 1:
            values[name] = given[0]
        else:
            problems.append(
                f"{flag} {' '.join(given)}: takes one value, got {len(given)}. Fix: give one."
            )
    if problems:
        raise ValueError("\n".join(problems))
    return values


def _flag_advice(flag: str, positive: str, known: dict) -> str:
    """What to do about an unknown flag; `positive` is the flag without its `no-`."""
    if positive in known:
        return f"leave it out; {positive} takes a value."
    return megatron_flags.advice(flag, list(known))


def _is(annotation: Any, kind: type) -> bool:
    """Does the annotation mean `kind`, `kind | None` or `list[...]` (for kind list)?"""
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_is(arg, kind) for arg in get_args(annotation))
    return annotation is kind or get_origin(annotation) is kind


def _preset(name: str) -> dict[str, str]:
    if not isinstance(name, str):
        raise ValueError(
            f"model = {name}: must be the name of a preset; settings are not nested. Fix: write the "
            "model's settings as keys of their own."
        )
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        raise ValueError(
            f"model = {name}: no such preset. Fix: one of {', '.join(PRESETS)}"
            + (f"; did you mean {near[0]}?" if near else ".")
        )
    return {"model": name} | {key: str(value) for key, value in PRESETS[name].items()}


class _TextLoader(yaml.BaseLoader):
    """Scalars as text; a key that stands twice in a mapping is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = [
            (key, key_node.start_mark.line + 1)
            for (key_node, _), key in zip(node.value, keys, strict=True)
            if keys.count(key) > 1
        ]
        if twice:
            lines = " and ".join(str(line) for _, line in twice)
            raise ValueError(
                f"{self.name}: {twice[0][0]}: stands twice, in lines {lines}. Fix: keep one."
            )
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> dict[str, Any]:
    """The file's keys with every scalar as text: each field's own type decides what it means."""
    if not os.path.isfile(path):
        raise ValueError(f"config = {path}: no such file. Fix: give the path of a YAML file.")
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, Loader=_TextLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config = {path}: not valid YAML: {error}. Fix: mend the file.") from None
    if values in (None, ""):
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"config = {path}: must hold `key: value` lines, holds a {type(values).__name__}. "
            "Fix: one setting per line."
        )
    return values


def sections_of_config() -> dict[str, type]:
    """The sections by name; not the record of what was given."""
    return {name: cls for name, cls in get_type_hints(Config).items() if cls is not GivenSettings}


def field_table() -> dict[str, tuple[str, Any]]:
    """Every flat key -> (section, type), from the dataclasses themselves."""
    table = {}
    for section, cls in sections_of_config().items():
        for name, annotation in get_type_hints(cls, include_extras=True).items():
            assert name not in table, f"{name} is declared twice"
            table[name] = (section, annotation)
    return table


def from_flat(values: dict[str, Any], where: str, base: Config | None = None) -> Config:
    """A copy of `base` with the flat `values` set, each coerced by its field's type.

    Raises:
        ValueError: unknown keys and wrong types, all at once, each naming `where`.
    """
    table = field_table()
    base = base or Config()
    sections = {name: dataclasses.replace(getattr(base, name)) for name in sections_of_config()}
    settings = set(base.given.settings)
    theirs = dict(base.given.megatron)
    problems: list[str] = []
    for key, value in values.items():
        settings.add(key)
        if key == "phases":
            sections["schedule"].phases = _phases(value, where, problems)
            continue
        section, annotation = table.get(key, (None, None))
        if section is None:
            settings.discard(key)
            _take_megatron_key(key, value, where, theirs, problems)
            continue
        _try(
            lambda s=section, k=key, v=value, a=annotation: setattr(sections[s], k, coerce(v, a)),
            key,
            value,
            annotation,
            where,
            problems,
        )
    if problems:
        raise ValueError("\n".join(problems))
    return Config(**sections, given=GivenSettings(frozenset(settings), theirs))


def _take_megatron_key(key: str, value: Any, where: str, theirs: dict, problems: list[str]) -> None:
    """Put a flag of Megatron-LM into `theirs`, or say why it cannot be."""
    text = value if isinstance(value, str) else " ".join(map(str, value))
    given = megatron_flags.find(key, text)
    if given is None:
        problems.append(_unknown_key(key, field_table(), where))
    elif given.problem:
        problems.append(f"{where}: {given.problem}")
    else:
        theirs[key.removeprefix("--").replace("-", "_")] = given


def _phases(value: Any, where: str, problems: list[str]) -> list[PhaseConfig]:
    types_by_key = get_type_hints(PhaseConfig, include_extras=True)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        problems.append(
            f"{where}: phases: must be a list of mappings. Fix: one `- {{name: ..., ...}}` per phase."
        )
        return []
    if not value:
        problems.append(
            f"{where}: phases: the list is empty. Fix: give a phase, or remove the key."
        )
    phases = []
    for number, entry in enumerate(value):
        phase = PhaseConfig(name=f"phase{number}")
        place = f"{where}: phases[{number}]"
        for key, item in entry.items():
            if key not in types_by_key:
                problems.append(_no_key_of_a_phase(key, types_by_key, place))
                continue
            annotation = types_by_key[key]
            _try(
                lambda k=key, v=item, p=phase, a=annotation: setattr(p, k, coerce(v, a)),
                key,
                item,
                annotation,
                place,
                problems,
            )
        phases.append(phase)
    return phases


def _no_key_of_a_phase(key: str, known: Any, place: str) -> str:
    theirs = megatron_flags.find(key)
    if theirs is not None:
        return f"{place}: " + (
            theirs.problem or f"{key}: Megatron-LM's, says nothing of a phase. Fix: remove it."
        )
    if key not in field_table():
        return _unknown_key(key, known, place)
    fix = IN_TOKENS.get(key, "write it beside `phases:`, for the whole run")
    return f"{place}: {key}: is a setting of the run, no phase has its own. Fix: {fix}."


def _unknown_key(key: str, known: Any, where: str) -> str:
    switch = key.replace("-", "_").removeprefix("no_")
    _, annotation = field_table().get(switch, (None, None))
    is_switch_turned_off = not key.startswith(switch) and switch in known and _is(annotation, bool)
    fix = f"{switch}: false." if is_switch_turned_off else megatron_flags.advice(key, list(known))
    return f"{where}: {key}: no such setting. Fix: {fix}"


def _try(
    action: Callable[[], None],
    key: str,
    value: Any,
    annotation: Any,
    where: str,
    problems: list[str],
) -> None:
    """Do `action`; its ValueError becomes a problem that says what the key takes."""
    try:
        action()
    except ValueError as error:
        choices = _choices(annotation)
        alone = value[0] if isinstance(value, list) and len(value) == 1 else value
        fix = megatron_flags.fix_for_value(key, alone, choices)
        fix = fix or ("one of them" if choices else "give a value of that kind")
        problems.append(f"{where}: {key} = {value!r}: {error}. Fix: {fix}.")


def _choices(annotation: Any) -> tuple:
    """The values of a field that has a list of them, else none."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for part in get_args(annotation) if (found := _choices(part))), ())


def coerce(value: Any, annotation: Any) -> Any:
    """`value` (text, or a list of texts) as the type that a field declares.

    Raises:
        ValueError: it is not of that type.
    """
    if annotation is Tokens:
        return parse_tokens(_text(value))
    origin = get_origin(annotation)
    args = get_args(annotation)
    if origin is Annotated:
        return coerce(value, args[0])
    if origin in (Union, types.UnionType):
        inner = next(arg for arg in args if arg is not type(None))
        named = get_args(inner) if get_origin(inner) is Literal else ()
        if (
            isinstance(value, str)
            and value.lower() in ("null", "none", "~", "")
            and value not in named
        ):
            return None
        return coerce(value, inner)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"must be one of {', '.join(map(str, args))}")
        return value
    if origin is list:
        items = value if isinstance(value, list) else [value] if value else []
        if args[0] is int:  # "4 8" and "4,8" are two numbers
            items = [part for item in items for part in _text(item).replace(",", " ").split()]
        return [coerce(item, args[0]) for item in items]
    if annotation is bool:
        text = _text(value).lower()
        if text not in _TRUE + _FALSE:
            raise ValueError("must be true or false")
        return text in _TRUE
    if annotation in (int, float):
        text = _text(value).replace("_", "")
        kind = "a whole number" if annotation is int else "a number"
        try:
            return annotation(text)
        except ValueError:
            raise ValueError(f"must be {kind}") from None
    assert annotation is str, annotation
    return _text(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a single value, not a {type(value).__name__}")
    return value


def to_flat(config: Config) -> dict[str, Any]:
    """Every setting as a flat dict that `from_flat` reads back; unset ones are left out."""
    flat = {}
    for section in sections_of_config():
        for key, value in dataclasses.asdict(getattr(config, section)).items():
            if key == "phases":
                value = [{k: v for k, v in phase.items() if v is not None} for phase in value]
            if value not in (None, []):
                flat[key] = value
    return flat


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML text, one key per line."""
    return yaml.safe_dump(
        to_flat(config), sort_keys=False, default_flow_style=None, allow_unicode=True
    )


def read_config_yaml(path: str) -> Config:
    """A configuration written by `dump_yaml`."""
    return from_flat(_read_yaml(path), path)


def outcome_path() -> str | None:
    """The file in which launch/train.sh wants to read how the run ended."""
    return os.environ.get("ITHACA_OUTCOME_FILE")


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
