"""Answers to Megatron-LM's flags that are no settings here, from megatron_flags.yaml.

A flag is refused (it asks for something else than what is built), ignored with a warning (it
changes no number of the run), accepted in silence (it asks for what is so here anyway) or
translated into a setting.
"""

import difflib
import functools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import yaml

TABLE_FILE = Path(__file__).with_suffix(".yaml")
PREFIXES = {"no-": "false", "disable-": "false", "enable-": "true"}
"""Beginnings of a switch's name -> the value that the switch without them gets."""
LIKE = 0.84
"""Least likeness (difflib's ratio) of a near miss: below it, a suggestion may do harm."""

Kind = Literal["refused", "ignored", "translated"]


@dataclass(frozen=True)
class Answer:
    """What one entry of the table says about its flags."""

    kind: Kind
    flags: tuple[str, ...]
    """As Megatron-LM writes them, without `--`; `*` stands for the rest of a name."""
    accepts: tuple[str, ...]
    """Values that are already true here."""
    accepts_all: bool
    because: str
    fix: str

    def accepts_value(self, value: str) -> bool:
        """Does `value` ask for what is so here anyway? A YAML file's `null` asks for nothing."""
        if self.accepts_all or value.lower() in ("null", "~", ""):
            return True
        return any(_same(value, accepted) for accepted in self.accepts)


@dataclass(frozen=True)
class Given:
    """A flag of Megatron-LM with the value that it was given."""

    flag: str
    """As it was written."""
    value: str
    """`true` or `false` for a switch, whichever way it was spelled."""
    answer: Answer

    @property
    def problem(self) -> str | None:
        """Why the run cannot start with this flag, as `name: rule. Fix: ...`."""
        answer = self.answer
        if answer.kind != "refused" or answer.accepts_value(self.value):
            return None
        rule = "not here"
        if answer.accepts not in ((), ("false",)):
            rule = f"here it is always {' or '.join(answer.accepts)}"
        return f"{self.flag}: Megatron-LM's, {rule}: {answer.because}. Fix: {answer.fix}."

    @property
    def warning(self) -> str | None:
        """What the flag does not do."""
        if self.answer.kind != "ignored" or self.answer.accepts_value(self.value):
            return None
        return f"{self.flag}: Megatron-LM's, has no effect here: {self.answer.because}"


@functools.cache
def table() -> tuple[Answer, ...]:
    """All entries, in the order of the file."""
    entries = _read_table()
    kinds: tuple[Kind, ...] = ("refused", "ignored", "translated")
    return tuple(_answer(kind, entry) for kind in kinds for entry in entries[kind])


@functools.cache
def synonyms() -> dict[str, str]:
    """Words of other programs, with hyphens -> the flag that is meant."""
    return {
        word: flag for flag, words in _read_table()["synonyms"].items() for word in words.split()
    }


@functools.cache
def values() -> dict[str, dict[str, str]]:
    """Setting -> Megatron-LM's values of it that are none here -> what to give instead."""
    return _read_table()["values"]


def fix_for_value(setting: str, value: object, choices: tuple) -> str | None:
    """What to give where `value` is none of the setting's `choices`; None without an idea."""
    theirs = values().get(setting, {}).get(str(value))
    if theirs is not None:
        return theirs
    near = [str(choice) for choice in choices if str(choice).lower() == str(value).lower()]
    near += difflib.get_close_matches(str(value), map(str, choices), 1, LIKE)
    return near[0] if near else None


def _read_table() -> dict:
    return yaml.load(TABLE_FILE.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def _answer(kind: Kind, entry: dict) -> Answer:
    accepts = entry.get("accepts", [])
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
    """The answer to a flag or key of Megatron-LM's; None where Megatron-LM has none of this name.

    Args:
        name: with hyphens or underscores, with or without `--` before it.
        value: what was given with it; a switch alone means `true`.
    """
    word = name.removeprefix("--").replace("_", "-")
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
    """The entry that has the word itself, or else the longest pattern that it matches."""
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
    """What to do about a name that is neither a setting nor one of Megatron-LM's.

    Args:
        name: as it was written.
        known: names of settings, written in the same way (`--lr` for a flag, `lr` for a key).
    """
    word = name.removeprefix("--").replace("_", "-")
    is_flag = name.startswith("--")
    if word in synonyms():
        meant = synonyms()[word]
        return f"{meant if is_flag else meant.removeprefix('--').replace('-', '_')}."
    written = "--{}" if is_flag else "{}"
    theirs = [
        written.format(flag if is_flag else flag.replace("-", "_"))
        for answer in table()
        for flag in answer.flags
        if "*" not in flag
    ]
    spelled = name if is_flag else name.replace("-", "_")
    near = difflib.get_close_matches(spelled, [*known, *theirs], 1, LIKE)
    if not near:
        return "see --help." if is_flag else "remove it."
    text = f"did you mean {near[0]}?"
    if near[0] in known:
        return text
    given = find(near[0])
    return f"{text} {given.problem or given.warning or 'It is accepted, and always so here.'}"
