"""Watch a run: `bash launch/ithaca.sh watch DIR`.

Reads what the run writes into its --save folder, on any machine that sees it. In a terminal one
screen that refreshes itself: what the run does or waits for, phase, tokens, loss, speed, time that
is left, last checkpoint, last events. Elsewhere a line whenever there is something new. Ends when
the run is done or refused, or by Ctrl-C; the run itself is never touched.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TextIO

import tyro

from tools.shared.door import run_door
from tools.watching.run_files import RunFiles, read_files
from tools.watching.run_state import is_over
from tools.watching.screen import line, screen, signs_for, terminal_columns

CLEAR = "\x1b[H\x1b[J"
"""Moves the cursor to the upper left corner and empties the terminal from there."""
WIDEST = 160
"""Columns of a screen that no terminal limits."""


@dataclass(kw_only=True)
class Arguments:
    """Hold the options of the command line."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a run's checkpoints (its --save)."""
    once: bool = False
    """Print the screen once, and end."""
    interval: float = 5.0
    """Seconds between two looks."""


def watch(
    arguments: Arguments,
    out: TextIO | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the run until it is over.

    Args:
        out: where it is shown; by default standard output.

    Raises:
        ValueError: the folder is a file, or with --once is not there; an interval that is none.
    """
    if not arguments.interval > 0:
        raise ValueError(f"interval = {arguments.interval}: must be above 0. Fix: for example 5.")
    out = out or sys.stdout
    files = read_files(arguments.folder)
    if arguments.once:
        if not files.exists:
            raise ValueError(
                f"folder = {arguments.folder}: no such folder. "
                "Fix: give the --save folder of a run."
            )
        print(_screen(files, out), file=out, flush=True)
        return
    show = _Terminal(out).show if out.isatty() else _Log(out).show
    try:
        while True:
            show(files)
            if is_over(files):
                return
            sleep(arguments.interval)
            files = read_files(arguments.folder)
    except KeyboardInterrupt:
        print(file=out)


def _screen(files: RunFiles, out: TextIO) -> str:
    columns = terminal_columns() if out.isatty() else WIDEST
    return screen(files, time.time(), columns, signs_for(out.encoding))


class _Terminal:
    """Shows a screen in place of the one before it."""

    def __init__(self, out: TextIO):
        self.out = out

    def show(self, files: RunFiles) -> None:
        """Write all at once, so that nothing flickers."""
        print(f"{CLEAR}{_screen(files, self.out)}", file=self.out, flush=True)


class _Log:
    """Prints a line where something is new."""

    def __init__(self, out: TextIO):
        self.out = out
        self.shown: tuple | None = None

    def show(self, files: RunFiles) -> None:
        """Print the run in a line, unless no step and no event came since the last one."""
        newest = (
            files.exists,
            len(files.events) and files.events[-1],
            len(files.steps) and files.steps[-1],
        )
        if newest != self.shown:
            self.shown = newest
            print(line(files, time.time()), file=self.out, flush=True)


def main(argv: list[str] | None = None) -> int:
    return run_door(Arguments, watch, name="tools.watch", description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
