"""Look into checkpoints: `bash launch/ithaca.sh inspect-checkpoint` with `--load DIR`, or with
`--compare A B`. Needs no GPU and no process group.

With `--load`: a line for each checkpoint of a run's folder, or for the one that is named (by its
own folder, or with `--ckpt-step N`). `--verify` compares every file with its checksum; without it
only the small ones are. With `--compare`: both are verified, then which tensors, settings and
counts differ; A and B are folders of a run (its latest checkpoint), of a checkpoint, or iterations
of `--load`.

Exit code 0: all is well, or equal; 1: something is damaged, or differs; 2: nothing to look at.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

from tools.inspection.checkpoint_compare import compare
from tools.inspection.checkpoint_list import describe_checkpoints, find_folder
from tools.shared.door import run_door


@dataclass(kw_only=True)
class Arguments:
    load: str | None = None
    """Folder of a run's checkpoints, or of one of them."""
    ckpt_step: int | None = None
    """Only this iteration of --load."""
    verify: bool = False
    """Compare every file with its checksum, which reads all of them; --compare always does."""
    compare: list[str] = field(default_factory=list)
    """Two checkpoints to compare: folders, or iterations of --load."""


def main(argv: list[str] | None = None) -> int:
    return run_door(
        Arguments, inspect, name="tools.inspect_checkpoint", description=__doc__, argv=argv
    )


def inspect(arguments: Arguments) -> int:
    """Print what the arguments ask for -> the exit code.

    Raises:
        ValueError: nothing or too much is named, or there is no checkpoint.
    """
    if arguments.compare:
        if len(arguments.compare) != 2 or arguments.ckpt_step is not None:
            raise ValueError(
                f"compare = {' '.join(arguments.compare)}: must be two checkpoints, and without "
                "--ckpt-step. Fix: --compare A B, each a folder or an iteration of --load."
            )
        first, second = (_compared_folder(arguments, name) for name in arguments.compare)
        lines = compare(first, second)
    elif arguments.load is None:
        raise ValueError("load, compare: none given. Fix: give --load DIR or --compare A B.")
    else:
        lines = describe_checkpoints(
            arguments.load, arguments.ckpt_step, all_files=arguments.verify
        )
    return print_findings(lines)


def _compared_folder(arguments: Arguments, name: str):
    """Find a checkpoint of --compare: a number is an iteration of --load."""
    if arguments.load is not None and name.isdecimal():
        return find_folder("compare", arguments.load, int(name))
    return find_folder("compare", name, None)


def print_findings(findings: Iterable[tuple[str, bool]]) -> int:
    """Print lines as they come -> 1 if one of them tells of damage or a difference, else 0.

    A reader that has seen enough (`| head`) ends the output, and not the work.
    """
    code = 0
    for text, is_bad in findings:
        code = max(code, int(is_bad))
        try:
            print(text, flush=True)
        except BrokenPipeError:
            # What follows goes nowhere, also what Python flushes when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    sys.exit(main())
