"""Run the trainer in one worker process, and keep what goes wrong in it for the launcher to say.

`python -m launch.worker LAUNCHER MODULE [ARGUMENTS]` ties its life to the process LAUNCHER, then
becomes the module. An exception that nobody catches is written whole to the rank's own file, where
segmentation faults and aborts write, too; beside it a record of one line for the launcher, which
shows the user the one that explains the others. The trainer calls `sys.excepthook` itself before
it takes anything down, which may have to wait for ranks that are gone.
"""

import faulthandler
import json
import os
import re
import runpy
import socket
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

from launch.console import outlive_console
from launch.tether import end_with_parent

STEP_NOTE = re.compile(r"^after step ([\d,]+)$")
"""A note on an exception by which the trainer says how far it was."""


def main() -> None:
    """Become the module that the command line names."""
    launcher, module, *arguments = sys.argv[1:]
    end_with_parent(int(launcher))
    outlive_console()
    keep_errors(Path(os.environ["ITHACA_ERRORS"]), int(os.environ["RANK"]))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def keep_errors(folder: Path, rank: int) -> None:
    """Write what goes wrong in this process to files of its rank from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank{rank}.txt"
    # It stays open: a process that dies in C can't open it any more.
    file = path.open("a", encoding="utf-8")
    faulthandler.enable(file)
    recorded: list[BaseException] = []

    def record(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        # The trainer calls, and then Python itself with the same error.
        if issubclass(kind, KeyboardInterrupt) or any(error is one for one in recorded):
            return
        trace = skip_own_frames(trace)
        recorded.append(error)
        lines = traceback.format_exception(kind, error, trace)
        file.write(f"rank {rank} on {socket.gethostname()}, process {os.getpid()}, {_now()}\n")
        file.write("".join(lines))
        file.flush()
        _write(path.with_suffix(".json"), describe(error, trace))

    sys.excepthook = record


def skip_own_frames(trace: TracebackType | None) -> TracebackType | None:
    """Begin a traceback where the module does that this process became."""
    own = (__file__, "<frozen runpy>")
    while trace is not None and trace.tb_next and trace.tb_frame.f_code.co_filename in own:
        trace = trace.tb_next
    return trace


def describe(error: BaseException, trace: TracebackType | None) -> dict:
    """Describe an exception in the fields of `launch.failures.Record`."""
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__"):
        name = f"{kind.__module__}.{name}"
    frames = traceback.extract_tb(trace)
    steps = [STEP_NOTE.match(note) for note in getattr(error, "__notes__", [])]
    return {
        "time": time.time(),
        "error": name,
        "message": str(error),
        "place": f"{Path(frames[-1].filename).name}: {frames[-1].name}" if frames else "",
        "step": next((int(found[1].replace(",", "")) for found in steps if found), None),
        "is_from_system": isinstance(error, OSError | MemoryError),
    }


def _write(path: Path, record: dict) -> None:
    """Let the file appear whole: the launcher looks for it many times a second."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record))
    partial.rename(path)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


if __name__ == "__main__":
    main()
