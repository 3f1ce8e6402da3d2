"""Measure tokens per second of a step beside transformers and beside the step's own products.

Each contender in a process of its own on all cores, one step at a time in turns. They take the same
weights, tokens and AdamW; their losses are compared before anything is timed. See README.md for
what each figure means.
"""

import statistics
import sys
from contextlib import ExitStack
from functools import partial

from data.stream import usable_cores
from tools.bench.contenders import (
    CHECKPOINTED,
    OURS,
    THEIRS,
    Dtype,
    default_dtype,
)
from tools.bench.fresh import KEEP_MEMORY, RETURN_MEMORY, Worker, run_fresh, start_fresh
from tools.bench.option_checks import find_too_small
from tools.bench.peers import PEERS, check_losses
from tools.bench.products import KINDS
from tools.bench.report import describe_machine, publish
from tools.bench.step_arguments import Arguments
from tools.bench.step_report import LEAN_FROM, Row, Shape, Share, describe
from tools.bench.step_work import (
    CPU,
    attention_times,
    in_turns,
    peak_of_step,
    serve_alone,
    serve_contender,
)

RECOMPUTING = {"ours, selective": "selective", "ours, attention kept": "attention_kept"}
"""Contenders that keep less, and their levels of recompute; memory.py has the whole ladder."""


def run(arguments: Arguments) -> int:
    """Measure every shape and publish the result.

    Returns:
        the exit code: 0, 1 where contenders disagree or fail, 2 where it cannot run.
    """
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    dtype = arguments.dtype or default_dtype(CPU)
    machine = describe_machine(["transformers"])
    # One document each, then many in one sample.
    shapes = [Shape((length,)) for length in arguments.lengths]
    if arguments.packed:
        shapes.append(Shape((arguments.packed // arguments.documents,) * arguments.documents))
    rows = []
    try:
        for shape in shapes:
            print(f"{shape} ...", file=sys.stderr, flush=True)
            rows.append(measure(shape, contenders_of(shape, arguments), dtype, arguments))
        share = measure_documents(dtype, arguments) if arguments.packed else None
    except RuntimeError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    publish(describe(rows, share, machine, dtype, arguments), arguments.output)
    return 0


def find_problem(arguments: Arguments) -> str | None:
    """Say why the benchmark cannot run, with a fix; None = it can."""
    too_small = find_too_small(arguments, repeats=1, lengths=2, num_layers=1)
    if too_small:
        return too_small
    if arguments.packed and (
        arguments.documents < 2
        or arguments.packed % arguments.documents
        or arguments.packed < 2 * arguments.documents
    ):
        return (
            f"--packed {arguments.packed} --documents {arguments.documents}: not equal documents "
            "of 2 tokens or "
            "more. Fix: a multiple of the documents, and at least 2 of them."
        )
    return None


def contenders_of(shape: Shape, arguments: Arguments) -> dict[str, dict]:
    """Map the contenders of a shape to their settings."""
    found: dict[str, dict] = {OURS: {}}
    # Keeping less matters where there is much to keep.
    if len(shape.lengths) == 1 and shape.tokens >= LEAN_FROM:
        found |= {name: {"recompute_granularity": level} for name, level in RECOMPUTING.items()}
    # Fewer layers, to try it out: for every contender.
    if arguments.num_layers:
        found = {
            name: settings | {"num_layers": arguments.num_layers}
            for name, settings in found.items()
        }
    changed = {"num_layers": arguments.num_layers} if arguments.num_layers else {}
    return found | {THEIRS: changed, CHECKPOINTED: changed}


def measure(shape: Shape, settings: dict[str, dict], dtype: Dtype, arguments: Arguments) -> Row:
    """Measure one row: times in turns, then the peak of each contender."""
    common = {
        "lengths": list(shape.lengths),
        "dtype": dtype,
        "seed": arguments.seed,
        "autocast": arguments.autocast,
    }
    timed = time_steps(
        settings,
        cores=usable_cores(),
        repeats=arguments.repeats,
        environment=_memory_environment(arguments),
        **common,
    )
    print(timed, file=sys.stderr, flush=True)
    # Freed memory goes back at once, so that the peak is what is in use.
    peaks = {
        name: run_fresh(
            peak_of_step,
            usable_cores(),
            environment=RETURN_MEMORY,
            name=name,
            changes=changes,
            **common,
        )["above_bytes"]
        for name, changes in settings.items()
    }
    # Medians of the rounds.
    median = statistics.median
    return Row(
        shape,
        {name: median(times) for name, times in timed["seconds"].items()},
        {
            name: {kind: median(times) for kind, times in kinds.items()}
            for name, kinds in timed["own"].items()
        },
        peaks,
        median(timed["plain_gflops"]),
        timed["loss"],
    )


def _memory_environment(arguments: Arguments) -> dict[str, str] | None:
    """Return the variables that make a process keep freed memory, where it is asked to."""
    return KEEP_MEMORY if arguments.freed_memory == "kept" else None


def time_steps(
    settings: dict[str, dict],
    lengths: list[int],
    dtype: Dtype,
    repeats: int,
    seed: int,
    cores: int,
    autocast: bool = False,
    environment: dict[str, str] | None = None,
) -> dict:
    """Time each contender's step, our products and attention, and a plain product, in turns.

    Each contender has a process of its own, and what is timed alone has one more: in a common one
    each would get the heap that the others leave. In each round everything runs once, in an order
    that turns from round to round, while the other processes wait.

    Raises:
        RuntimeError: a process failed, or losses differ.
    """
    start = partial(
        start_fresh,
        cores=cores,
        environment=environment,
        lengths=lengths,
        dtype=dtype,
        seed=seed,
    )
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        losses: dict[str, list[float]] = {}
        # First the results, then the times; these steps warm up, too.
        for name, changes in settings.items():
            contender = start(
                serve_contender, title=name, name=name, changes=changes, autocast=autocast
            )
            workers[name] = stack.enter_context(contender)
            losses[name] = workers[name].ask("losses")
        check_losses(losses)
        ours = {name: changes for name, changes in settings.items() if name not in PEERS}
        alone = stack.enter_context(start(serve_alone, title="what is timed alone", settings=ours))
        # It has warmed up when it answers. From then on only the one that is asked computes.
        alone.ask("plain_gflops")
        return take_times(workers, alone, list(ours), repeats) | {"loss": losses[OURS][0]}


def take_times(
    workers: dict[str, Worker], alone: Worker, recorded: list[str], repeats: int
) -> dict:
    """Ask every worker for its times, one after another in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    own: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in KINDS} for name in recorded
    }
    rates: list[float] = []

    def time_one(name: str) -> None:
        seconds[name].append(workers[name].ask("seconds"))

    def replay_one(name: str) -> None:
        for kind, found in alone.ask("replay", name).items():
            own[name][kind].append(found)

    in_turns(
        [
            *(lambda name=name: time_one(name) for name in workers),
            *(lambda name=name: replay_one(name) for name in recorded),
            lambda: rates.append(alone.ask("plain_gflops")),
        ],
        repeats,
    )
    return {"seconds": seconds, "own": own, "plain_gflops": rates}


def measure_documents(dtype: Dtype, arguments: Arguments) -> Share:
    """Time attention in the packed sample, and in one document of as many tokens."""
    packed = Shape((arguments.packed // arguments.documents,) * arguments.documents)
    whole = Shape((arguments.packed,))
    found = run_fresh(
        attention_times,
        usable_cores(),
        environment=_memory_environment(arguments),
        shapes=[list(packed.lengths), list(whole.lengths)],
        dtype=dtype,
        repeats=arguments.repeats,
        changes={"num_layers": arguments.num_layers} if arguments.num_layers else {},
        seed=arguments.seed,
    )["seconds"]
    return Share(packed, whole, *(statistics.median(times) for times in found))
