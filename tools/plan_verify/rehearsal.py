"""Runs one rank's training step on device meta, and notes what it does.

The model, the groups, the pipeline's schedule, FSDP2 and the optimizer are those of a run. No other
rank exists: torch's backend "fake" answers every collective at once.
"""

import dataclasses
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from model.attention_backends.backend import Attend
from model.attention_backends.choice import BACKENDS
from model.attention_backends.kernel_calls import assumed_crossover
from model.build import build_stages
from parallel.layout import Axis, Layout, build_layout, end_world, start_world_on_meta
from pretrain.attention_backend import heads_of_call
from pretrain.config.config import Config
from pretrain.optimizer import build_optimizer
from pretrain.schedule.phases import Phase
from pretrain.state import compute_dtype, master_dtype
from pretrain.step import Stepper, queue_step
from tools.plan_verify.live_memory import LiveMemory
from tools.plan_verify.on_meta import (
    kernels_as_on_gpu,
    norms_on_meta,
    pipeline_on_meta,
    sharding_on_meta,
)
from tools.plan_verify.recorder import Call, Recorder

AXES = (
    "tp",
    "cp",
    "cp_a2a",
    "cp_gather",
    "dp_cp",
    "dp",
    "dp_cp_tp",
    "pp",
    "embedding",
    "world",
)
"""Axes of a layout; where two are the same group, the first one names what is sent."""


@dataclass(frozen=True)
class RankJob:
    """Says which rank of which phase is to be rehearsed."""

    config: Config
    phase: Phase
    vocab_size: int
    world_size: int
    rank: int
    num_microbatches: int


@dataclass(frozen=True)
class Group:
    """One group of processes, as the rank asked for it."""

    name: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class RankTrace:
    """Holds what a rank did."""

    rank: int
    axes: dict[str, tuple[int, ...]]
    """Ranks of each axis of its layout."""
    pp_rank: int
    groups: list[Group]
    """All groups in the order in which it made them, those of other ranks too."""
    calls: list[Call]
    sent_bytes: dict[str, float]
    """Bytes that it sent, by axis."""
    state_bytes: int
    """Bytes of parameters and optimizer before the step."""
    peak_bytes: int
    """The most bytes of tensors that were alive."""
    operations: int
    seconds: float


@dataclass
class Slice:
    """A rank's slice of a microbatch whose samples are one document each, without values."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    num_targets: int
    source_runs: Sequence[tuple[int, int, int, int]] = ()

    @staticmethod
    def of_phase(phase: Phase) -> "Slice":
        """Make the slice of a phase's microbatch on one context-parallel rank."""
        total = phase.seq_length * phase.micro_batch_size
        own = total // phase.layout.context_parallel_size
        ids = torch.empty(own, dtype=torch.int64, device="meta")
        starts = range(0, total + 1, phase.seq_length)
        bounds = torch.tensor(list(starts), dtype=torch.int32, device="cpu")
        return Slice(ids, ids, ids, bounds, own)


@contextmanager
def noted_groups() -> Iterator[list[Group]]:
    """Note every group that is made meanwhile, in order."""
    made: list[Group] = []
    original = dist.new_group

    def new_group(ranks=None, *args, **options):
        members = range(dist.get_world_size()) if ranks is None else ranks
        name = options.get("group_desc") or "group"
        made.append(Group(name, tuple(members)))
        return original(ranks, *args, **options)

    dist.new_group = new_group
    try:
        yield made
    finally:
        dist.new_group = original


def rehearse(job: RankJob) -> RankTrace:
    """Run one training step of one rank, from making its groups to the optimizer's update."""
    began = time.monotonic()
    world = start_world_on_meta(job.rank, job.world_size)
    try:
        with noted_groups() as groups:
            layout = build_layout(job.phase.layout, world)
        recorder = Recorder()
        live = LiveMemory(recorder.note)
        with live, kernels_as_on_gpu(live), sharding_on_meta(), pipeline_on_meta(), norms_on_meta():
            state_bytes = _run_step(job, layout, live)
        axes = {name: getattr(layout, name).ranks for name in AXES}
        sent_bytes = _bytes_by_axis(recorder.calls, layout)
    finally:
        gc.collect()
        end_world()
    return RankTrace(
        rank=job.rank,
        axes=axes,
        pp_rank=layout.pp.rank,
        groups=groups,
        calls=recorder.calls,
        sent_bytes=sent_bytes,
        state_bytes=state_bytes,
        peak_bytes=live.peak,
        operations=live.operations,
        seconds=time.monotonic() - began,
    )


def _run_step(job: RankJob, layout: Layout, live: LiveMemory) -> int:
    """Build the rank's state and train a step -> the bytes of the state."""
    config = job.config
    phase = job.phase
    # A run makes its parameters on meta, too, where they take no memory: these are not counted.
    with live.paused():
        stages = build_stages(
            config.model,
            job.vocab_size,
            layout,
            attention_on_meta(config, phase),
            strategy=phase.layout.sharding_strategy,
            master_dtype=master_dtype(config.optimizer),
            compute_dtype=compute_dtype(config.optimizer),
        )
    live.add([parameter for stage in stages for parameter in stage.parameters()])
    # Offloaded layers wait in the host's memory on a GPU alone.
    memory = dataclasses.replace(phase.memory, cpu_offloading_num_layers=0)
    for stage in stages:
        stage.memory = memory
        stage.rope = phase.rope
    optimizer = build_optimizer(stages, config.model, config.optimizer)
    gc.collect()
    live.peak = live.now
    state_bytes = live.now
    stepper = Stepper(
        stages,
        layout,
        config.model.hidden_size,
        compute_dtype(config.optimizer),
        phase.layout.sharding_strategy,
    )
    batches = [Slice.of_phase(phase)] * job.num_microbatches
    queue_step(stepper, optimizer, batches, config.optimizer.lr, config.optimizer.clip_grad)
    return state_bytes


def attention_on_meta(config: Config, phase: Phase) -> Attend:
    """Choose the attention whose kernels tell their shapes on meta.

    These are torch's varlen op and cuDNN's; other backends keep and make the same tensors.
    """
    name = "varlen" if config.model.attention_backend == "varlen" else "mixed"
    crossover = config.model.attention_crossover_tokens
    if crossover is None:
        crossover = assumed_crossover(heads_of_call(config, phase))
    return BACKENDS[name].make(crossover)


def _bytes_by_axis(calls: list[Call], layout: Layout) -> dict[str, float]:
    """Add up the bytes that a rank sent over each axis."""
    name_of: dict[str, str] = {}
    for name in reversed(AXES):
        axis: Axis = getattr(layout, name)
        if axis.size > 1 and axis.group is not None:
            name_of[str(axis.group.group_name)] = name
    sent: dict[str, float] = {}
    for call in calls:
        name = name_of.get(call.group, call.group)
        sent[name] = sent.get(name, 0) + call.sent_bytes
    return sent
