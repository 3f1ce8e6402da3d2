"""Run a benchmark: `bash launch/ithaca.sh bench NAME [options]`; --help lists the names."""

import importlib
import sys
import traceback
from types import ModuleType
from typing import Any

import tyro

from tools.shared.door import run_door

BENCHMARKS = {
    "attention": "tools.bench.attention",
    "balance": "tools.bench.balance",
    "checkpoint": "tools.bench.checkpoint",
    "data": "tools.bench.data",
    "disturbed": "tools.bench.disturbed",
    "generate": "tools.bench.generate",
    "lease": "tools.bench.gpu.lease",
    "memory": "tools.bench.memory",
    "optimizers": "tools.bench.optimizers",
    "predictions": "tools.bench.predictions",
    "recompute": "tools.bench.recompute",
    "restart": "tools.bench.restart",
    "step": "tools.bench.step",
    "traffic": "tools.bench.traffic",
    "windows": "tools.bench.windows",
}
"""Name -> module with its options, `Arguments`, and `run(arguments)`, which gives the exit code."""


def main() -> int:
    """Run the named benchmark and return its exit code, or print the list of names."""
    first, *options = sys.argv[1:] or ["--help"]
    if first in BENCHMARKS:
        # Only this one is imported: the packages of the others need not be installed.
        return run(first, options)
    if first not in ("-h", "--help"):
        known = ", ".join(BENCHMARKS)
        print(f"error: {first}: no such benchmark. Fix: one of {known}.", file=sys.stderr)
        return 2
    application = tyro.extras.SubcommandApp()
    for name in BENCHMARKS:
        module = load(name)
        application.command(module.Arguments, name=name, help=module.__doc__)
    # It prints the list and exits.
    application.cli(prog="tools.bench", description=__doc__, args=["--help"])
    return 0


def load(name: str) -> ModuleType:
    """Import a benchmark's module."""
    return importlib.import_module(BENCHMARKS[name])


def run(name: str, options: list[str]) -> int:
    """Run one benchmark with the options of its command line; returns its exit code."""
    module = load(name)

    def measure(arguments: Any) -> int:
        try:
            return module.run(arguments)
        except ValueError as error:
            # Without a fix it is no bad input but a fault of the code, after hours perhaps.
            if "Fix:" not in str(error):
                traceback.print_exc()
            raise

    return run_door(
        module.Arguments,
        measure,
        name=f"tools.bench {name}",
        description=module.__doc__,
        argv=options,
    )


if __name__ == "__main__":
    sys.exit(main())
