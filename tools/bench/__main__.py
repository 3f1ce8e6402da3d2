"""Run a benchmark: `bash launch/ithaca.sh bench NAME [options]`; --help lists the names."""

import importlib
import sys
from types import ModuleType

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
    name, *options = sys.argv[1:] or [""]
    if name in BENCHMARKS:
        # Only this one is imported: the packages of the others need not be installed.
        return run(name, options)
    if name and not name.startswith("-"):
        print(
            f"error: {name}: no such benchmark. Fix: one of {', '.join(BENCHMARKS)}.",
            file=sys.stderr,
        )
        return 2
    # No name or --help: tyro prints the list and exits.
    application = tyro.extras.SubcommandApp()
    for name in BENCHMARKS:
        module = load(name)
        application.command(module.Arguments, name=name, help=module.__doc__)
    application.cli(prog="tools.bench", description=__doc__)
    return 2


def load(name: str) -> ModuleType:
    """Import a benchmark's module."""
    return importlib.import_module(BENCHMARKS[name])


def run(name: str, options: list[str]) -> int:
    """Run one benchmark with the options of its command line; returns its exit code."""
    module = load(name)
    return run_door(
        module.Arguments,
        module.run,
        name=f"tools.bench {name}",
        description=module.__doc__,
        argv=options,
    )


if __name__ == "__main__":
    sys.exit(main())
