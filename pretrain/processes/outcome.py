"""How a process ends: one word for the launcher, bad input said once, and a failure kept whole.

An orderly end is exit 0 on all ranks, and local rank 0 of each node writes the outcome to the file
that launch/train.sh names in the environment. What an exception says goes to a file of the rank:
launch/worker.py.
"""

import errno
import socket
import sys
import time
from pathlib import Path
from typing import Literal

from data.files import write_atomically
from parallel.config import LayoutConfig
from parallel.layout import (
    end_world,
    launched_local_rank,
    launched_on_one_machine,
    launched_rank,
    start_world,
)
from pretrain.config.load import outcome_path
from pretrain.processes.agreement import Refused, Shared, require_agreement

UNSTARTED = "unstarted"
"""Not "stopped": nothing was trained, so that nothing had to be saved."""

POLL_SECONDS = 0.05

KnownTo = Literal["this rank", "this machine", "all ranks"]


def write_outcome(outcome: str) -> None:
    """Tell the launcher of this node how the run ended."""
    path = outcome_path()
    if path:
        write_atomically(Path(path), outcome)


def refuse(error: Exception, known_to: KnownTo = "this machine") -> int:
    """Say what is wrong with the input, and tell the launcher not to try again.

    It is said once per machine, where all its ranks found the same. Exit code 2 makes the launcher
    end the other ranks; where all ranks end by themselves, the outcome file is enough.

    Args:
        known_to: who else ends for the same reason.

    Returns:
        The exit code of this process.
    """
    is_speaker = launched_local_rank() == 0
    is_known_to_machine_only = known_to == "this machine" and not launched_on_one_machine()
    ends_alone = known_to == "this rank" or is_known_to_machine_only
    # The speaker of this machine says it for the others.
    if not is_speaker and known_to == "all ranks":
        return 0 if outcome_path() else 2
    if not is_speaker and known_to == "this machine" and was_refused_by_others():
        return 2 if ends_alone else 0
    say_error(error)
    write_outcome("refused")
    # What a speaker does not say of its machine, this rank found by itself.
    return 2 if ends_alone or not is_speaker or outcome_path() is None else 0


def say_error(error: Exception) -> None:
    """Print an error, with the rank and host where it is not rank 0's."""
    where = "" if launched_rank() == 0 else f" (rank {launched_rank()} on {socket.gethostname()})"
    for line in str(error).splitlines():
        print(f"error{where}: {line}", file=sys.stderr, flush=True)


def was_refused_by_others(wait: float = 5.0) -> bool:
    """Tell whether local rank 0 says the same within `wait` seconds."""
    path = outcome_path()
    limit = time.monotonic() + wait
    while path and time.monotonic() < limit:
        if Path(path).exists() and Path(path).read_text() == "refused":
            return True
        time.sleep(POLL_SECONDS)
    return False


def say_stopped_at_start() -> None:
    """Say that a signal came before the first step.

    There is nothing to save, and the same command starts again.
    """
    if launched_rank() == 0:
        print("stopped before the first step", flush=True)
    if launched_local_rank() == 0:
        write_outcome(UNSTARTED)


def refuse_with_others(error: Exception) -> int:
    """Say what keeps this machine from training, then tell the other machines.

    They would wait for it until the time-out.

    Returns:
        The exit code of this process.
    """
    is_speaker = launched_local_rank() == 0
    if is_speaker:
        say_error(error)
    try:
        # Whatever the settings are, all machines meet here and hear of the problem.
        world = start_world(LayoutConfig())
        require_agreement(Shared(problem=str(error)), world.axis)
    except Refused as refused:
        if is_speaker:
            write_outcome("refused")
            # Lines of other machines; ours are said already.
            own = str(error).splitlines()
            lines = str(refused).splitlines()
            others = [line for line in lines if line.split(": ", 1)[1] not in own]
            say_error(Refused("\n".join(others)))
        return 0 if outcome_path() else 2
    except (ValueError, OSError, RuntimeError) as missed:
        print(
            f"warning: the other machines could not be told ({missed})", file=sys.stderr, flush=True
        )
    finally:
        end_world()
    write_outcome("refused")
    return 2


def report_failure(error: Exception, step: int) -> None:
    """Let the launcher know at once that this rank has failed after a step, and how.

    Bad input and a full disk are said as what they are: see `refuse`.
    """
    if isinstance(error, ValueError) or is_full_disk(error):
        return
    error.add_note(f"after step {step:,}")
    # Without a launcher the exception itself will be printed, as always.
    if sys.excepthook is not sys.__excepthook__:
        sys.excepthook(type(error), error, error.__traceback__)


def is_full_disk(error: BaseException) -> bool:
    """Tell whether an error, or one that led to it, is that a disk or a quota is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
