"""What a rank says when its device's memory runs out."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pretrain.logs.profiler import write_memory_snapshot
from pretrain.plan import Plan
from pretrain.planner.machine import Machine
from pretrain.planner.memory_check import describe_out_of_memory
from pretrain.schedule.phases import Phase


@contextmanager
def out_of_memory_explained(phase: Phase, plan: Plan, rank: int, world_size: int) -> Iterator[None]:
    """Print what was allocated and what to try, before the error takes its course."""
    try:
        yield
    except torch.OutOfMemoryError:
        figures = {
            "allocated": torch.cuda.memory_allocated(),
            "at most": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
        }
        machine = Machine.here(plan.config)
        text = describe_out_of_memory(
            phase, rank, figures, plan.config, world_size, plan.vocab_size, machine
        )
        print(f"error: {text}", file=sys.stderr, flush=True)
        write_memory_snapshot(plan.config, rank, is_out_of_memory=True)
        raise
