"""Differences between the settings of a checkpoint and of a run, and the kind of each.

A setting declares its kind where it is declared itself (`resume=` in its field's metadata), or has
that of its section in pretrain/config/config.py: Config. Settings of kind "effect" say something
together with others: the difference is reported, and what they do to the phase, the learning rate,
the tokenizer or the blend is judged instead.
"""

import dataclasses
import functools
import os
from dataclasses import dataclass
from typing import Any

from data.config import are_named
from pretrain.config.config import Config, section_types
from pretrain.config.effects import can_act
from pretrain.config.facts import Resume, facts_of_section
from pretrain.config.phase_config import PhaseConfig

EFFECTIVE = {
    "kv_channels": "head_size",
    "num_query_groups": "num_kv_heads",
    "mup_base_hidden_size": "base_hidden_size",
}
"""Settings that have a default -> the property of what they come to."""
MEANINGS = {
    "optimizer": "the checkpoint's moments are of another optimizer, and would start at zero",
}
"""Setting -> what a change means, where its kind does not say it all."""
MAX_VALUE_CHARACTERS = 160
"""Characters of a value that a message shows."""


@dataclass(frozen=True)
class Change:
    """A difference between checkpoint and run."""

    name: str
    theirs: Any
    ours: Any
    kind: Resume
    meaning: str = ""
    """What it means, where the kind does not say it all."""
    fix: str = ""
    """What to do about it, where the kind does not say it all."""

    def __str__(self) -> str:
        return f"{self.name}: checkpoint {_short(self.theirs)}, run {_short(self.ours)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[:MAX_VALUE_CHARACTERS]}..."


def kind_of(section: str, name: str) -> Resume:
    """Return the kind of a setting: its own, or that of its section.

    Raises:
        KeyError: neither declares one.
    """
    # A name that is not declared in the section has the section's kind.
    facts = facts_of_section(section_types()[section])
    own = facts[name].resume if name in facts else None
    kind = own or facts_of_section(Config)[section].resume
    if kind is None:
        raise KeyError(f"{section}.{name} does not declare what a change means (resume=...)")
    return kind


@functools.cache
def path_settings() -> frozenset[str]:
    """Return the names of the settings that name files."""
    return frozenset(
        name
        for section in section_types().values()
        for name, facts in facts_of_section(section).items()
        if facts.is_path
    )


def is_same(name: str, theirs: Any, ours: Any) -> bool:
    """Return whether two values of a setting mean the same.

    Another spelling of a path does; relative paths begin where the run starts.
    """
    if theirs == ours or name not in path_settings() or theirs is None or ours is None:
        return theirs == ours
    # A path alone, or the words of a blend.
    if isinstance(theirs, str):
        return os.path.abspath(theirs) == os.path.abspath(ours)
    return [_plain_word(word) for word in theirs] == [_plain_word(word) for word in ours]


def _plain_word(word: str) -> float | str:
    """Return a word of a blend: a weight as a number, a path in full, also that of NAME=PATH."""
    try:
        return float(word)
    except ValueError:
        if not are_named([word]):
            return os.path.abspath(word)
    name, _, path = word.partition("=")
    return f"{name}={os.path.abspath(path)}"


def setting_changes(stored: Config, config: Config) -> list[Change]:
    """List the settings that differ, section by section, by their kind.

    Those whose effect is judged elsewhere ("effect") are "free" here. A setting that does nothing
    in either run (pretrain/config/effects.py) is no difference.
    """
    found = []
    for section in section_types():
        theirs = getattr(stored, section)
        ours = getattr(config, section)
        for declared in dataclasses.fields(ours):
            name = declared.name
            # A default and the same value given are no difference.
            before = getattr(theirs, EFFECTIVE.get(name, name))
            now = getattr(ours, EFFECTIVE.get(name, name))
            kind = kind_of(section, name)
            if name == "phases":
                found += _entry_changes(before, now)
            elif not is_same(name, before, now) and _acts_in_either(name, stored, config):
                effective: Resume = "free" if kind == "effect" else kind
                found.append(Change(name, before, now, effective, MEANINGS.get(name, "")))
    return found


def _acts_in_either(name: str, stored: Config, config: Config) -> bool:
    """Return whether a setting does something in one of two configurations, or in both."""
    return can_act(stored, name) or can_act(config, name)


def _entry_changes(theirs: list[PhaseConfig], ours: list[PhaseConfig]) -> list[Change]:
    """List the differences of the entries of `phases`, by their names."""
    before = {entry.name: entry for entry in theirs}
    now = {entry.name: entry for entry in ours}
    found = []
    for name in dict.fromkeys([*before, *now]):
        if name in before and name in now:
            found += [
                Change(f"phases, {name}: {key}", value, getattr(now[name], key), "free")
                for key, value in vars(before[name]).items()
                if not is_same(key, value, getattr(now[name], key))
            ]
        else:  # a phase that came, or went
            was_there = "there" if name in before else "absent"
            is_there = "there" if name in now else "absent"
            found.append(Change(f"phases, {name}", was_there, is_there, "free"))
    return found


def vocabulary_changes(stored: Config, config: Config) -> list[Change]:
    """List a difference of the vocabulary, or of the embedding's rows; at most one."""
    theirs = stored.data.vocab_size
    ours = config.data.vocab_size
    assert theirs is not None and ours is not None, "the tokenizer has said it"
    rows_before = stored.model.padded_vocab_size(theirs)
    rows_now = config.model.padded_vocab_size(ours)
    # The same ids in other rows of padding: cut or filled with zeros.
    if theirs == ours:
        if rows_before == rows_now:
            return []
        name = "rows of the embedding, padding included"
        return [Change(name, rows_before, rows_now, "free")]
    if rows_before == rows_now:  # ids were added or taken away within the padding
        fix = f"--vocab-size {theirs}, or --accept-changes tokenizer"
        return [Change("vocab_size", theirs, ours, "tokenizer", fix=fix)]
    return [
        Change(
            "vocab_size",
            theirs,
            ours,
            "forbidden",
            f"the checkpoint's embedding has {rows_before:,} rows, this run's {rows_now:,}",
            f"--vocab-size {theirs}, where the tokenizer has no more ids; or a new run in another "
            "--save",
        )
    ]
