"""Names of the commands as users call them: the table of launch/ithaca.sh is the one place."""

import functools
import re
from pathlib import Path

ITHACA_SH = Path(__file__).parents[2] / "launch" / "ithaca.sh"
_ROW = re.compile(r"^(?P<command>[a-z-]+) *\| *(?P<runner>[a-z_.]+) *\|")
"""A line of the table: command | what runs it | what it does."""
_RUN_BY_SCRIPT = {"plan": "tools.plan"}
"""What runs a command in the table -> the module behind it."""


def command_of(module: str) -> str:
    """Return how users call a module of tools/, like `bash launch/ithaca.sh watch`.

    Args:
        module: with words behind it where it has several commands, like `tools.bench step`. One
            that is no command is called by its own name.
    """
    name, space, words = module.partition(" ")
    command = _commands().get(name)
    return module if command is None else f"bash launch/ithaca.sh {command}{space}{words}"


@functools.cache
def _commands() -> dict[str, str]:
    """Return module -> command."""
    rows = map(_ROW.match, ITHACA_SH.read_text(encoding="utf-8").splitlines())
    return {_RUN_BY_SCRIPT.get(row["runner"], row["runner"]): row["command"] for row in rows if row}
