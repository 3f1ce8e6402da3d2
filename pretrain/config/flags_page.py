"""Write FLAGS.md, the reference of all flags, from the dataclasses and from megatron_flags.yaml.

`python -m pretrain.config.flags_page` writes the page beside this file.
"""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pretrain.config import megatron_flags
from pretrain.config.effects import CONDITIONS, NEEDS_SIZE
from pretrain.config.load import sections_of_config
from pretrain.config.phase_config import PhaseConfig
from pretrain.config.token_count import Tokens

PAGE = Path(__file__).with_name("FLAGS.md")
HEAD = """# Flags

Written by `python -m pretrain.config.flags_page` from the settings' own declarations; edit those.

A setting, a key of the YAML file and a flag are one name: `seq_length: 8Ki` in the file is
`--seq-length 8Ki`. Hyphens and underscores mean the same in flags; flags win over the file, the
file over a preset (`--model`). A switch is turned off by `--no-...`. Counts of tokens take K, M, B,
T (powers of ten), Ki and Mi. **phase** marks what an entry of `phases:` may say for itself. A
setting that is given and cannot act is warned of.
"""
TITLES = {
    "model": "Model",
    "memory": "Memory of activations",
    "layout": "Layout",
    "data": "Data and tokenizer",
    "schedule": "Schedule",
    "optimizer": "Optimizer and learning rate",
    "checkpoint": "Checkpoints",
    "logging": "Logging and evaluation",
}
MEGATRON = """## Flags of Megatron-LM

Its launch scripts run here with every flag accepted or answered by name; `*` stands for the rest of
a name. The settings above have Megatron-LM's own names where it has them, and are not repeated.
"""


def make_page() -> str:
    """The whole page."""
    parts = [HEAD]
    for section, cls in sections_of_config().items():
        parts.append(f"## {TITLES[section]}\n\n" + "\n".join(_setting_rows(cls)) + "\n")
    parts.append(MEGATRON)
    answers = megatron_flags.table()
    with_values = [answer for answer in answers if answer.accepts or answer.accepts_all]
    others = [answer for answer in answers if answer not in with_values]
    parts.append(_accepted(with_values))
    parts.append(_answers("Ignored, with a warning", "ignored", others))
    parts.append(_answers("Not here: an error that says why", "refused", others))
    parts.append(_answers("Translated", "translated", others))
    parts.append(_values())
    parts.append(_synonyms())
    return "\n".join(parts)


def _setting_rows(cls: type) -> Iterator[str]:
    explanations = docstrings_of_fields(cls)
    hints = get_type_hints(cls, include_extras=True)
    per_phase = {field.name for field in dataclasses.fields(PhaseConfig)}
    yield "| flag | values | default | |"
    yield "| --- | --- | --- | --- |"
    for field in dataclasses.fields(cls):
        if field.name == "phases":
            continue
        notes = [explanations[field.name].rstrip(".") + "."]
        notes += [f"No effect{text}." for text in _conditions(field.name)]
        if field.name in per_phase:
            notes.append("**phase**")
        cells = [_flag(field.name), values_of(hints[field.name]), _default(field), " ".join(notes)]
        yield _row(cells)


def _conditions(name: str) -> list[str]:
    """What a setting needs to act, as ends of "No effect ..."."""
    texts = [condition.otherwise for condition in CONDITIONS.get(name, ())]
    texts = [text.replace(", since", " where") for text in texts]
    if name in NEEDS_SIZE:
        texts.append(f" without {NEEDS_SIZE[name]} above 1")
    return texts


def docstrings_of_fields(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass, those of its bases included, on one line."""
    found = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for statement, after in zip(definition.body, definition.body[1:], strict=False):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and is_text:
                found[statement.target.id] = " ".join(after.value.value.split())
    return found


def values_of(annotation: Any) -> str:
    """What a field takes, in words."""
    if annotation is Tokens:
        return "tokens"
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return values_of(arguments[0])
    if origin in (Union, UnionType):
        return values_of(next(argument for argument in arguments if argument is not type(None)))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"{values_of(arguments[0])} ..."
    return {bool: "switch", int: "number", float: "number", str: "text"}[annotation]


def _default(field: dataclasses.Field) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory()
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == []:
        return ""
    return f"`{' '.join(map(str, value))}`" if isinstance(value, list) else f"`{value}`"


def _accepted(answers: list[megatron_flags.Answer]) -> str:
    lines = [
        "### Accepted at values that are so here anyway",
        "",
        "| flags | values | another value | because |",
        "| --- | --- | --- | --- |",
    ]
    for answer in answers:
        values = (
            "any" if answer.accepts_all else ", ".join(f"`{value}`" for value in answer.accepts)
        )
        otherwise = "an error" if answer.kind == "refused" else "a warning"
        cells = [
            _flags(answer.flags),
            values,
            "" if answer.accepts_all else otherwise,
            answer.because,
        ]
        lines.append(_row(cells))
    note = "`false` is the flag with `no-` or `disable-` before it."
    return "\n".join([*lines, "", note, ""])


def _answers(title: str, kind: str, answers: Iterable[megatron_flags.Answer]) -> str:
    is_error = kind == "refused"
    head = ["| flags | because | do |", "| --- | --- | --- |"]
    lines = [f"### {title}", "", *(head if is_error else ["| flags | |", "| --- | --- |"])]
    for answer in answers:
        if answer.kind == kind:
            cells = [_flags(answer.flags), answer.because]
            lines.append(_row([*cells, answer.fix] if is_error else cells))
    return "\n".join([*lines, ""])


def _values() -> str:
    lines = [
        "### Values that are none here",
        "",
        "| setting | value | give |",
        "| --- | --- | --- |",
    ]
    for setting, theirs in megatron_flags.values().items():
        lines += [_row([_flag(setting), f"`{value}`", fix]) for value, fix in theirs.items()]
    return "\n".join([*lines, ""])


def _synonyms() -> str:
    words: dict[str, list[str]] = {}
    for word, flag in megatron_flags.synonyms().items():
        words.setdefault(flag, []).append(f"`--{word}`")
    lines = [
        "## Words of other programs",
        "",
        "They are no flags here; the error names the one that is.",
        "",
        "| flag | words |",
        "| --- | --- |",
    ]
    lines += [_row([f"`{flag}`", ", ".join(found)]) for flag, found in words.items()]
    return "\n".join([*lines, ""])


def _flag(name: str) -> str:
    return f"`--{name.replace('_', '-')}`"


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"`--{name}`" for name in names)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
