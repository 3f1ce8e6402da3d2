"""Benchmarks on this machine: `python -m tools.bench
attention|data|disturbed|lease|memory|step|traffic [options]`."""

import importlib
import sys

import tyro

BENCHMARKS = ("attention", "data", "disturbed", "lease", "memory", "step", "traffic")
"""Each a module of this folder: `Arguments`, a dataclass of its options, and `run(arguments) ->
exit code`."""


def main() -> int:
    if sys.argv[1:2] and sys.argv[1] in BENCHMARKS:  # the others' packages need not be there
        name = sys.argv[1]
        module = importlib.import_module(f"tools.bench.{name}")
        return module.run(
            tyro.cli(
                module.Arguments,
                prog=f"tools.bench {name}",
                description=module.__doc__,
                args=sys.argv[2:],
            )
        )
    application = tyro.extras.SubcommandApp()
    for name in BENCHMARKS:
        module = importlib.import_module(f"tools.bench.{name}")
        application.command(module.Arguments, name=name, help=module.__doc__)
    application.cli(
        prog="tools.bench", description=__doc__
    )  # ends with the help, or with what is wrong
    return 2


if __name__ == "__main__":
    sys.exit(main())
