"""Answers to Megatron-LM's flags that are no settings here, from megatron_flags.yaml.

A flag is refused (it asks for something else than what is built), ignored with a warning (it
changes no number of the run), accepted in silence (it asks for what is so here anyway) or
translated into a setting.
"""

import functools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import yaml

from pretrain.config.near_names import nearest_name

TABLE_FILE = Path(__file__).with_suffix(".yaml")
PREFIXES = {"no-": "false", "disable-": "false", "enable-": "true"}
"""Prefix of a switch's name -> the value that the switch without it gets."""

Kind = Literal["refused", "ignored", "translated"]


@dataclass(frozen=True)
class Answer:
    """Holds what one entry of the table says about its flags."""

    kind: Kind
    flags: tuple[str, ...]
    """As Megatron-LM writes them, without `--`; `*` stands for the rest of a name."""
    accepts: tuple[str, ...]
    """Values that are already true here."""
    accepts_all: bool
    because: str
    fix: str

    def accepts_value(self, value: str) -> bool:
        """Return whether `value` asks for what is so here anyway; `null` asks for nothing."""
        if self.accepts_all or value.lower() in ("null", "~", ""):
            return True
        return any(_same(value, accepted) for accepted in self.accepts)


@dataclass(frozen=True)
class Given:
    """Holds a flag of Megatron-LM and the value that it was given."""

    flag: str
    """As it was written."""
    value: str
    """`true` or `false` for a switch, whichever way it was spelled."""
    answer: Answer

    @property
    def problem(self) -> str | None:
        """Why the run cannot start with this flag, as `name: rule. Fix: ...`; None = it can."""
        answer = self.answer
        if answer.kind != "refused" or answer.accepts_value(self.value):
            return None
        rule = "not here"
        # A flag that may be false is simply not there.
        if answer.accepts not in ((), ("false",)):
            rule = f"here it is always {' or '.join(answer.accepts)}"
        return f"{self.flag}: Megatron-LM's, {rule}: {answer.because}. Fix: {answer.fix}."

    @property
    def warning(self) -> str | None:
        """What the flag does not do; None = it does what it says."""
        if self.answer.kind != "ignored" or self.answer.accepts_value(self.value):
            return None
        return f"{self.flag}: Megatron-LM's, has no effect here: {self.answer.because}"


@functools.cache
def table() -> tuple[Answer, ...]:
    """Return all entries, in the order of the file."""
    entries = _read_table()
    kinds: tuple[Kind, ...] = ("refused", "ignored", "translated")
    return tuple(_answer(kind, entry) for kind in kinds for entry in entries[kind])


@functools.cache
def synonyms() -> dict[str, str]:
    """Return words of other programs, with hyphens -> the flag that is meant."""
    return {
        word: flag for flag, words in _read_table()["synonyms"].items() for word in words.split()
    }


@functools.cache
def values() -> dict[str, dict[str, str]]:
    """Return setting -> values of Megatron-LM that are none here -> what to give instead."""
    return _read_table()["values"]


def fix_for_value(setting: str, value: object, choices: tuple) -> str | None:
    """Return what to give where `value` is none of `choices`; None without an idea."""
    theirs = values().get(setting, {}).get(str(value))
    if theirs is not None:
        return theirs
    # Another case, or a near miss.
    names = [str(choice) for choice in choices]
    near = [name for name in names if name.lower() == str(value).lower()]
    return near[0] if near else nearest_name(str(value), names)


def _read_table() -> dict:
    return yaml.load(TABLE_FILE.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def _answer(kind: Kind, entry: dict) -> Answer:
    accepts = entry.get("accepts", [])  # a list of values, or "any"
    accepts_all = accepts == "any"
    return Answer(
        kind=kind,
        flags=tuple(entry["flags"].split()),
        accepts=() if accepts_all else tuple(accepts),
        accepts_all=accepts_all,
        because=entry["because"],
        fix=entry.get("fix", "remove it"),
    )


def find(name: str, value: str = "true") -> Given | None:
    """Return the answer to a flag or key of Megatron-LM's; None where it has none of this name.

    Args:
        name: with hyphens or underscores, with or without `--` before it.
        value: what was given with it; a switch alone means `true`.
    """
    word = name.removeprefix("--").replace("_", "-")
    # The name itself, or a switch under one of its negated or affirmed spellings.
    answer = _find_entry(word)
    given = value
    for prefix, switched in PREFIXES.items():
        if answer is None and word.startswith(prefix):
            answer = _find_entry(word.removeprefix(prefix))
            given = switched if _same(value, "true") else _opposite(switched)
    if answer is None:
        return None
    shown = name if value == "true" else f"{name} = {value}"
    return Given(shown, given, answer)


def _find_entry(word: str) -> Answer | None:
    """Return the entry that has the word itself, or else the longest pattern that it matches."""
    matches = [
        (pattern == word, len(pattern), answer)
        for answer in table()
        for pattern in answer.flags
        if fnmatchcase(word, pattern)
    ]
    return max(matches, key=lambda match: match[:2])[2] if matches else None


def _opposite(switched: str) -> str:
    return "false" if switched == "true" else "true"


def _same(value: str, accepted: str) -> bool:
    """Return whether two spellings mean one value: of a switch, a number or a word."""
    if value.lower() == accepted.lower():
        return True
    words = {"true": ("yes", "on", "1"), "false": ("no", "off", "0", "none", "null")}
    if accepted in words:
        return value.lower() in words[accepted]
    try:
        return float(value) == float(accepted)
    except ValueError:
        return False


def advice(name: str, known: list[str]) -> str:
    """Say what to do about a name that is neither a setting nor one of Megatron-LM's.

    Args:
        name: as it was written.
        known: names of settings, written in the same way (`--lr` for a flag, `lr` for a key).
    """
    word = name.removeprefix("--").replace("_", "-")
    is_flag = name.startswith("--")
    # A word of another program.
    if word in synonyms():
        meant = synonyms()[word]
        return f"{meant if is_flag else meant.removeprefix('--').replace('-', '_')}."
    # A near miss of a name here or of one of Megatron-LM's.
    written = "--{}" if is_flag else "{}"
    theirs = [
        written.format(flag if is_flag else flag.replace("-", "_"))
        for answer in table()
        for flag in answer.flags
        if "*" not in flag
    ]
    spelled = name if is_flag else name.replace("-", "_")
    near = nearest_name(spelled, [*known, *theirs])
    if near is None:
        return "see --help." if is_flag else "remove it."
    text = f"did you mean {near}?"
    if near in known:
        return text
    # One of Megatron-LM's: say what it would come to.
    given = find(near)
    assert given is not None, "the names are those of the table"
    return f"{text} {given.problem or given.warning or 'It is accepted, and always so here.'}"
