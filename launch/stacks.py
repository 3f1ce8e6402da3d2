"""Have the ranks of this node write where they are, and end them.

Each rank's faulthandler writes the Python stacks of all its threads when STACK_SIGNAL comes, from C
and so also while Python waits inside a collective. A stopped rank answers once it is continued; it
is ended right after, so that nothing is lost by that.
"""

import os
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launch.rank_view import GONE, RankView, process_state

STACK_SIGNAL = signal.SIGUSR2
"""The signal for which pretrain/processes/heartbeat.py has registered the faulthandler."""
ANSWER_SECONDS = 3.0
"""The seconds in which a rank writes its stacks."""
POLL_SECONDS = 0.05
NO_ANSWER = "no answer: the process does not react to signals"


def dump_stacks(folder: Path, views: Sequence[RankView]) -> dict[int, str]:
    """Ask every rank of this node for its stacks -> rank: text."""
    # Those that run first: a stopped rank that goes on lets the others go on, too.
    running = [view for view in views if not view.is_stopped]
    stopped = [view for view in views if view.is_stopped]
    return _ask(folder, running) | _ask(folder, stopped)


def _ask(folder: Path, views: Sequence[RankView]) -> dict[int, str]:
    # A rank without that file is not prepared yet: the signal would end it.
    prepared = [view for view in views if _stacks_file(folder, view).exists()]
    for view in prepared:
        with suppress(ProcessLookupError):
            os.kill(view.pid, STACK_SIGNAL)
            if view.is_stopped:
                os.kill(view.pid, signal.SIGCONT)
    limit = time.monotonic() + ANSWER_SECONDS
    texts: dict[int, str] = {}
    missing = list(prepared)
    while missing and time.monotonic() < limit:
        time.sleep(POLL_SECONDS)
        for view in list(missing):
            text = _stacks_file(folder, view).read_text(errors="replace")
            # What has not grown since the last look is whole.
            if text and texts.get(view.rank) == text:
                missing.remove(view)
            texts[view.rank] = text
    return {view.rank: texts.get(view.rank) or NO_ANSWER for view in views}


def _stacks_file(folder: Path, view: RankView) -> Path:
    return folder / f"rank{view.rank}.stacks"


def kill_ranks(views: Sequence[RankView]) -> None:
    """End the ranks of this node; nothing that they could still do is wanted."""
    for view in views:
        if process_state(view.pid) not in GONE:
            with suppress(ProcessLookupError):
                os.kill(view.pid, signal.SIGKILL)


def group_stacks(stacks: dict[int, str]) -> list[tuple[list[int], str]]:
    """Join ranks with the same stacks -> their ranks, and the stacks of the first of them."""
    groups: dict[str, tuple[list[int], str]] = {}
    for rank in sorted(stacks):
        # Threads have other numbers in each process.
        kind = re.sub(r"0x[0-9a-f]+", "", stacks[rank])
        groups.setdefault(kind, ([], stacks[rank]))[0].append(rank)
    return list(groups.values())


def dump_flight_recorders(stem: str, views: Sequence[RankView]) -> None:
    """Have NCCL write what each device of this node was doing, where NCCL is in use."""
    for view in views:
        with suppress(OSError):  # without NCCL nobody reads the pipe, or there is none
            pipe = os.open(f"{stem}{view.rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(pipe, b"1")
            finally:
                os.close(pipe)
