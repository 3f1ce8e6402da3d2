"""What a rank is asked to train."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.dealing import StepShape
from model.activation_memory.settings import MemorySettings
from model.windows import Window, mean_pairs_seen
from parallel.config import LayoutConfig
from pretrain.planner.documents import UNKNOWN_DOCUMENTS, PhaseDocuments
from pretrain.schedule.phases import Phase


@dataclass(frozen=True)
class Workload:
    """Describes what a rank trains: one layout, one length, one batch."""

    layout: LayoutConfig
    data_parallel_size: int
    seq_length: int
    micro_batch_size: int
    num_microbatches: int
    memory: MemorySettings = MemorySettings()
    pairs_per_token: float | None = None
    """Tokens that a token sees on average over the layers; None = each sample is one document."""
    extra_flops_per_sample: float = 0.0
    """FLOPs of forward and backward by which the data rank that a step waits for exceeds the
    average one, over its samples.

    They are all attention's: every rank has the same number of tokens.
    """

    @staticmethod
    def of_phase(
        phase: Phase, world_size: int, documents: PhaseDocuments = UNKNOWN_DOCUMENTS
    ) -> "Workload":
        """Return what the largest step of a phase asks of each of `world_size` ranks."""
        load = Workload(
            phase.layout,
            phase.data_parallel_size(world_size),
            phase.seq_length,
            phase.micro_batch_size,
            phase.num_microbatches(world_size),
            phase.memory,
            documents.pairs_per_token,
        )
        extra = documents.extra_flops_per_sample(load.step_shape)
        return replace(load, extra_flops_per_sample=extra)

    @property
    def step_shape(self) -> StepShape:
        """How a step's samples are cut, and who waits for whom."""
        return StepShape(
            dp_size=self.data_parallel_size,
            num_microbatches=self.num_microbatches,
            micro_batch_size=self.micro_batch_size,
            meeting="microbatch" if self.layout.meets_in_microbatches(train=True) else "step",
        )

    def tokens_seen(self, windows: Sequence[Window]) -> float:
        """Return how many tokens a token sees on average, itself included.

        Args:
            windows: of the model's layers.
        """
        if self.pairs_per_token is not None:
            return self.pairs_per_token
        whole = np.array([self.seq_length])
        return float(mean_pairs_seen(whole, windows)[0]) / self.seq_length

    @property
    def shards(self) -> int:
        """Ranks that share the parameters of a stage."""
        return self.data_parallel_size * self.layout.context_parallel_size

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on one context-parallel rank (t)."""
        return self.seq_length * self.micro_batch_size // self.layout.context_parallel_size

    @property
    def tokens_between(self) -> int:
        """Tokens of a microbatch on one rank between the tensor-parallel parts (u)."""
        # Under Megatron's sequence parallelism each tp rank has its part of them there.
        parts = self.layout.tensor_model_parallel_size if self.layout.sequence_parallel else 1
        return self.tokens // parts

    @property
    def whole_gradients(self) -> bool:
        """Are gradients kept whole until the last microbatch (parallel/shard.py, pipeline.py)?"""
        return self.layout.pipeline_model_parallel_size > 1 or (
            self.layout.sharding_strategy == "optim" and self.num_microbatches > 1
        )
