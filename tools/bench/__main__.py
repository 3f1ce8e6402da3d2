"""Benchmarks on this machine: `python -m tools.bench attention|data|disturbed|memory|step [options]`."""

import sys

import tyro

from tools.bench import attention, data, disturbed, memory, step

BENCHMARKS = {"attention": attention, "data": data, "disturbed": disturbed, "memory": memory, "step": step}
"""Subcommand -> its module: `Arguments`, a dataclass of its options, and `run(arguments) -> exit code`."""


def main() -> int:
    application = tyro.extras.SubcommandApp()
    for name, module in BENCHMARKS.items():
        application.command(module.Arguments, name=name, help=module.__doc__)
    arguments = application.cli(prog="tools.bench", description=__doc__)
    module = next(module for module in BENCHMARKS.values() if isinstance(arguments, module.Arguments))
    return module.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
