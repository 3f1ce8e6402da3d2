"""Run one contender in an interpreter of its own, so that its memory is its own.

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
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    threads = {
        name: str(cores) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    }
    task = json.dumps(
        {
            "module": function.__module__,
            "name": function.__name__,
            "cores": cores,
            "options": options,
        }
    )
    # A process that sees no GPU makes no context on it.
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(
        [sys.executable, "-m", "tools.bench.fresh", task],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads, **hidden, **(environment or {})},
    )
    if found.returncode:
        raise RuntimeError(
            f"{function.__module__}.{function.__name__} ended with code {found.returncode}"
        )
    return json.loads(found.stdout.splitlines()[-1])


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


def _work(text: str) -> None:
    """Do the task of this process, and print the answer as the last line."""
    task = json.loads(text)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task["cores"]])
    answer = sys.stdout
    # Whatever a library prints is no part of the answer.
    sys.stdout = sys.stderr
    function = getattr(importlib.import_module(task["module"]), task["name"])
    print(json.dumps(function(**task["options"])), file=answer, flush=True)


if __name__ == "__main__":
    _work(sys.argv[1])
