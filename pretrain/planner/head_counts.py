"""How many attention heads a rank works on, before and after the exchange over cp."""

from dataclasses import dataclass
from functools import cache

from model.config import ModelConfig
from parallel.config import LayoutConfig
from parallel.ulysses import HeadSplit, chunk_counts, head_rounds


@dataclass(frozen=True)
class HeadCounts:
    """Counts heads of a tp rank, and after the exchange those of the cp rank that has most."""

    N: int
    """Query heads of a tp rank."""
    K: int
    """Key/value heads of a tp rank."""
    m: int
    """Query heads after the exchange."""
    k: int
    """Key/value heads after the exchange."""
    paired: int
    """Key/value heads copied for the kernel, one per query head, where heads split unevenly."""
    round_k: int
    """Key/value heads of one group, where the heads run in groups (attention_head_chunks)."""

    @staticmethod
    def make(config: ModelConfig, layout: LayoutConfig, chunks: int = 1) -> "HeadCounts":
        """Count the heads of this model under this layout, run in `chunks` groups."""
        return _count(head_split(config, layout), chunks)


def head_split(config: ModelConfig, layout: LayoutConfig) -> HeadSplit:
    """Return how the heads of a tp rank are split over the ranks of an all-to-all."""
    tp = layout.tensor_model_parallel_size
    query = config.num_attention_heads // tp
    kv = max(1, config.num_kv_heads // tp)  # fewer than tp ranks: each rank has one
    return _split(query, kv, layout.context_levels[0])


def allowed_head_chunks(config: ModelConfig, layout: LayoutConfig) -> list[int]:
    """List in how many groups the heads of a rank may run (attention_head_chunks)."""
    # A norm over all heads needs them all at once.
    return [1] if config.norms_all_heads else chunk_counts(head_split(config, layout))


_split = cache(HeadSplit.make)


@cache
def _count(split: HeadSplit, chunks: int) -> HeadCounts:
    m = max(stop - start for start, stop in split.query)
    k = max(stop - start for start, stop in split.kv)
    # A kernel reads grouped heads only where each key/value head has as many query heads.
    paired = 0
    for rank in range(len(split.query)):
        pairing = split.kv_of_query(rank)
        received = pairing[-1] + 1
        regular = [i * received // len(pairing) for i in range(len(pairing))]
        if pairing != regular or len(pairing) % received:
            paired = max(paired, len(pairing))
    # In groups, a rank gets only the key/value heads that the next query heads read.
    round_k = k
    if chunks > 1 and chunks in chunk_counts(split):
        round_k = max(
            stop - start for each in head_rounds(split, chunks) for start, stop in each.kv_split.kv
        )
    num_query = split.query[-1][1]
    num_kv = split.kv[-1][1]
    return HeadCounts(num_query, num_kv, m, k, paired, round_k)
