"""Write FLAGS.md, the reference of all flags, from the dataclasses and from megatron_flags.yaml.

`python -m pretrain.config.flags_page` writes it, SETTINGS.md and FROM_DEEPSPEED.md beside it.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_type_hints

from pretrain.config import megatron_flags
from pretrain.config.config import section_types
from pretrain.config.deepspeed_page import DEEPSPEED_PAGE, make_deepspeed_page
from pretrain.config.effects import CONDITIONS, NEEDS_SIZE
from pretrain.config.facts import facts_of
from pretrain.config.page_parts import (
    TITLES,
    docstrings_of_fields,
    make_row,
    show_default,
    show_flag,
    values_of,
)
from pretrain.config.settings_page import SETTINGS_PAGE, make_settings_page

PAGE = Path(__file__).with_name("FLAGS.md")
HEAD = """# Flags

Written by `python -m pretrain.config.flags_page` from the settings' own declarations; edit those.

A setting, a key of the YAML file and a flag are one name: `seq_length: 8Ki` in the file is
`--seq-length 8Ki`. Hyphens and underscores mean the same in flags; flags win over the run's keys
of the file, these over a preset (`--model`), and a phase's own keys over all (a flag that a phase
does not take is warned of). A switch is turned off by `--no-...`. Counts of tokens take K, M, B,
T (powers of ten), Ki and Mi. **phase** marks what an entry of `phases:` may say for itself. A
setting that is given and cannot act is warned of.
"""
MEGATRON = """## Flags of Megatron-LM

Its launch scripts run here with every flag accepted or answered by name; `*` stands for the rest of
a name. The settings above have Megatron-LM's own names where it has them, and are not repeated.
"""


def make_page() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for section, cls in section_types().items():
        parts.append(f"## {TITLES[section]}\n\n" + "\n".join(_setting_rows(cls)) + "\n")
    # Then the flags of Megatron-LM by the answer that they get.
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
    """Yield the table of a section, a row for each setting."""
    explanations = docstrings_of_fields(cls)
    hints = get_type_hints(cls, include_extras=True)
    yield "| flag | values | default | |"
    yield "| --- | --- | --- | --- |"
    for field in dataclasses.fields(cls):
        if field.name == "phases":  # YAML only
            continue
        notes = [explanations[field.name].rstrip(".") + "."]
        # When it acts, and where, behind what it means.
        notes += [f"No effect{text}." for text in _conditions(field.name)]
        if facts_of(field).per_phase:
            notes.append("**phase**")
        cells = [
            show_flag(field.name),
            values_of(hints[field.name]),
            show_default(field),
            " ".join(notes),
        ]
        yield make_row(cells)


def _conditions(name: str) -> list[str]:
    """Return what a setting needs to act, as ends of "No effect ..."."""
    # The warnings tell of a given run, the page of any.
    texts = [condition.otherwise for condition in CONDITIONS.get(name, ())]
    texts = [text.replace(", since", " where") for text in texts]
    if name in NEEDS_SIZE:
        texts.append(f" without {NEEDS_SIZE[name]} above 1")
    return texts


def _accepted(answers: list[megatron_flags.Answer]) -> str:
    """Return the table of flags that some values are accepted for."""
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
        # Any other value than those that are so here anyway.
        otherwise = "an error" if answer.kind == "refused" else "a warning"
        cells = [
            _flags(answer.flags),
            values,
            "" if answer.accepts_all else otherwise,
            answer.because,
        ]
        lines.append(make_row(cells))
    note = "`false` is the flag with `no-` or `disable-` before it."
    return "\n".join([*lines, "", note, ""])


def _answers(title: str, kind: str, answers: Iterable[megatron_flags.Answer]) -> str:
    """Return the table of flags that get the same kind of answer; errors have a third column."""
    is_error = kind == "refused"
    head = ["| flags | because | do |", "| --- | --- | --- |"]
    lines = [f"### {title}", "", *(head if is_error else ["| flags | |", "| --- | --- |"])]
    for answer in answers:
        if answer.kind == kind:
            cells = [_flags(answer.flags), answer.because]
            lines.append(make_row([*cells, answer.fix] if is_error else cells))
    return "\n".join([*lines, ""])


def _values() -> str:
    """Return the table of Megatron-LM's values that a setting here does not have."""
    # One row for each value.
    lines = [
        "### Values that are none here",
        "",
        "| setting | value | give |",
        "| --- | --- | --- |",
    ]
    for setting, theirs in megatron_flags.values().items():
        lines += [
            make_row([show_flag(setting), f"`{value}`", fix]) for value, fix in theirs.items()
        ]
    return "\n".join([*lines, ""])


def _synonyms() -> str:
    """Return the table of other programs' words for our flags."""
    # Several words mean one flag: a row for each flag.
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
    lines += [make_row([f"`{flag}`", ", ".join(found)]) for flag, found in words.items()]
    return "\n".join([*lines, ""])


def _flags(names: Iterable[str]) -> str:
    """Return flags of Megatron-LM as a cell."""
    return ", ".join(f"`--{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
    SETTINGS_PAGE.write_text(make_settings_page(), encoding="utf-8")
    DEEPSPEED_PAGE.write_text(make_deepspeed_page(), encoding="utf-8")
