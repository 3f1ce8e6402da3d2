"""Steps of the real trainer on several data ranks, with samples dealt in order and by cost.

Both run in the same processes, on the same model and the same steps, in turns. The learning rate is
0, so that both have the same loss of the same step, which is compared.
"""

import gc
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from data.dealing import Dealing
from data.document_cost import DocumentCost
from data.loader import Loader
from data.mixture import fresh_mixture
from model.attention_backends.choice import choose_attention
from model.build import build_stages
from model.config import ModelConfig
from model.init import initialize
from parallel.config import LayoutConfig
from parallel.layout import Layout, build_layout, end_world, start_world
from pretrain.optimizer import build_optimizer
from pretrain.planner.model_size import document_cost_of
from pretrain.processes.heartbeat import Heartbeat
from pretrain.step import Stepper, train_step
from tools.bench.balance_documents import make_stream
from tools.bench.contenders import OPTIMIZER, STRATEGY, Dtype
from tools.bench.fresh import KEEP_MEMORY

IN_ORDER = "in order"
DEALT = "dealt"
TOLERANCE = 1e-4
"""Largest relative difference of the two losses of a step: sums in another order."""
WARM_TOKENS = 1024
"""Tokens of a sample of the step that warms up, at most."""
SPARE = 1.5
"""The stream has so many times the tokens that are drawn."""


@dataclass(frozen=True)
class ModelShape:
    """Describes a model of one layer with one head, so that long samples take little time."""

    hidden_size: int
    ffn_hidden_size: int
    head_size: int = 16
    vocab_size: int = 512

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return ModelConfig(
            num_layers=1,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=1,
            kv_channels=self.head_size,
        )

    @property
    def cost(self) -> DocumentCost:
        """What documents cost it."""
        return document_cost_of(self.config, self.vocab_size)


MODELS = {"32K": ModelShape(128, 2176), "128K": ModelShape(64, 1000), "tiny": ModelShape(32, 454)}
"""Length -> a model whose attention to a document of 32K tokens has the share of the FLOPs that an
8B model's has at that length; "tiny" -> the share that the preset tiny's has at 32K."""


def whose_attention(model: str) -> str:
    """Say whose share of attention one of MODELS has."""
    return "the tiny preset at 32K" if model == "tiny" else f"8B at {model}"


@dataclass(frozen=True)
class Job:
    """Describes the steps that are timed."""

    processes: int
    model: ModelShape
    dtype: Dtype
    seq_length: int
    num_microbatches: int
    steps: int
    long_share: float
    seed: int


@dataclass(frozen=True)
class Timed:
    """Holds what each step took, a number for each step."""

    seconds: list[float]
    cpu_seconds: list[float]
    """With a core for each rank: the sum over microbatches of the slowest rank's CPU seconds."""
    imbalance: list[float]
    """By cost, of what was dealt."""


def run_processes(job: Job) -> dict[str, Timed]:
    """Time the steps in one world of processes; `spawn` ends the others when one fails."""
    with tempfile.TemporaryDirectory(prefix="ithaca-bench-") as folder:
        # Read by each process's allocator when it starts.
        os.environ.update(KEEP_MEMORY, GLOO_SOCKET_IFNAME="lo")
        spawn(work, args=(job, folder), nprocs=job.processes)
        found = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    return {name: Timed(**times) for name, times in found.items()}


def work(rank: int, job: Job, folder: str) -> None:
    """Time the steps as one process of a world; rank 0 leaves the results in `folder`."""
    # The clock of a thread (_note) counts no other thread's time.
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), job.processes)
    world = start_world(LayoutConfig(), store, rank, job.processes)
    try:
        found = time_steps(job, build_layout(LayoutConfig(), world))
        if rank == 0:
            text = json.dumps({name: asdict(times) for name, times in found.items()})
            (Path(folder) / "results.json").write_text(text, encoding="utf-8")
    finally:
        gc.collect()
        end_world()


def time_steps(job: Job, layout: Layout) -> dict[str, Timed]:
    """Time each step once with either dealing, in an order that turns; collective.

    Raises:
        ValueError: the two have different losses.
    """
    trainer = Trainer(job, layout)
    loaders = {IN_ORDER: make_loader(job, layout, None)}
    loaders[DEALT] = make_loader(job, layout, Dealing(job.model.cost, "microbatch"))
    trainer.step(make_loader(job, layout, None, min(WARM_TOKENS, job.seq_length)), 0)
    found = {name: Timed([], [], []) for name in loaders}
    for number in range(job.steps):
        losses = {}
        clock = number * loaders[DEALT].global_batch_tokens
        for name in list(loaders)[:: -1 if number % 2 else 1]:
            loss, seconds, cpu = trainer.step(loaders[name], clock)
            losses[name] = loss
            found[name].seconds.append(seconds)
            found[name].cpu_seconds.append(cpu)
        dealt = loaders[DEALT].dealt
        found[IN_ORDER].imbalance.append(dealt.imbalance_in_order or 1.0)
        found[DEALT].imbalance.append(dealt.imbalance or 1.0)
        if abs(losses[DEALT] / losses[IN_ORDER] - 1) > TOLERANCE:
            raise ValueError(f"step {number}: the losses differ: {losses}")
    return found


def make_loader(
    job: Job, layout: Layout, dealing: Dealing | None, seq_length: int | None = None
) -> Loader:
    """Make a loader of the job's steps."""
    length = seq_length or job.seq_length
    step_tokens = length * job.num_microbatches * job.processes
    tokens = round(SPARE * job.steps * step_tokens)
    stream = make_stream(tokens, job.long_share, job.seed, vocab_size=job.model.vocab_size)
    return Loader(
        fresh_mixture([(1.0, stream)], length, "best_fit"),
        micro_batch_size=1,
        global_batch_tokens=step_tokens,
        dp_rank=layout.dp.rank,
        dp_size=layout.dp.size,
        prefetch=False,
        dealing=dealing,
    )


class Trainer:
    """Trains with the trainer's own stage, stepper, optimizer and step, as `contenders.Ours`."""

    def __init__(self, job: Job, layout: Layout):
        self.layout = layout
        config = job.model.config
        dtype = getattr(torch, job.dtype)
        attend, _ = choose_attention(config.attention_backend, layout.device, dtype)
        stages = build_stages(
            config,
            job.model.vocab_size,
            layout,
            attend,
            strategy=STRATEGY,
            master_dtype=torch.float32,
            compute_dtype=dtype,
        )
        initialize(stages, config, layout, job.seed)
        self.optimizer = build_optimizer(stages, config, OPTIMIZER)
        heartbeat = Heartbeat()
        heartbeat.on_activity = self._note
        self.stepper = Stepper(
            stages, layout, config.hidden_size, dtype, STRATEGY, heartbeat=heartbeat
        )
        self._marks: list[float] = []

    def step(self, loader: Loader, clock: int) -> tuple[float, float, float]:
        """Train a step -> its loss, its seconds, and its CPU seconds with a core for each rank."""
        batches = [batch.to(self.layout.device) for batch in loader.read(clock)]
        self._marks = []
        gc.collect()
        dist.barrier()
        begin = time.perf_counter()
        loss = train_step(self.stepper, self.optimizer, batches, 0.0, OPTIMIZER.clip_grad).loss
        seconds = time.perf_counter() - begin
        # What each rank computed in each microbatch.
        own = torch.from_numpy(np.diff(self._marks))
        rows = [torch.empty_like(own) for _ in range(self.layout.dp.size)]
        dist.all_gather(rows, own)
        return loss, seconds, float(torch.stack(rows).amax(0).sum())

    def _note(self, activity: str) -> None:
        """Note the CPU seconds at which each microbatch begins, and the last one ends."""
        if activity in ("forward", "reducing gradients"):
            self._marks.append(time.thread_time())


def ratio(dealt: list[float], in_order: list[float]) -> float:
    """Return the median over the steps of what dealing takes of the other's time."""
    return statistics.median(a / b for a, b in zip(dealt, in_order, strict=True))
