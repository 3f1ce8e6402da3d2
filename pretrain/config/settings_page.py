"""Make SETTINGS.md: every setting with its type, its default, and what may be changed where."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

from pretrain.checkpointing.setting_changes import kind_of
from pretrain.config.config import section_types
from pretrain.config.facts import Resume, facts_of
from pretrain.config.page_parts import (
    TITLES,
    docstrings_of_fields,
    make_row,
    show_default,
    values_of,
)
from pretrain.config.phase_config import PhaseConfig

SETTINGS_PAGE = Path(__file__).with_name("SETTINGS.md")
HEAD = """# Settings

Written by `python -m pretrain.config.flags_page` from the settings' own declarations; edit those.

Every setting of a run, by section: its key in the YAML file, which is its flag with hyphens
([FLAGS.md](FLAGS.md) tells more of each, and of Megatron-LM's flags). **phase**: an entry of
`phases:` may say it for itself. **continuing**: may it change when a run goes on from a checkpoint?

| continuing | |
| --- | --- |
| yes | no token and no update changes |
| as it acts | judged by what it does to the phase, learning rate, tokenizer or data |
| no | the checkpoint's tensors would not fit |
| data, optimization | only with `--accept-changes` and this word |
| scheduler | only with `--override-opt_param-scheduler` or `--accept-changes optimization` |
"""
MAY_CHANGE: dict[Resume, str] = {"free": "yes", "effect": "as it acts", "forbidden": "no"}
"""Kind of a setting -> its words in the column "continuing", where they are not the kind itself."""


def make_settings_page() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for section, cls in section_types().items():
        parts.append(f"## {TITLES[section]}\n\n" + "\n".join(_rows(section, cls)) + "\n")
    parts.append(_keys_of_phases_only())
    return "\n".join(parts)


def _rows(section: str, cls: type) -> Iterator[str]:
    """Yield the table of a section, a row for each setting."""
    explanations = docstrings_of_fields(cls)
    hints = get_type_hints(cls, include_extras=True)
    yield "| setting | values | default | phase | continuing | |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for declared in dataclasses.fields(cls):
        name = declared.name
        # Its entries have a table of their own.
        is_list_of_phases = name == "phases"
        # Its own, or that of its section.
        kind = kind_of(section, name)
        yield make_row(
            [
                f"`{name}`",
                "mappings ..." if is_list_of_phases else values_of(hints[name]),
                show_default(declared),
                "yes" if facts_of(declared).per_phase else "",
                MAY_CHANGE.get(kind, kind),
                first_sentence(explanations[name]),
            ]
        )


def _keys_of_phases_only() -> str:
    """Return the table of keys that an entry of `phases:` has and the run has not."""
    explanations = docstrings_of_fields(PhaseConfig)
    hints = get_type_hints(PhaseConfig, include_extras=True)
    settings = {name for cls in section_types().values() for name in get_type_hints(cls)}
    # All other keys of a phase are settings that a table above marks.
    lines = ["## Keys of a phase only", "", "| key | values | |", "| --- | --- | --- |"]
    for name, text in explanations.items():
        if name not in settings:
            lines.append(make_row([f"`{name}`", values_of(hints[name]), first_sentence(text)]))
    return "\n".join([*lines, ""])


def first_sentence(text: str) -> str:
    """Return the first sentence of an explanation."""
    # A full stop inside a number or a name (config.json) has no space behind it.
    return re.split(r"(?<=\.) ", text, maxsplit=1)[0].rstrip(".") + "."
