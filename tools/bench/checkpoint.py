"""Saves and loads: what a save costs training, and how fast files are beside the bare disk.

One process trains a model on one thread and saves in turns as the trainer does, and with DCP's own
`async_save`. Then the state is written and read in turns: by us, by DCP, and as bare bytes.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from data.units import show_bytes
from model.attention_backends.choice import choose_attention
from parallel.layout import Axis, build_layout, end_world, start_world
from pretrain.batches import Feed
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.folders import iteration_folder
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.saver import Saver
from pretrain.config.load import load_config
from pretrain.logs.metrics import Reporter
from pretrain.logs.tally import StepTally
from pretrain.plan import make_plan
from pretrain.planner.model_size import document_cost_of
from pretrain.state import TrainState, build_state, checkpoint_tensors, compute_dtype
from pretrain.step import Stepper, train_step
from tools.bench.option_checks import find_too_small
from tools.bench.report import bar, bar_at_least, describe_machine, markdown_table, publish

BYTES_PER_PARAMETER = 12
"""fp32 weight and Adam's two moments."""
BLOCK_BYTES = 1 << 20
"""Bytes of a bare write or read. Larger ones are slower: the kernel holds back who writes 16 MiB at
once, and the bare write took twice as long as ours."""
VOCABULARY = 1000
HEADS = 8
"""Heads of the model."""
STALL_SECONDS_PER_GB = 0.025
"""0.05 s for 2 GB of state."""
HIDING_STEP_RATIO = 1.1
RATE_RATIO = 0.9


@dataclass(kw_only=True)
class Arguments:
    """Sizes, and how often to repeat."""

    state_gb: float = 2.0
    """GB of weights and moments."""
    hidden: int = 1024
    """Width of the model; its layers follow from the size of the state."""
    tokens: int = 512
    """Tokens of a step."""
    rounds: int = 3
    """Saves of each kind beside training; medians count."""
    file_rounds: int = 9
    """Writes and reads of each kind; medians count, for a disk is not as steady as a processor."""
    threads: int = 1
    """Threads of training, as torchrun gives them; a save takes another core."""
    folder: str | None = None
    """Where to write; by default a temporary folder."""
    output: str | None = None
    """File to append the result to, as Markdown."""


@dataclass
class Timed:
    """Seconds of one kind of save, a number for each."""

    stalls: list[float] = field(default_factory=list)
    """What the call takes."""
    hiding: list[float] = field(default_factory=list)
    """The step after it."""
    totals: list[float] = field(default_factory=list)
    """Until the files are there."""


class Bench:
    """Trains one process of a run, and saves it."""

    def __init__(self, arguments: Arguments, folder: Path):
        torch.set_num_threads(arguments.threads)
        self.rounds = arguments.rounds
        self.file_rounds = arguments.file_rounds
        self.folder = folder
        config = load_config(_flags(arguments, folder / "ours"))
        self.plan = make_plan(config, 1)
        (self.phase,) = self.plan.phases
        world = start_world(config.layout)
        self.layout = build_layout(self.phase.layout, world)
        dtype = compute_dtype(config.optimizer)
        attend, _ = choose_attention("sdpa", self.layout.device, dtype)
        self.state: TrainState = build_state(self.plan, self.phase, self.layout, attend)
        for stage in self.state.stages:
            stage.rope = self.phase.rope
            stage.memory = self.phase.memory
        self.stepper = Stepper(
            self.state.stages,
            self.layout,
            config.model.hidden_size,
            dtype,
            self.phase.layout.sharding_strategy,
        )
        feed = Feed(
            config.data,
            self.plan.corpus,
            self.plan.ledger,
            self.layout,
            eod=None,
            vocab_size=VOCABULARY,
            cost=document_cost_of(config.model, VOCABULARY),
        )
        feed.enter(self.phase, 0)
        self.batch = [part.to(self.layout.device) for part in feed.read(0)]
        reporter = Reporter(config, 0, None, is_writer=False)
        self.tally = StepTally()
        self.saver = Saver(self.plan, self.layout, self.state, reporter, None)
        self.live = checkpoint_tensors(self.state, with_optimizer=True)
        self.num_bytes = sum(tensor.nbytes for tensor in map(_local, self.live.values()))
        for _ in range(2):
            self.step()

    def step(self) -> float:
        """Train a step -> its seconds."""
        began = time.perf_counter()
        result = train_step(
            self.stepper,
            self.state.optimizer,
            self.batch,
            1e-4,
            1.0,
            before_update=self.saver.wait_copied,
        )
        self.state.advance(self.phase.batch_at(self.state.clock), skipped=result.skipped)
        self.tally.note(result)
        return time.perf_counter() - began

    def close(self) -> None:
        """Leave the groups."""
        self.saver.close(finish=False)
        end_world()

    # ------------------------------------------------------------ saves beside training

    def save_beside_training(self) -> tuple[list[float], Timed, Timed]:
        """Save in turns, ours and DCP's -> seconds of steps without a save, and of both."""
        steps: list[float] = []
        ours = Timed()
        theirs = Timed()
        for number in range(self.rounds):
            steps += [self.step(), self.step()]
            self._save_as_a_run(ours)
            steps.append(self.step())
            self._save_as_dcp(theirs, self.folder / f"dcp{number}")
        return steps, ours, theirs

    def _save_as_a_run(self, timed: Timed) -> None:
        began = time.perf_counter()
        self.saver.save(self.phase, self.tally, None, ends_phase=False, is_last=False)
        timed.stalls.append(time.perf_counter() - began)
        step = self.state.step
        timed.hiding.append(self.step())
        while self.saver.is_at_work:
            self.step()
        self.saver.wait_published()
        timed.totals.append(time.perf_counter() - began)
        shutil.rmtree(iteration_folder(self.folder / "ours", step))

    def _save_as_dcp(self, timed: Timed, folder: Path) -> None:
        began = time.perf_counter()
        saved = dcp.async_save(
            self.live,
            storage_writer=dcp.FileSystemWriter(folder),
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
            process_group=self._axis.group,
        )
        timed.stalls.append(time.perf_counter() - began)
        timed.hiding.append(self.step())
        future = cast(Future[Any], saved)
        while not future.done():
            self.step()
        future.result()
        timed.totals.append(time.perf_counter() - began)
        shutil.rmtree(folder)

    @property
    def _axis(self) -> Axis:
        return self.layout.world

    # ------------------------------------------------------------ files alone

    def write_in_turns(self) -> dict[str, list[float]]:
        """Write the state as bare bytes, by us and by DCP, while nothing else goes on."""
        ways: dict[str, Callable[[Path], object]] = {
            "bare": self._write_bare,
            "ours": lambda folder: self._write_ours(folder),
            "DCP": lambda folder: dcp.save(
                self.live, storage_writer=dcp.FileSystemWriter(folder), process_group=None
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(self.file_rounds):
            for name, write in _rotated(ways, turn):
                folder = self.folder / f"written-{name}"
                shutil.rmtree(folder, ignore_errors=True)
                os.sync()
                began = time.perf_counter()
                write(folder)
                seconds[name].append(time.perf_counter() - began)
        return seconds

    def _write_bare(self, folder: Path) -> None:
        """Write the bytes of all tensors into one file, and sync it."""
        folder.mkdir()
        with open(folder / "bytes", "wb", buffering=0) as file:
            for tensor in self.live.values():
                view = _local(tensor).view(-1).numpy().data.cast("B")
                for begin in range(0, len(view), BLOCK_BYTES):
                    file.write(view[begin : begin + BLOCK_BYTES])
            os.fsync(file.fileno())

    def _write_ours(self, folder: Path) -> Path:
        progress = Progress(
            step=1, clock=0, phase={}, longest_seq_length=0, data=None, tokenizer=None
        )
        return checkpoint.save(folder, 1, self.live, progress, "", {}, self._axis)

    def read_in_turns(self) -> dict[str, list[float]]:
        """Read what `write_in_turns` left, from the disk: bare bytes with a checksum, and ours."""
        ours = iteration_folder(self.folder / "written-ours", 1)
        files = [path for path in ours.rglob("*") if path.is_file()]
        ways: dict[str, Callable[[], object]] = {
            "bare": lambda: [_hash(path) for path in files],
            "ours": lambda: checkpoint.load(ours, self.live, self._axis),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(self.file_rounds):
            for name, read in _rotated(ways, turn):
                for path in files:
                    with open(path, "rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                began = time.perf_counter()
                read()
                seconds[name].append(time.perf_counter() - began)
        return seconds


def _flags(arguments: Arguments, folder: Path) -> list[str]:
    """Make the flags of a run whose state has the size that is asked for."""
    hidden = arguments.hidden
    # Attention and MLP of a layer, roughly: the report says how large the state became.
    of_layer = 16 * hidden * hidden
    parameters = arguments.state_gb * 1e9 / BYTES_PER_PARAMETER - 2 * VOCABULARY * hidden
    values = {
        "num-layers": max(1, round(parameters / of_layer)),
        "hidden-size": hidden,
        "ffn-hidden-size": 4 * hidden,
        "num-attention-heads": HEADS,
        "num-query-groups": HEADS,
        "vocab-size": VOCABULARY,
        "seq-length": arguments.tokens,
        "global-batch-size": 1,
        "micro-batch-size": 1,
        "train-iters": 1_000_000,
        "lr": 1e-4,
        "eval-iters": 0,
        "save": folder,
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [*flags, "--mock-data", "--keep-all", "--no-bf16"]


def _rotated(
    ways: dict[str, Callable[..., object]], turn: int
) -> list[tuple[str, Callable[..., object]]]:
    """Begin each turn with another way: what the one before left to the disk hits each alike."""
    items = list(ways.items())
    first = turn % len(items)
    return items[first:] + items[:first]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def _hash(path: Path) -> str:
    """Read a file, and hash it."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- the report


def run(arguments: Arguments) -> int:
    """Run the benchmark and print its report; returns 0, or 2 where it cannot run."""
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    machine = describe_machine([])
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="ithaca-bench-") as folder:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        bench = Bench(arguments, Path(folder))
        try:
            steps, ours, theirs = bench.save_beside_training()
            written = bench.write_in_turns()
            read = bench.read_in_turns()
        finally:
            bench.close()
    text = describe(machine, bench.num_bytes, steps, ours, theirs, written, read)
    publish(text, arguments.output)
    return 0


def find_problem(arguments: Arguments) -> str | None:
    """Say why the benchmark cannot run, with a fix; None = it can."""
    too_small = find_too_small(
        arguments, state_gb=0, hidden=1, tokens=1, rounds=1, file_rounds=1, threads=1
    )
    if too_small:
        return too_small
    # A rope turns pairs of a head's channels.
    multiple = 2 * HEADS
    if arguments.hidden % multiple:
        return (
            f"--hidden {arguments.hidden}: must be a multiple of {multiple}, for {HEADS} heads. "
            "Fix: for example 1024."
        )
    return None


def describe(
    machine: str,
    num_bytes: int,
    steps: list[float],
    ours: Timed,
    theirs: Timed,
    written: dict[str, list[float]],
    read: dict[str, list[float]],
) -> str:
    """Write tables and bars."""
    plain = statistics.median(steps)
    rows = []
    for name, timed in (("ours", ours), ("DCP's async_save", theirs)):
        stall, hiding, total = (
            statistics.median(seconds) for seconds in (timed.stalls, timed.hiding, timed.totals)
        )
        rows.append(
            [
                name,
                f"{timed.stalls[0]:.3f}",
                f"{stall:.3f}",
                f"{hiding:.2f}",
                f"{hiding / plain:.2f}",
                f"{total:.1f}",
            ]
        )
    header = ["save", "first stall s", "stall s", "step after s", "/ plain step", "until there s"]
    files = [["written, " + name, *_rate(num_bytes, seconds)] for name, seconds in written.items()]
    files += [["read, " + name, *_rate(num_bytes, seconds)] for name, seconds in read.items()]
    allowed = STALL_SECONDS_PER_GB * num_bytes / 1e9
    median = {name: statistics.median(seconds) for name, seconds in written.items()}
    median_read = {name: statistics.median(seconds) for name, seconds in read.items()}
    return "\n".join(
        [
            f"State of {show_bytes(num_bytes)}, a step of {plain:.2f} s without a save. {machine}",
            "",
            markdown_table(header, rows),
            "",
            markdown_table(["files", "s", "GB/s"], files),
            "",
            bar("longest stall of a save, s, the first included", max(ours.stalls), allowed),
            bar(
                "step that hides the copy / step without",
                statistics.median(ours.hiding) / plain,
                HIDING_STEP_RATIO,
            ),
            bar_at_least("rate of writing / bare", median["bare"] / median["ours"], RATE_RATIO),
            bar_at_least(
                "rate of reading / bare and checksum",
                median_read["bare"] / median_read["ours"],
                RATE_RATIO,
            ),
        ]
    )


def _rate(num_bytes: int, seconds: list[float]) -> list[str]:
    taken = statistics.median(seconds)
    return [f"{taken:.2f}", f"{num_bytes / 1e9 / taken:.2f}"]
