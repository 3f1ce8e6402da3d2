"""The command line as a flat dict of texts; what they mean is decided as for a YAML file."""

import shlex
from dataclasses import dataclass, field
from typing import Any

from pretrain.config import megatron_flags
from pretrain.config.coerce import takes
from pretrain.config.flat import field_table

# Flags with a second spelling that scripts use.
ALIASES = {"--ds-sequence-parallel-size": "--context-parallel-size"}


def spell(argv: list[str]) -> list[str]:
    """Put hyphens into the names of flags, and replace known aliases."""
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


@dataclass
class _Found:
    """What was read so far."""

    values: dict[str, str | list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_flags(argv: list[str]) -> dict[str, Any]:
    """Return flags as a flat dict of texts, `config` among them; the last of a repeated flag wins.

    Raises:
        ValueError: unknown flags, stray words, missing values and lists that are given twice, all
        at once, with the nearest flag.
    """
    types_by_key = {name: annotation for name, (_, annotation) in field_table().items()}
    del types_by_key["phases"]  # YAML only
    types_by_key["config"] = str
    known = {
        "--" + name.replace("_", "-"): (name, annotation)
        for name, annotation in types_by_key.items()
    }
    found = _Found()
    at = 0
    while at < len(argv):
        flag, equals, attached = argv[at].partition("=")
        at += 1
        # Its words: what is behind "=", or everything up to the next flag.
        given = [attached] if equals else []
        while not equals and at < len(argv) and not argv[at].startswith("--"):
            given.append(argv[at])
            at += 1
        _take(flag, given, known, found)
    if found.problems:
        raise ValueError("\n".join(found.problems))
    return found.values


def _take(flag: str, given: list[str], known: dict[str, tuple[str, Any]], found: _Found) -> None:
    """Put one flag with its words into `found`, or say what is wrong with it."""
    is_negated = flag.startswith("--no-") and flag not in known
    positive = "--" + flag.removeprefix("--no-") if is_negated else flag
    words = " ".join(given)
    if positive not in known or (is_negated and not takes(known[positive][1], bool)):
        _take_unknown(flag, positive, words, known, found)
        return
    name, annotation = known[positive]
    if takes(annotation, bool):
        found.values[name] = given[0] if given else str(not is_negated)
        if len(given) > 1 or (is_negated and given):
            fix = f"{positive} or --no-{positive[2:]}"
            found.problems.append(f"{flag} {words}: takes no value. Fix: {fix}.")
    elif takes(annotation, list):
        _take_list(flag, name, given, found)
    elif len(given) == 1:
        found.values[name] = given[0]
    else:
        found.problems.append(f"{flag} {words}: takes one value, got {len(given)}. Fix: give one.")


def _take_list(flag: str, name: str, given: list[str], found: _Found) -> None:
    """Put a list into `found`; given twice, its first values would be lost without a word."""
    before = found.values.setdefault(name, given)
    if before is not given:
        fix = f"give it once; the first was {flag} {shlex.join(before)}"
        found.problems.append(f"{flag} {' '.join(given)}: is given twice. Fix: {fix}.")


def _take_unknown(
    flag: str, positive: str, words: str, known: dict[str, tuple[str, Any]], found: _Found
) -> None:
    """Answer a flag that is no setting here: one of Megatron-LM's, or an error."""
    theirs = megatron_flags.find(flag, words or "true")
    if theirs is not None and theirs.problem:
        found.problems.append(theirs.problem)
    elif theirs is not None:
        found.values[flag] = words or "true"
    elif positive in known:  # --no- before a setting that is no switch
        found.problems.append(f"{flag}: no such flag. Fix: leave it out; {positive} takes a value.")
    else:
        advice = _advice_on_word(flag, list(known))
        found.problems.append(f"{flag}: no such flag. Fix: {advice}")


def _advice_on_word(word: str, known: list[str]) -> str:
    """Say what to do about a word that is no flag: nearly one, or one without its dashes."""
    if word.endswith((".yaml", ".yml")) and not word.startswith("-"):
        return f"did you mean --config {shlex.quote(word)}?"
    return megatron_flags.advice("--" + word.lstrip("-"), known)
