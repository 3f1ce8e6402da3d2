"""Times a step of the real trainer with one layer in each pipeline stage.

A step takes longer than its parts measured one by one: processes wait for each other, and memory is
written for the first time. This step tells by how much.
"""

import dataclasses
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from data.batch import Batch
from model.attention_backends.choice import choose_attention
from model.build import build_stages
from model.init import initialize
from model.windows import pairs_seen
from parallel.layout import World, build_layout
from pretrain.config.config import Config
from pretrain.optimizer import build_optimizer
from pretrain.planner.workload import Workload
from pretrain.schedule.phases import Phase
from pretrain.state import compute_dtype, master_dtype
from pretrain.step import Stepper, train_step
from tools.planning.phases import PhaseEstimate

WARM_STEPS = 2
"""Steps at the start that are not counted: they make moments and buffers."""
STEPS = 5
MOST_TOKENS = 8192
"""Tokens of a sample at most."""
MOST_MICROBATCHES = 4
"""Microbatches for each pipeline stage at most."""


@dataclass(frozen=True)
class ReferenceJob:
    """Says which phase's step is timed; its configuration has few layers."""

    config: Config
    phase: Phase
    vocab_size: int
    load: Workload
    """What a step asks of a rank."""
    document_tokens: int
    """Tokens of each document; the last one of a sample may be shorter."""

    @staticmethod
    def of(estimate: PhaseEstimate, document_tokens: int) -> "ReferenceJob":
        """Reduce a phase's run to one layer in each stage."""
        phase = estimate.phase
        layout = phase.layout
        # Long samples and many microbatches take long and say no more.
        length = min(phase.seq_length, MOST_TOKENS)
        lengths = _document_lengths(length, document_tokens)
        load = dataclasses.replace(
            estimate.load,
            seq_length=length,
            num_microbatches=min(
                estimate.load.num_microbatches,
                MOST_MICROBATCHES * layout.pipeline_model_parallel_size,
            ),
            pairs_per_token=float(pairs_seen(lengths, None).sum()) / length,
            # Every rank is given the same documents.
            extra_flops_per_sample=0.0,
        )
        layers = layout.pipeline_model_parallel_size * layout.stages_per_rank
        model = dataclasses.replace(estimate.config.model, num_layers=layers)
        return ReferenceJob(
            dataclasses.replace(estimate.config, model=model),
            phase,
            estimate.model.vocab_size,
            load,
            document_tokens,
        )


def time_step(job: ReferenceJob, world: World) -> float:
    """Train some steps on random tokens -> the seconds of the middle one; collective."""
    layout = build_layout(job.phase.layout, world)
    optimizer_config = job.config.optimizer
    dtype = compute_dtype(optimizer_config)
    model = job.config.model
    attend, _ = choose_attention(
        model.attention_backend, world.device, dtype, needs=model.scoring_needs
    )
    stages = build_stages(
        job.config.model,
        job.vocab_size,
        layout,
        attend,
        strategy=job.phase.layout.sharding_strategy,
        master_dtype=master_dtype(optimizer_config),
        compute_dtype=dtype,
        optimizer_on_host=optimizer_config.optimizer_cpu_offload,
    )
    for stage in stages:
        stage.memory = job.phase.memory
        stage.rope = job.phase.rope
    initialize(stages, job.config.model, layout, optimizer_config.seed)
    optimizer = build_optimizer(stages, job.config.model, optimizer_config)
    stepper = Stepper(
        stages, layout, job.config.model.hidden_size, dtype, job.phase.layout.sharding_strategy
    )
    batches = [make_slice(job, layout.cp.rank, world.device)] * job.load.num_microbatches
    seconds = []
    for number in range(WARM_STEPS + STEPS):
        dist.barrier()
        start = time.perf_counter()
        train_step(stepper, optimizer, batches, 0.0, optimizer_config.clip_grad)
        if number >= WARM_STEPS:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def make_slice(job: ReferenceJob, rank: int, device: torch.device) -> Batch:
    """Make a context-parallel rank's slice of a microbatch of random tokens."""
    lengths = np.tile(
        _document_lengths(job.load.seq_length, job.document_tokens), job.load.micro_batch_size
    )
    bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    own = job.load.tokens
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(job.vocab_size, (own,), generator=generator)
    numbers = torch.arange(rank * own, (rank + 1) * own)
    first = bounds[torch.searchsorted(bounds, numbers, right=True) - 1]
    return Batch(tokens, tokens, numbers - first, bounds.int()).to(device)


def _document_lengths(seq_length: int, document_tokens: int) -> np.ndarray:
    """Return the lengths of the documents of a sample."""
    whole, rest = divmod(seq_length, document_tokens)
    return np.array([document_tokens] * whole + ([rest] if rest else []), dtype=np.int64)
