"""Phases and the clock: everything about a step is a function of positions consumed before it.

The clock counts positions (steps x global batch, padding included). A phase covers [start, end) of
it; its end is rounded up to whole steps.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from data.config import Balance, Exhausted, Packing
from model.activation_memory.settings import MemorySettings
from model.rope import Rope
from parallel.config import LayoutConfig
from pretrain.schedule.batch_schedule import (
    BatchStretch,
    batch_at,
    end_of_steps,
    first_step_from,
)


@dataclass(frozen=True)
class Phase:
    """Describes a part of the run with constant settings, defaults filled in.

    A field's `resume` says what another value means to a run that continues in the phase.
    """

    # Where it is: among the phases, and on the clock.
    name: str
    index: int
    start: int
    end: int
    tokens: int
    """As asked for; the phase ends with the step that reaches them."""
    # What a step is made of.
    seq_length: int = field(metadata=dict(resume="data"))
    global_batch_tokens: int
    """Tokens of the largest step."""
    stretches: tuple[BatchStretch, ...]
    """The phase's steps, grouped by their batch."""
    micro_batch_size: int
    # How the model computes it.
    layout: LayoutConfig
    memory: MemorySettings
    rope: Rope = field(metadata=dict(resume="optimization"))
    # What is read.
    document_masking: bool = field(metadata=dict(resume="data"))
    packing: Packing = field(metadata=dict(resume="data"))
    data_path: tuple[str, ...]
    """Words of the blend; empty for mock data."""
    data_exhausted: Exhausted = field(metadata=dict(resume="data"))
    balance: Balance
    # How fast it learns.
    lr: float
    min_lr: float
    lr_schedule: str
    lr_warmup_tokens: int
    # What samples are asked for, which older checkpoints do not say.
    max_documents_per_sample: int | None = field(default=None, metadata=dict(resume="data"))
    """None = any number."""
    balance_window: bool = field(default=False, metadata=dict(resume="data"))
    """Whether samples are packed to cost nearly the same."""
    auto: tuple[str, ...] = ()
    """Settings that `layout: auto` chooses (planner/auto_layout.py); empty = all are given."""
    predicted_bytes: int | None = None
    """Memory of a rank under the layout that was chosen; None = none was chosen (yet)."""

    @property
    def layout_key(self) -> tuple:
        """Settings that running processes cannot change: another key means a restart."""
        layout = self.layout
        return (
            *layout.sizes,
            layout.schedule,
            layout.stages_per_rank,
            layout.context_levels,
            layout.sharding_strategy,
            layout.sequence_parallel and layout.tensor_model_parallel_size > 1,
        )

    @property
    def is_open(self) -> bool:
        """Is the layout still to be chosen (`layout: auto`)?"""
        return bool(self.auto) and self.predicted_bytes is None

    @property
    def attention_on_tape(self) -> bool:
        """Do attention calls wait for their backward without q, k and v (saved_attention.py)?"""
        return (
            self.memory.recompute_granularity == "attention_kept"
            or self.memory.attention_head_chunks > 1
        )

    @property
    def steps(self) -> int:
        return sum(stretch.steps for stretch in self.stretches)

    @property
    def batches(self) -> list[int]:
        """Tokens of a step, each size once, in the order in which they come."""
        return list(dict.fromkeys(stretch.batch for stretch in self.stretches))

    def batch_at(self, clock: int) -> int:
        """Return the tokens of the step that begins at `clock`."""
        return batch_at(self.stretches, clock)

    def first_step_from(self, position: int) -> int:
        """Return where the first step at or after `position` begins; the phase's end if none."""
        return first_step_from(self.stretches, position)

    def start_of_step(self, number: int) -> int:
        """Return where step `number` of the phase begins."""
        for stretch in self.stretches:
            if number < stretch.steps:
                return stretch.start + number * stretch.batch
            number -= stretch.steps
        raise ValueError(f"phase {self.name!r} has {self.steps} steps")

    def end_of_steps(self, clock: int) -> int:
        """Return where the phase's last step ends, counted in whole steps from `clock`."""
        return end_of_steps(self.stretches, clock)

    def data_parallel_size(self, world_size: int) -> int:
        """Return how many data-parallel replicas `world_size` processes make."""
        return world_size // math.prod(self.layout.sizes)

    def num_microbatches(self, world_size: int, batch: int | None = None) -> int:
        """Return the microbatches of each data-parallel rank in a step of `batch` tokens.

        Args:
            batch: by default that of the largest step.
        """
        # Tokens of one microbatch on every data-parallel rank.
        unit = self.seq_length * self.micro_batch_size * self.data_parallel_size(world_size)
        return (batch or self.global_batch_tokens) // unit

    def with_memory(self, **changes: Any) -> "Phase":
        """Return the phase with other memory settings."""
        return dataclasses.replace(self, memory=dataclasses.replace(self.memory, **changes))


def phase_end(phases: list[Phase], position: int) -> int | None:
    """Return the end of the phase that ends at `position`, in whole steps; None without one.

    Args:
        position: an end as it was asked for, or in whole steps.
    """
    for phase, asked in zip(phases, accumulate(phase.tokens for phase in phases), strict=True):
        if position in (asked, phase.end):
            return phase.end
    return None


def phase_at(phases: list[Phase], clock: int) -> Phase | None:
    """Return the phase that trains position `clock`; None after the last."""
    for phase in phases:
        if clock < phase.end:
            return phase
    return None
