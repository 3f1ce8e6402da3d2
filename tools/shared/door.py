"""What the commands share: reading their arguments, and refusing bad input in one line each.

A door of tools/ is a dataclass of arguments and a function that acts on them; `run_door` does the
rest. Exit codes: 0, what the function returns, 2 for bad input, 130 after Ctrl-C, 141 where nobody
reads the output any more.
"""

import contextlib
import io
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import tyro

from pretrain.config.near_names import nearest_name
from tools.shared.command_names import command_of

Arguments = TypeVar("Arguments")

STDOUT = 1
"""File descriptor of the standard output."""
READER_GONE = 141
"""Exit code where the output's reader has gone: a shell's own of SIGPIPE."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: a shell's own of SIGINT."""

_HELP = ("-h", "--help")
"""Flags that print the help."""
_OF_TYRO = ("--tyro-print-completion", "--tyro-write-completion")
"""Flags that tyro adds to every command."""
_SWITCH_VALUES = ("True", "False", "None")
"""Values of a switch with three states, as tyro spells them."""
_LID = "╭"
_SIDES = "│ "
_RULES = "─-"
"""What tyro draws above, beside and between parts of a message; "-" where stdout is no UTF-8."""


def run_door(
    kind: type[Arguments],
    act: Callable[[Arguments], int | None],
    *,
    name: str,
    description: str | None,
    argv: Sequence[str] | None = None,
) -> int:
    """Read a command's arguments and act on them -> the exit code.

    Args:
        kind: the dataclass of the arguments.
        act: does the work; returns an exit code, or None for 0.
        name: the module of the command, like `tools.generate`; messages name it as users call it.
        description: the text above the flags in --help.
        argv: the words of the command line; by default those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = read_arguments(kind, words, name=name, description=description)
        code = act(arguments) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _has_lost_reader():
            # What Python still holds for it goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
            return READER_GONE
        for line in str(error).splitlines() or [type(error).__name__]:
            print(f"error: {line}", file=sys.stderr)
        return 2


def _has_lost_reader() -> bool:
    """Tell whether who read the output, like `head`, has enough of it."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def warn(text: str) -> None:
    """Print a warning on standard error."""
    print(f"warning: {text}", file=sys.stderr)


def read_arguments(
    kind: type[Arguments], words: list[str], *, name: str, description: str | None
) -> Arguments:
    """Parse the words of a command line; --help prints and exits.

    Raises:
        ValueError: unknown or missing flags, all of them, a line each; or a value of another type.
    """
    help_fix = f"Fix: see {command_of(name)} --help."
    if not set(words) & set(_HELP):
        problems = _flag_problems(kind, words, help_fix)
        if problems:
            raise ValueError("\n".join(problems))
    words = spell_switches(kind, words)
    # tyro prints a box of several lines and exits: the message in it becomes an error like others.
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=command_of(name), description=description, args=words)
    except SystemExit as stop:
        if not stop.code:
            raise  # the help was printed
        raise ValueError(f"{_first_message(said.getvalue())} {help_fix}") from None


def split_words(kind: type, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the flags of `kind` with their values, and all other words.

    --help is of `kind`.
    """
    types = get_type_hints(kind)
    # Flag -> whether a value follows it.
    known = dict.fromkeys(_HELP, False)
    for field in fields(kind):
        takes_value = types[field.name] is not bool
        known |= dict.fromkeys(_spellings(kind, field), takes_value)
    own = []
    others = []
    place = 0
    while place < len(words):
        word = words[place]
        flag = _flag_of(word) if word.startswith("-") else ""
        part = own if flag in known else others
        count = 2 if known.get(flag) and "=" not in word else 1
        part += words[place : place + count]
        place += count
    return own, others


def _flag_problems(kind: type, words: list[str], help_fix: str) -> list[str]:
    """Name the flags that the command does not have, and those that it needs and did not get."""
    # To tyro, too, dashes and a letter are a flag wherever they stand; "-- a list" is a value.
    given = [
        _flag_of(word) for word in words if word.startswith("--") and _begins_with_letter(word)
    ]
    known = _known_flags(kind)
    problems = []
    for flag in dict.fromkeys(given):
        if flag in known or flag in _OF_TYRO:
            continue
        near = nearest_name(flag, known)
        fix = f"Fix: did you mean {near}?" if near else help_fix
        problems.append(f"{flag}: no such flag. {fix}")
    needed = [
        _spellings(kind, field)
        for field in fields(kind)
        if field.default is MISSING
        and field.default_factory is MISSING
        and not _is_positional(kind, field)  # tyro itself asks for these
    ]
    missing = [flags[0] for flags in needed if not set(flags) & set(given)]
    # One message is enough for a needed flag that is misspelled.
    if missing and not problems:
        problems.append(f"{', '.join(missing)}: must be given. {help_fix}")
    return problems


def _known_flags(kind: type) -> list[str]:
    """List the flags of a command, with those of a field that is a dataclass (`--field.name`)."""
    types = get_type_hints(kind)
    known = []
    for field in fields(kind):
        flags = _spellings(kind, field)
        known += flags
        if is_dataclass(types[field.name]):
            inner = _known_flags(types[field.name])
            known += [f"{flags[0]}.{flag.removeprefix('--')}" for flag in inner]
    return known


def spell_switches(kind: type, words: list[str]) -> list[str]:
    """Write `--x` and `--no-x` of switches with three states (bool | None) as `--x True|False`.

    tyro knows them as `--x {True,False,None}` only, which stays.
    """
    # Which flags those are.
    types = get_type_hints(kind)
    switches = {}
    for field in fields(kind):
        if types[field.name] == bool | None:
            flag = _flag_of(f"--{field.name}")
            switches |= {flag: [flag, "True"], f"--no-{flag[2:]}": [flag, "False"]}
    # Words that have a value of tyro's own stay as they are.
    spelled = []
    for word, following in zip(words, [*words[1:], ""]):
        has_value = following in _SWITCH_VALUES
        spelled += [word] if has_value else switches.get(_flag_of(word), [word])
    return spelled


def _spellings(kind: type, field: Field) -> list[str]:
    """List the flags that set a field: its own, its negation where it is a switch, its aliases."""
    annotation: Any = get_type_hints(kind, include_extras=True)[field.name]
    flag = _flag_of(f"--{field.name}")
    flags = [flag]
    if get_type_hints(kind)[field.name] in (bool, bool | None):
        flags.append(f"--no-{flag[2:]}")
    for note in getattr(annotation, "__metadata__", ()):
        flags += getattr(note, "aliases", None) or ()
    return flags


def _is_positional(kind: type, field: Field) -> bool:
    """Tell whether a field is a word of its own, without a flag."""
    annotation: Any = get_type_hints(kind, include_extras=True)[field.name]
    return tyro.conf.Positional in getattr(annotation, "__metadata__", ())


def _flag_of(word: str) -> str:
    """Return a flag without its value, spelled with hyphens."""
    return word.partition("=")[0].replace("_", "-")


def _begins_with_letter(word: str) -> bool:
    """Tell whether a letter follows a word's dashes."""
    return word.lstrip("-")[:1].isalpha()


def _first_message(text: str) -> str:
    """Return the message in a box of tyro, without its title and what follows, as one line."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        content = line.strip(_SIDES)
        if content.startswith(_LID):
            parts.append([])
        elif content.strip(_RULES):
            parts[-1].append(content)
        else:
            parts.append([])
    message = " ".join(parts[1]) if len(parts) > 1 else ""
    return f"{message.rstrip('. ') or 'the arguments cannot be read'}."
