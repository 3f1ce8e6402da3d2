"""Find out which process of a launch failed first, and say how.

When one rank fails, the others lose their connections to it and fail, too, often with the louder
error and sometimes before the first one is gone. So a failure whose own error speaks of a lost
peer counts as a consequence, whenever it came.
"""

import json
import re
import shutil
import signal
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launch.records import errors_folder
from launch.workers import Ended, Workers

SHOWN_LINES = 12
"""The last lines of a traceback that the console gets; the file has all of them."""
LOST_PEER = re.compile(
    r"connection (closed|reset|refused|was closed|aborted)|closed by peer|broken pipe|"
    r"socket (closed|timeout)|recvvalue failed|failed to (recv|send)|timed out|timeout|"
    r"nccl (error|communicator)|nccl[a-z]*(systemerror|remoteerror|internalerror)|"
    r"was aborted|peer process|no route to host|heartbeat",
    re.IGNORECASE,
)
"""What gloo, NCCL and torch's store say when the other side is gone."""
NETWORK_ERRORS = re.compile(r"(Dist\w*Error|ConnectionError|Connection\w+Error|BrokenPipeError)$")


@dataclass(frozen=True)
class Record:
    """Holds what a rank wrote about its own exception: launch/worker.py."""

    time: float
    error: str
    message: str
    place: str
    step: int | None
    """The last step that was whole; None before the first one."""
    is_from_system: bool
    """True for what the machine says (files, memory), which another try may not meet."""

    @property
    def is_consequence(self) -> bool:
        """Tell whether the error is that another process is gone."""
        if NETWORK_ERRORS.search(self.error):
            return True
        return self.error == "RuntimeError" and bool(LOST_PEER.search(self.message))


@dataclass(frozen=True)
class Failure:
    """Describes why a launch failed, for this node's user and those of the others."""

    summary: str
    """One line: which rank, where, how."""
    details: str = ""
    """The last lines of its traceback."""
    signature: str = ""
    """What is the same when the same error comes at the same step; "" where that says nothing."""
    is_cause: bool = True
    """False where the error is that some other process is gone."""
    is_refusal: bool = False
    """True where another try would end the same way."""
    time: float = 0.0
    """When it failed, in seconds since 1970."""


@dataclass(frozen=True)
class Ending:
    """Describes which node ended a launch, and why."""

    node_rank: int
    host: str
    failure: Failure
    is_gone: bool = False
    """True where the others say it of a node that says nothing any more."""

    def describe(self) -> str:
        """Say it in a line for the users of the other nodes."""
        return f"node {self.node_rank} ({self.host}) ended this launch: {self.failure.summary}"

    def to_text(self) -> str:
        """Write it down for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: bytes) -> "Ending":
        """Read what `to_text` wrote."""
        found = json.loads(text)
        failure = Failure(**found.pop("failure"))
        return cls(failure=failure, **found)


def read_records(ranks: Sequence[int]) -> dict[int, Record]:
    """Read what these ranks have written about their own exceptions so far."""
    found = {}
    for rank in ranks:
        path = errors_folder() / f"rank{rank}.json"
        if path.exists():
            found[rank] = Record(**json.loads(path.read_text()))
    return found


def find_first(workers: Workers, ended: Sequence[Ended]) -> Failure:
    """Choose the failure that explains the others.

    Args:
        ended: how workers ended by themselves; those that the launcher ended are left out.
    """
    count = len(workers.processes)
    records = read_records(range(workers.first_rank, workers.first_rank + count))
    failures = [_of_record(workers, rank, record) for rank, record in records.items()]
    failures += [
        _of_end(workers, end) for end in ended if end.code != 0 and end.rank not in records
    ]
    first = min(failures, key=lambda failure: (not failure.is_cause, failure.time))
    others = len(failures) - 1
    if others == 0:
        return first
    more = f"; {others} more rank{'s' if others > 1 else ''} of this node ended with it"
    return replace(first, summary=first.summary + more)


def _of_record(workers: Workers, rank: int, record: Record) -> Failure:
    where = "before the first step" if record.step is None else f"after step {record.step:,}"
    message = record.message.splitlines()
    text = f"{record.error}: {message[0]}" if message else record.error
    signature = ""
    if not record.is_consequence and not record.is_from_system:
        # Numbers, like addresses or free bytes, may differ though the error is the same.
        said = re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?", "#", record.message)
        signature = f"{record.error} in {record.place} {where}: {said}".replace("\n", " ")
    return Failure(
        f"{_name(workers, rank)} failed {where}: {text}",
        details=_last_lines(workers.error_file(rank)),
        signature=signature,
        is_cause=not record.is_consequence,
        time=record.time,
    )


def _of_end(workers: Workers, end: Ended) -> Failure:
    """Describe a worker that ended without a word of its own."""
    if end.code < 0:
        name = signal.Signals(-end.code).name
        how = f"was killed by {name}"
        if -end.code == signal.SIGKILL:
            how += " (if nobody did, the machine ran out of memory: see dmesg)"
    else:
        how = f"failed with exit code {end.code}"
    # NCCL's own watchdog aborts a rank whose peer is gone.
    is_cause = -end.code != signal.SIGABRT
    return Failure(
        f"{_name(workers, end.rank)} {how}",
        details=_last_lines(workers.error_file(end.rank)),
        is_cause=is_cause,
        time=end.time,
    )


def _name(workers: Workers, rank: int) -> str:
    local_rank = rank - workers.first_rank
    pid = workers.processes[local_rank].pid
    return f"rank {rank} (local rank {local_rank}, process {pid} on {socket.gethostname()})"


def _last_lines(path: Path) -> str:
    """Return the last lines that a rank wrote, and say where there are more."""
    if not path.exists():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    # A fault's file names every thread, the one that failed first.
    if any(line.startswith("Fatal Python error") for line in lines):
        return "\n".join(lines[:SHOWN_LINES])
    return "\n".join(lines[-SHOWN_LINES:])


def publish_errors(target: str) -> str:
    """Copy what this node's ranks wrote to where the run's user looks -> that folder, or "".

    Args:
        target: the folder; without --save that in which the files are.
    """
    files = [path for path in errors_folder().glob("*") if path.is_file() and path.stat().st_size]
    shown = [path for path in files if path.suffix != ".json"]
    if not shown:
        return ""
    if target == str(errors_folder()):
        return target
    try:
        Path(target).mkdir(parents=True, exist_ok=True)
        for path in shown:
            shutil.copyfile(path, Path(target) / path.name)
    except OSError as error:  # the disk may be what failed
        return f"{errors_folder()} ({target}: {error.strerror})"
    return target
