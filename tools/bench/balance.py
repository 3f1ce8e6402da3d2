"""Balance of data ranks: does dealing samples by cost shorten a step, and what remains to be waited
for?

First steps of a small model on 2 and 4 processes, dealt in order and by cost; then the cost of the
documents of large steps, by the data engine alone; then the time that dealing takes.
"""

import sys
from dataclasses import dataclass, fields

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from data.config import Packing
from tools.bench.balance_documents import LONG_SHARE
from tools.bench.balance_estimate import Documents, Waits, draw, time_dealing, waits_of
from tools.bench.balance_report import TimedJob, describe
from tools.bench.balance_step import MODELS, Job, run_processes
from tools.bench.contenders import default_dtype
from tools.bench.fresh import run_fresh
from tools.bench.report import describe_machine, publish

PACKINGS: tuple[Packing, ...] = ("concat", "best_fit")


@dataclass(kw_only=True)
class Arguments:
    """Hold the options of the command line."""

    processes: tuple[int, ...] = (2, 4)
    """Data ranks of the timed steps; none = no step is timed."""
    steps: int = 2
    """Timed steps of each."""
    models: tuple[str, ...] = ("32K", "128K", "tiny")
    """Models of the timed steps: that whose attention has the share of an 8B model's at 32K or at
    128K, or of the preset tiny's at 32K (balance_step.py: MODELS)."""
    seq_length: int = 32 * 1024
    """Tokens of their samples."""
    num_microbatches: int = 4
    """Microbatches of each rank."""
    dp_sizes: tuple[int, ...] = (16, 64)
    """Data ranks of the estimate."""
    samples: int = 16384
    """Samples of 128K of the estimate; of 1M a quarter of them."""
    dealt_samples: int = 1024
    """Samples of 1M of the step whose dealing is timed."""
    repeats: int = 9
    """How often it is dealt; medians count."""
    seed: int = 1234
    """Seed of the documents."""
    output: str | None = None
    """File to append the result to, as Markdown."""


def run(arguments: Arguments) -> int:
    """Measure, estimate and publish the result.

    Returns:
        the exit code: 0, 1 where the timed steps fail or disagree, 2 where it cannot run.
    """
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    machine = describe_machine([])
    dealing: dict[str, dict] = {
        packing: run_fresh(
            time_dealing,
            1,
            packing=packing,
            samples=arguments.dealt_samples,
            seq_length=1 << 20,
            repeats=arguments.repeats,
            seed=arguments.seed,
        )
        for packing in PACKINGS
    }
    timed = []
    try:
        for model in arguments.models:
            for processes in arguments.processes:
                print(f"{model}, {processes} processes ...", file=sys.stderr, flush=True)
                job = job_of(arguments, model, processes)
                timed.append(TimedJob(model, job, run_processes(job)))
    except (ProcessRaisedException, ProcessExitedException) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    text = describe(machine, timed, estimates(arguments), dealing)
    publish(text, arguments.output)
    return 0


def find_problem(arguments: Arguments) -> str | None:
    """Say why the benchmark cannot run, with a fix; None = it can."""
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        if isinstance(value, int) and field.name != "seed" and value < 1:
            return f"{field.name} = {value}: must be at least 1. Fix: give more."
    unknown = [model for model in arguments.models if model not in MODELS]
    if unknown:
        return f"models = {unknown[0]}: is not known. Fix: {', '.join(MODELS)}."
    if min(arguments.processes, default=1) < 1:
        return f"processes = {arguments.processes}: must be at least 1 each. Fix: 2 4."
    if min(arguments.dp_sizes, default=0) < 1:
        return f"dp_sizes = {arguments.dp_sizes}: must be at least 1 each. Fix: 16 64."
    if arguments.dealt_samples % 16:
        return (
            f"dealt_samples = {arguments.dealt_samples}: the step that is dealt has 16 samples on "
            "each rank. Fix: a multiple of 16."
        )
    most = max(16 * dp_size for dp_size in arguments.dp_sizes)
    if arguments.samples < most:
        return (
            f"samples = {arguments.samples}: a step has 16 microbatches on {most // 16} ranks. "
            f"Fix: at least {most}."
        )
    return None


def job_of(arguments: Arguments, model: str, processes: int) -> Job:
    """Describe the steps that are timed on that many processes."""
    return Job(
        processes=processes,
        model=MODELS[model],
        dtype=default_dtype(torch.device("cpu")),
        seq_length=arguments.seq_length,
        num_microbatches=arguments.num_microbatches,
        steps=arguments.steps,
        long_share=LONG_SHARE,
        seed=arguments.seed,
    )


def estimates(arguments: Arguments) -> list[Waits]:
    """Estimate steps of 128K with 16 microbatches, and of 1M with one sample for each rank."""
    short = 128 * 1024
    long = 1024 * 1024
    found = []
    for documents, count, samples in (
        (Documents(short, 0.0), 16, arguments.samples),
        (Documents(short), 16, arguments.samples),
        (Documents(long, 0.0), 1, arguments.samples // 4),
        (Documents(long), 1, arguments.samples // 4),
        # Documents as long as a sample: no packing makes others as costly.
        (Documents(long, long_up_to=long), 1, arguments.samples // 4),
    ):
        for dp_size in arguments.dp_sizes:
            drawn = draw(documents, samples, dp_size * count, arguments.seed)
            found.append(waits_of(drawn, dp_size, count))
    return found
