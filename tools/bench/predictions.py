"""Hold the plan's predictions against what runs take: `bash launch/ithaca.sh bench predictions`.

Random small runs on this machine's processes: each is calibrated at its own shapes (`plan
--calibrate`), planned with that row, and trained for some steps by launch/train.sh. Step times are
compared with the middle step's; the memory formula with the peak of live tensors of the rank that
needs most, whose step is rehearsed as `plan --verify` does.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from data.stream import usable_cores
from pretrain.planner.hardware import TABLE
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.workload import Workload
from tools import plan
from tools.bench.option_checks import find_too_small
from tools.bench.report import bar, describe_machine, markdown_table, publish
from tools.faults.launched_run import LaunchedRun
from tools.plan_verify.rehearsal import RankJob, rehearse
from tools.planning.calibrate import Processes

MEDIAN_BAR = 0.10
WORST_BAR = 0.20
MEMORY_BAR = 0.10
STEPS = 8
WARM_STEPS = 2
"""Steps at the start that are not counted: they make moments and buffers."""
HEAD_SIZE = 64
SECONDS_OF_RUN = 600


@dataclass(kw_only=True)
class Arguments:
    """Hold the options of the command line."""

    configurations: int = 20
    """Runs, on 1, 2 and 4 processes in turns."""
    seed: int = 0
    """Seed of the random draws."""
    first: int = 0
    """The number of the first run, to go on where a benchmark ended."""
    output: str | None = None
    """Also append the report to this file."""


@dataclass(frozen=True)
class Configuration:
    """Describes one run."""

    processes: int
    tp: int
    pp: int
    cp: int
    hidden: int
    layers: int
    seq_length: int
    micro_batch_size: int
    num_microbatches: int
    recompute: str
    is_bf16: bool
    vocab_size: int

    @property
    def dp(self) -> int:
        """Ranks that train other samples."""
        return self.processes // (self.tp * self.pp * self.cp)

    @property
    def flags(self) -> list[str]:
        """Write the run's command line."""
        batch = self.micro_batch_size * self.num_microbatches * self.dp
        words = f"""--model tiny --num-layers {self.layers} --hidden-size {self.hidden}
            --ffn-hidden-size {8 * self.hidden // 3 // 64 * 64}
            --num-attention-heads {self.hidden // HEAD_SIZE}
            --num-query-groups {self.hidden // HEAD_SIZE // 2}
            --tensor-model-parallel-size {self.tp} --pipeline-model-parallel-size {self.pp}
            --context-parallel-size {self.cp}
            --seq-length {self.seq_length} --micro-batch-size {self.micro_batch_size}
            --global-batch-size {batch} --train-tokens {STEPS * batch * self.seq_length}
            --mock-data --vocab-size {self.vocab_size} --lr 1e-4 --eval-iters 0
            --log-interval 1 --save-interval {10 * STEPS}""".split()
        if self.recompute != "none":
            words += ["--recompute-granularity", self.recompute]
        return [*words, "--bf16" if self.is_bf16 else "--no-bf16"]

    def describe(self) -> list[str]:
        """Write the cells of a table."""
        axes = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "dp": self.dp}
        layout = " ".join(f"{name} {size}" for name, size in axes.items() if size > 1)
        batch = f"{self.num_microbatches} x {self.micro_batch_size} x {self.seq_length}"
        precision = "bf16" if self.is_bf16 else "fp32"
        return [
            str(self.processes),
            layout or "-",
            f"{self.layers} x {self.hidden}",
            str(self.vocab_size),
            batch,
            self.recompute,
            precision,
        ]


def draw(seed: int, count: int) -> Iterator[Configuration]:
    """Draw runs of random sizes, layouts, lengths, batches and savings of memory."""
    generator = random.Random(seed)
    for number in range(count):
        processes = (1, 2, 4)[number % 3]
        tp, pp, cp = generator.choice(_layouts(processes))
        # Heads and their halves must part over tp and cp.
        hidden = generator.choice([HEAD_SIZE * heads for heads in (4, 8, 12)])
        if tp * cp == 4:
            hidden = 8 * HEAD_SIZE
        yield Configuration(
            processes=processes,
            tp=tp,
            pp=pp,
            cp=cp,
            hidden=hidden,
            layers=generator.choice([4, 8]),
            seq_length=generator.choice([256, 512, 1024]),
            micro_batch_size=generator.choice([1, 2]),
            num_microbatches=pp * generator.choice([1, 2]),
            recompute=generator.choice(["none", "selective", "full"]),
            is_bf16=generator.choice([True, False]),
            vocab_size=generator.choice([4096, 16384]),
        )


def _layouts(processes: int) -> list[tuple[int, int, int]]:
    """List all sizes of tp, pp and cp that part the processes."""
    sizes = [size for size in (1, 2, 4) if size <= processes]
    return [
        (tp, pp, cp)
        for tp in sizes
        for pp in sizes
        for cp in sizes
        if processes % (tp * pp * cp) == 0
    ]


@dataclass(frozen=True)
class Compared:
    """Holds what was predicted for a run, and what it took."""

    configuration: Configuration
    predicted_seconds: float
    seconds: float
    predicted_bytes: int
    live_bytes: int
    parts: dict[str, float]

    @property
    def error(self) -> float:
        """Share by which the step time is missed."""
        return self.predicted_seconds / self.seconds - 1

    @property
    def memory_error(self) -> float:
        """Share by which the memory is missed."""
        return self.predicted_bytes / self.live_bytes - 1

    def cells(self) -> list[str]:
        """Write the cells of a table."""
        return [
            *self.configuration.describe(),
            f"{self.seconds:.3f}",
            f"{self.predicted_seconds:.3f}",
            f"{100 * self.error:+.1f} %",
            f"{100 * self.memory_error:+.1f} %",
        ]


def compare(configuration: Configuration, folder: Path) -> Compared:
    """Calibrate, plan and train one run."""
    row = folder / "row.yaml"
    size = configuration.processes
    # Calibrated at the shapes of the run, as a user would.
    plan.calibrate_here(plan.Arguments(world_size=size, calibrate=str(row)), configuration.flags)
    arguments = plan.Arguments(world_size=size, hardware_file=str(row))
    checked = plan.check_run(arguments, configuration.flags)
    speed = plan.estimate_run(checked, arguments, configuration.flags).phases[0].speed
    predicted_bytes, live_bytes = compare_memory(checked)
    return Compared(
        configuration,
        speed.step_seconds,
        train(configuration, folder / "save"),
        predicted_bytes,
        live_bytes,
        speed.parts_seconds.parts,
    )


def compare_memory(checked: plan.CheckedRun) -> tuple[int, int]:
    """Rehearse a step of the rank that needs most -> the formula's bytes, and the live tensors'."""
    run = replace(checked.to_verify, hardware=TABLE["H100"])
    phase = run.phases[0]
    load = Workload.of_phase(phase, run.world_size)
    model = MemoryModel.of_run(run.config, run.vocab_size, run.hardware, with_kernels=False)
    stages = load.layout.pipeline_model_parallel_size
    fullest = max(range(stages), key=lambda rank: model.estimate_rank(load, rank).total)
    # The first rank of its stage: pp is the slowest axis.
    rank = fullest * (run.world_size // stages)
    job = RankJob(run.config, phase, run.vocab_size, run.world_size, rank, load.num_microbatches)
    return model.estimate_rank(load, fullest).total, rehearse(job).peak_bytes


def train(configuration: Configuration, save: Path) -> float:
    """Train the run -> the seconds of its middle step."""
    # The threads that it would have, and that were calibrated with.
    threads = Processes(configuration.processes, usable_cores()).threads
    run = LaunchedRun(
        configuration.flags,
        save,
        configuration.processes,
        environment={"OMP_NUM_THREADS": str(threads)},
    )
    try:
        code, said = run.wait(SECONDS_OF_RUN)
    finally:
        run.end()
    if code != 0:
        raise RuntimeError("the run failed:\n" + "\n".join(said.splitlines()[-30:]))
    lines = (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return median(json.loads(line)["step_seconds"] for line in lines[WARM_STEPS:])


def run(arguments: Arguments) -> int:
    """Compare all runs, print the table; 0 if the bars hold, 2 where there is no run."""
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    began = time.monotonic()
    machine = describe_machine(("megatron-core",))
    found = []
    for number, configuration in enumerate(draw(arguments.seed, arguments.configurations)):
        if number < arguments.first:
            continue
        with tempfile.TemporaryDirectory(prefix="ithaca-predictions-") as folder:
            found.append(compare(configuration, Path(folder)))
        print(number, " | ".join(found[-1].cells()), flush=True)
        shown = {name: round(seconds, 3) for name, seconds in found[-1].parts.items() if seconds}
        print(f"  predicted: {shown}", flush=True)
    errors = [abs(each.error) for each in found]
    memory = [abs(each.memory_error) for each in found]
    header = "processes layout layers vocabulary batch recompute precision seconds predicted error"
    publish(
        "\n".join(
            [
                machine,
                "",
                markdown_table(
                    [*header.split(), "memory"],
                    [each.cells() for each in found],
                ),
                "",
                f"{len(found)} runs in {(time.monotonic() - began) / 60:.0f} min.",
                "",
                bar("step time missed by, median", median(errors), MEDIAN_BAR),
                bar("step time missed by, worst", max(errors), WORST_BAR),
                bar("memory missed by, worst", max(memory), MEMORY_BAR),
            ]
        ),
        arguments.output,
    )
    reached = (
        median(errors) <= MEDIAN_BAR and max(errors) <= WORST_BAR and max(memory) <= MEMORY_BAR
    )
    return 0 if reached else 1


def find_problem(arguments: Arguments) -> str | None:
    """Say why the benchmark cannot run, with a fix; None = it can."""
    too_small = find_too_small(arguments, configurations=1, first=0)
    if too_small:
        return too_small
    if arguments.first >= arguments.configurations:
        return (
            f"--first {arguments.first}: must be below --configurations "
            f"{arguments.configurations}. Fix: more of these."
        )
    return None
