"""Run a benchmark: `bash launch/ithaca.sh bench NAME [options]`; --help lists the names."""

import importlib
import sys
from types import ModuleType

import tyro

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
    if sys.argv[1:2] and sys.argv[1] in BENCHMARKS:
        # Only this one is imported: the packages of the others need not be installed.
        return run(sys.argv[1], sys.argv[2:])
    # No name, --help or a wrong name: tyro prints the list, or what is wrong, and exits.
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
    arguments = tyro.cli(
        module.Arguments,
        prog=f"tools.bench {name}",
        description=module.__doc__,
        args=options,
    )
    return module.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
