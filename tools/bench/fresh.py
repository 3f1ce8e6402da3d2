"""Run one contender in an interpreter of its own, so that its memory is its own.

`run_fresh` is one call; `start_fresh` keeps the process as a worker, which does what it is asked,
a call at a time, and waits on a pipe in between. A request is a line of JSON, [call, *arguments];
so is the answer, what the call returned.

Memory is resident pages, the peak that Linux keeps for the process's address space (VmHWM, reset
before the measured part; getrusage's ru_maxrss would also hold what the parent had at the fork).
"Above" = beyond what was resident after the imports and a warm-up. Files that are read through a
map count as resident, as far as they were touched.
"""

import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[2]


KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
"""For `environment`: glibc keeps freed memory for the process, as torch's allocator does on a GPU,
so that no contender pays for fresh pages by chance of its sizes."""
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
"""For `environment`: glibc gives every freed tensor of 128 KiB or more back at once (by default it
learns not to), so that resident memory is what is in use."""


def run_fresh(
    function: Callable[..., dict],
    cores: int,
    *,
    environment: dict[str, str] | None = None,
    on_gpu: bool = False,
    **options: Any,
) -> dict:
    """Call a module's function in a fresh interpreter on `cores` cores, without a GPU.

    Args:
        environment: variables for it beside ours, or instead of ours.
        on_gpu: with the GPUs that this process may use.
        options: its arguments, JSON-able; what it returns must be, too.

    Raises:
        RuntimeError: it failed; its own message stands on stderr.
    """
    found = subprocess.run(
        _command("call", function, cores, options),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=_variables(cores, environment, on_gpu=on_gpu),
    )
    if found.returncode:
        raise RuntimeError(
            f"{function.__module__}.{function.__name__} ended with code {found.returncode}"
        )
    return json.loads(found.stdout)


@dataclass(frozen=True)
class Worker:
    """Hold a process that waits for calls."""

    title: str
    """What messages call it."""
    process: subprocess.Popen[str]

    def ask(self, call: str, *arguments: Any) -> Any:
        """Have the process make a call; waits for what it returns.

        Args:
            call: a name of those that the process offers.
            arguments: for the call, JSON-able.

        Raises:
            RuntimeError: the process ended instead; its own message, if any, stands on stderr.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps([call, *arguments]), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            # It has ended: nothing is left to read, either.
            pass
        answer = self.process.stdout.readline()
        # A process that is killed while it answers leaves a part of a line.
        if answer.endswith("\n"):
            return json.loads(answer)
        code = self.process.wait()
        why = " (SIGKILL, as where memory runs out)" if code == -signal.SIGKILL else ""
        raise RuntimeError(f"{self.title}: its process ended with code {code}{why}")


@contextmanager
def start_fresh(
    function: Callable[..., AbstractContextManager[dict[str, Callable]]],
    cores: int,
    *,
    title: str,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[Worker]:
    """Start a worker on `cores` cores, without a GPU; it is killed when the block ends.

    Args:
        function: a module's function, called in the fresh interpreter. Its context gives the calls
            that the worker offers, by name; what they return must be JSON-able.
        title: what messages call the worker.
        environment: variables for it beside ours, or instead of ours.
        options: arguments of the function, JSON-able.
    """
    process = subprocess.Popen(
        _command("serve", function, cores, options),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_variables(cores, environment),
    )
    try:
        yield Worker(title, process)
    finally:
        process.kill()
        # Closes both pipes and waits for the end.
        process.communicate()


def _command(kind: str, function: Callable, cores: int, options: dict) -> list[str]:
    """Make the command line of a fresh interpreter that calls or serves a function."""
    task = {
        "module": function.__module__,
        "name": function.__name__,
        "cores": cores,
        "options": options,
    }
    return [sys.executable, "-m", "tools.bench.fresh", kind, json.dumps(task)]


def _variables(
    cores: int, environment: dict[str, str] | None, *, on_gpu: bool = False
) -> dict[str, str]:
    """Make the environment of a fresh interpreter."""
    threads = {
        name: str(cores) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    }
    # A process that sees no GPU makes no context on it.
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **threads, **hidden, **(environment or {})}


def trim() -> None:
    """Give free memory back to the system, so that later use of it shows."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def measured() -> Iterator[dict]:
    """Fill in seconds, cpu_seconds (all threads), peak_bytes and above_bytes of what runs inside.

    A contender that computes all the time and has cpu_seconds below seconds was kept waiting, by
    the disk or by others.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        # The peak is then the process's, warm-up included.
        pass
    found: dict = {}
    before = _resident("VmRSS")
    start = time.perf_counter()
    cpu = time.process_time()
    yield found
    found["seconds"] = time.perf_counter() - start
    found["cpu_seconds"] = time.process_time() - cpu
    found["peak_bytes"] = _resident("VmHWM")
    # The kernel's two counters are brought up to date at different times.
    found["above_bytes"] = max(0, found["peak_bytes"] - before)


def _resident(field: str) -> int:
    """Read a field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def _call(task: dict, answers: TextIO) -> None:
    """Call the function, and print what it returns."""
    print(json.dumps(_function_of(task)(**task["options"])), file=answers, flush=True)


def _serve(task: dict, answers: TextIO) -> None:
    """Make calls, one per line of stdin, until the parent closes it, and print what they return."""
    # Ctrl-C reaches every process of the terminal; the parent ends its workers, and says so once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _function_of(task)(**task["options"]) as calls:
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(calls[name](*arguments)), file=answers, flush=True)


def _function_of(task: dict) -> Callable:
    """Keep this process to its cores, and import the function of its task."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task["cores"]])
    return getattr(importlib.import_module(task["module"]), task["name"])


def _take_stdout() -> TextIO:
    """Keep stdout for the answers: whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    {"call": _call, "serve": _serve}[sys.argv[1]](json.loads(sys.argv[2]), _take_stdout())
