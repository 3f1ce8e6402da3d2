"""The data engine: its index, packing, reading and slices beside Megatron-Core's, and exactly once,
by counting.

Each contender runs in an interpreter of its own, one after the other, on the same files. See
README.md for what each row measures.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

from tools.bench.data_engine import corpus as data_corpus
from tools.bench.data_engine.arguments import CORES, SIZES, Arguments
from tools.bench.data_engine.rows import INDEX_LENGTH, MEAN, MILLION, ROWS, SLICE_SAMPLES
from tools.bench.option_checks import find_too_small
from tools.bench.report import describe_machine, publish


def run(arguments: Arguments) -> int:
    """Measure the rows and publish the result; 0, or 1 where a result is wrong or a contender
    fails, or 2."""
    folder = Path(arguments.folder or tempfile.gettempdir())
    problem = find_problem(arguments, folder)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    parts = [
        "## Data: index, packing, reading, exactly once",
        "",
        describe_machine(["megatron-core", "numba"]),
        "",
        f"One process at a time, {CORES} cores each (reading: one). Peak: resident memory of the "
        "process, imports "
        "included; above: beyond its imports and a warm-up. Files are in the page cache.",
        "",
    ]
    wrong = False
    # Otherwise the end of the process would leave gigabytes, and the contender that runs.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="ithaca-bench-", dir=folder) as inside:
            for name in arguments.only or ROWS:
                print(f"{name} ...", file=sys.stderr, flush=True)
                lines, sound = ROWS[name](Path(inside), arguments)
                parts += [*lines, ""]
                wrong = wrong or not sound
    except RuntimeError as failure:  # what was measured before it is worth having
        parts.append(f"ended early: {failure}")
        wrong = True
    parts.append(f"Load at the end: {os.getloadavg()[0]:.1f}. The bars are on wall time.")
    usual = Arguments()
    others = [name for name in SIZES if getattr(arguments, name) != getattr(usual, name)]
    if others:
        parts.append(f"The bars are set for the default sizes; here {', '.join(others)} differ.")
    publish("\n".join(parts).rstrip(), arguments.output)
    return 1 if wrong else 0


def find_problem(arguments: Arguments, folder: Path) -> str | None:
    """Say why the benchmark cannot run, with a fix; None = it can."""
    unknown = [name for name in arguments.only if name not in ROWS]
    if unknown:
        return f"--only {' '.join(unknown)}: no such row. Fix: of {', '.join(ROWS)}."
    too_small = find_too_small(
        arguments,
        documents=1000,
        tokens=100 * INDEX_LENGTH,
        packed_documents=1,
        counted_tokens=64 * MILLION,
        text_bytes=1,
        repeats=1,
        samples=1,
    )
    if too_small:
        return too_small
    # Reading takes a sample of 1Mi tokens for each of --samples, and some before.
    fewest = (max(arguments.samples, SLICE_SAMPLES) + 3) * MILLION
    if arguments.read_tokens < fewest:
        return (
            f"--read-tokens {arguments.read_tokens}: too few for --samples {arguments.samples}. "
            f"Fix: at least {fewest}."
        )
    if not data_corpus.SHORTEST <= arguments.tokens / arguments.documents <= 100_000:
        return (
            f"--tokens {arguments.tokens} over --documents {arguments.documents}: not a mean "
            "length from "
            f"{data_corpus.SHORTEST} to 100,000. Fix: about {arguments.documents * MEAN} tokens."
        )
    if arguments.counted_tokens >= 2**31 - MILLION or arguments.documents >= 2**31:
        return (
            "--counted-tokens, --documents: ids are int32 here, as in Megatron-Core. Fix: fewer "
            "than 2e9."
        )
    needs = {
        "index": 20 * arguments.documents,
        "packing": 20 * arguments.packed_documents,
        "reading": 3 * arguments.read_tokens,
        "slices": 3 * arguments.read_tokens,
        "tokenizing": 2 * arguments.text_bytes,
        "exactly-once": 5 * arguments.counted_tokens,
    }
    needed = sum(needs[name] for name in arguments.only or ROWS) + (1 << 28)
    return data_corpus.find_room(folder, needed)


# ---- rows: (folder, arguments) -> lines of Markdown, and whether the results were right ----
