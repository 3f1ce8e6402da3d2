"""How often a step computes and sends the parts of a layer, under each level of recompute."""

from dataclasses import dataclass

from model.activation_memory.settings import MemorySettings
from model.config import ModelConfig
from pretrain.planner.workload import Workload


@dataclass(frozen=True)
class PassCounts:
    """Counts how often a step computes and sends the parts of a layer.

    A forward counts 1 and its backward 2.
    """

    qkv: float = 3
    """Projections to query, key and value."""
    output: float = 3
    """The attention's output projection."""
    attention: float = 3
    """The attention kernel."""
    mlp: float = 3
    """The MLP's products."""
    sums: float = 4
    """Sums over tp of [t, D]: two in forward, two in backward."""
    to_heads: float = 2
    """Exchanges of q, k and v, one in forward, one in backward."""
    to_tokens: float = 2
    """Exchanges of the output."""
    gathers: float = 2
    """All-gathers of keys and values, between the groups of two-level cp."""

    @staticmethod
    def make(
        settings: MemorySettings, *, sequence_parallel: bool, has_norms_after: bool = False
    ) -> "PassCounts":
        """Count the passes that recompute.py, attention_chunks.py and mlp.py make."""
        level = settings.recompute_granularity
        in_chunks = settings.attention_head_chunks > 1
        # Gate and up are two of the MLP's three products.
        mlp_again = 2 / 3 if level or settings.mlp_tiles > 1 else 0
        gathered_again = 0.5 * sequence_parallel  # an all-gather is half a sum
        if level and has_norms_after:
            # A norm after the MLP reads its result: all of the MLP and its sum are made again.
            mlp_again = 1 + (2 / 3 if settings.mlp_tiles > 1 else 0)
            gathered_again = 1.0
        if level in (None, "selective"):
            # In chunks, backward projects each group and exchanges it to heads once more.
            again = int(in_chunks)
            return PassCounts(
                qkv=3 + again,
                mlp=3 + mlp_again,
                sums=4 + gathered_again * (level == "selective"),
                to_heads=2 + again,
                gathers=2 + again,
            )
        sums = 5 + gathered_again
        if level == "full":
            again = 1 + int(in_chunks)
            return PassCounts(
                qkv=3 + again,
                output=4,
                attention=4,
                mlp=3 + mlp_again,
                sums=sums,
                to_heads=2 + again,
                to_tokens=3,
                gathers=2 + again,
            )
        # attention_kept: as full, without the attention's forward.
        return PassCounts(
            qkv=4, output=4, mlp=3 + mlp_again, sums=sums, to_heads=3, to_tokens=3, gathers=3
        )


def count_passes(config: ModelConfig, load: Workload) -> PassCounts:
    """Count the passes of a model under what a rank is asked to train."""
    return PassCounts.make(
        load.memory,
        sequence_parallel=load.layout.sequence_parallel,
        has_norms_after=config.has_norms_after,
    )
