"""Verifies a plan: the run's own code, rank by rank, on device meta and torch's backend "fake".

What a launch would find out after an hour in a queue is found here: groups that differ, collectives
in another order, messages that nobody receives, bytes and memory that are not what the plan says.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from pretrain.config.config import Config
from pretrain.planner.hardware import Hardware
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.workload import Workload
from pretrain.schedule.phases import Phase
from tools.plan_verify.checks import (
    check_bytes,
    check_device,
    check_groups,
    check_memory,
    check_order,
)
from tools.plan_verify.rehearsal import RankJob, RankTrace, rehearse
from tools.plan_verify.sample import rehearsed_part, sampled_ranks

NOT_COVERED = (
    "not covered: values, times, NCCL itself, what happens inside an attention kernel, offloaded "
    "layers and optimizers, saves and evaluations"
)
PRELOADED = ["tools.plan_verify.preload"]
"""Modules that take seconds to import: the server of processes imports them once."""


@dataclass(frozen=True)
class CheckResult:
    """Says what one check of one phase found."""

    phase: str
    check: str
    ranks: tuple[int, ...]
    result: str
    problems: tuple[str, ...]
    seconds: float

    def describe(self) -> str:
        """Write the check in a line."""
        verdict = "WRONG" if self.problems else "ok"
        return f"{self.phase:<10} {self.check:<10} {verdict:<6} {self.result}"


@dataclass(frozen=True)
class Verification:
    """Holds everything that was checked."""

    results: tuple[CheckResult, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, a line each."""
        return [
            f"phase {result.phase!r}: {result.check}: {problem}"
            for result in self.results
            for problem in result.problems
        ]

    def describe(self) -> str:
        """Write a short table, what was left out, and the verdict."""
        lines = [f"{'phase':<10} {'check':<10} {'':<6} result"]
        lines += [result.describe() for result in self.results]
        count = len(self.problems)
        verdict = f"{count} problems" if count else "everything agrees"
        return "\n".join([*lines, *self.notes, f"verified in {self.seconds:.0f} s: {verdict}"])


@dataclass(frozen=True)
class PlannedRun:
    """Holds what is verified: a run's settings, and the devices that it is planned for."""

    config: Config
    phases: Sequence[Phase]
    """With their layouts chosen."""
    vocab_size: int
    world_size: int
    hardware: Hardware
    memory_bytes: int
    """Memory of one device."""

    def validate(self) -> list[str]:
        """List why this cannot be verified."""
        if not self.hardware.is_cpu:
            return []
        return [
            "verify = True: rehearses what GPUs compute, and the plan is for CPUs. Fix: "
            "--hardware h100, or another GPU."
        ]


def verify(
    run: PlannedRun,
    say: Callable[[str], None] = lambda _line: None,
    work: Callable[[RankJob], RankTrace] = rehearse,
) -> Verification:
    """Rehearse one step of each phase on a sample of ranks, and compare what they did.

    Args:
        say: is given a line when each phase begins.
        work: what each process does.

    Raises:
        ValueError: the run cannot be verified.
    """
    problems = run.validate()
    if problems:
        raise ValueError("\n".join(problems))
    began = time.monotonic()
    results: list[CheckResult] = []
    notes: list[str] = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        for phase in run.phases:
            ranks = sampled_ranks(phase.layout, run.world_size)
            say(f"verifying phase {phase.name} on ranks {' '.join(map(str, ranks))}")
            found, note = _verify_phase(pool, work, run, phase, ranks)
            results += found
            notes += [f"phase {phase.name}: ran {note}"] if note else []
    return Verification(tuple(results), (*notes, NOT_COVERED), time.monotonic() - began)


def _rehearse_all(
    pool: ProcessPoolExecutor, work: Callable[[RankJob], RankTrace], jobs: Sequence[RankJob]
) -> tuple[list[RankTrace], list[str]]:
    """Rehearse every rank -> the traces, and a line for each rank that fails."""
    traces = []
    failures = []
    futures = [pool.submit(work, job) for job in jobs]
    for job, future in zip(jobs, futures, strict=True):
        try:
            traces.append(future.result())
        except Exception as error:
            text = str(error).splitlines() or [""]
            failures.append(f"rank {job.rank}: its step fails: {type(error).__name__}: {text[0]}")
    return traces, failures


def _verify_phase(
    pool: ProcessPoolExecutor,
    work: Callable[[RankJob], RankTrace],
    run: PlannedRun,
    phase: Phase,
    ranks: Sequence[int],
) -> tuple[list[CheckResult], str]:
    """Check one phase -> its results, and what was run of it where that is not all."""
    part = rehearsed_part(run.config, phase, run.world_size)
    began = time.monotonic()
    jobs = [
        RankJob(part.config, phase, run.vocab_size, run.world_size, rank, part.num_microbatches)
        for rank in ranks
    ]
    traces, failures = _rehearse_all(pool, work, jobs)
    seconds = time.monotonic() - began
    if failures:
        result = f"{len(failures)} of {len(ranks)} ranks fail"
        return [
            CheckResult(phase.name, "step", tuple(ranks), result, tuple(failures), seconds)
        ], part.note
    # What was run is compared with the formulas for as much; the device must hold the whole step.
    whole = Workload.of_phase(phase, run.world_size)
    load = replace(whole, num_microbatches=part.num_microbatches)
    # What a kernel takes inside is no tensor of ours.
    model = MemoryModel.of_run(part.config, run.vocab_size, run.hardware, with_kernels=False)
    whole_model = MemoryModel.of_run(run.config, run.vocab_size, run.hardware)
    memory, wrong_memory, share = check_memory(traces, model, load)
    steps = f"{len(ranks)} ranks, {sum(trace.operations for trace in traces):,} operations"
    found = {
        "step": (f"{steps} in {seconds:.1f} s", []),
        "groups": check_groups(traces, phase.layout, run.world_size),
        "order": check_order(traces),
        "bytes": check_bytes(traces, model, load, run.hardware),
        "memory": (memory, wrong_memory),
        "device": check_device(traces, whole_model, whole, share, run.memory_bytes),
    }
    return [
        CheckResult(phase.name, name, tuple(ranks), result, tuple(problems), seconds)
        for name, (result, problems) in found.items()
    ], part.note
