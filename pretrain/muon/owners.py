"""Assign to each matrix the rank that orthogonalizes it, and cut the work into buckets.

A matrix is cut over the ranks of a pipeline stage, and one of them, its owner, gathers it whole.
All of these ranks compute the same here.
"""

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from model.config import ModelConfig
from pretrain.muon.newton_schulz import count_flops

BUCKET_ELEMENTS = 32 * 1024**2
"""Elements that an owner gathers at a time (64 MiB in bf16), or one matrix where it is larger."""


@dataclass(frozen=True)
class Matrix:
    """Describes the shape of a matrix, and how tp cuts it."""

    rows: int
    columns: int
    tp_dim: int | None
    """0 = tp cuts its rows, 1 = its columns, None = each tp rank has all of it."""
    blocks: int = 1
    """Heads that it is made of, one under the other, each orthogonalized by itself; 1 = it as a
    whole."""

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    @property
    def block_rows(self) -> int:
        """Rows of what is orthogonalized by itself."""
        return self.rows // self.blocks

    def cost(self) -> int:
        """Count the operations of one step of Newton-Schulz."""
        return self.blocks * count_flops(self.block_rows, self.columns, 1)

    def piece_shape(self, dp_cp: int, tp: int) -> tuple[int, int]:
        """Return the largest shape of a rank's part, which all of them have on the wire.

        FSDP2 cuts what tp leaves by rows, as torch.chunk does: the last parts may be smaller, or
        empty.
        """
        rows = self.rows // tp if self.tp_dim == 0 else self.rows
        columns = self.columns // tp if self.tp_dim == 1 else self.columns
        return ceil(rows / dp_cp), columns


def heads_of(name: str, model: ModelConfig) -> int:
    """Count the heads whose rows a parameter has one under the other; 1 for all others."""
    found = re.fullmatch(r"layers\.\d+\.attention\.([qkv])\.weight", name)
    if found is None:
        return 1
    return model.num_attention_heads if found[1] == "q" else model.num_kv_heads


def assign_owners(costs: Sequence[int], ranks: int) -> list[int]:
    """Give each matrix an owner such that all ranks compute about equally long.

    Matrices come by falling cost; each goes to the rank with the least work so far.
    """
    loads = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        least, rank = loads[0]
        owners[number] = rank
        heapq.heapreplace(loads, (least + costs[number], rank))
    return owners


def make_buckets(
    matrices: Sequence[Matrix],
    owners: Sequence[int],
    ranks: int,
    limit: int = BUCKET_ELEMENTS,
) -> list[list[list[int]]]:
    """Cut the owners' work into buckets: bucket -> rank -> numbers of its matrices.

    In a bucket each rank gathers at most `limit` elements, or one matrix. The costliest come first
    on every rank, so that all compute about equally long in each bucket.
    """
    queues: list[list[int]] = [[] for _ in range(ranks)]
    for number in sorted(range(len(matrices)), key=lambda number: -matrices[number].cost()):
        queues[owners[number]].append(number)
    cuts_by_rank = [_cut(queue, matrices, limit) for queue in queues]
    count = max(map(len, cuts_by_rank), default=0)
    return [
        [cuts[place] if place < len(cuts) else [] for cuts in cuts_by_rank]
        for place in range(count)
    ]


def _cut(queue: Sequence[int], matrices: Sequence[Matrix], limit: int) -> list[list[int]]:
    """Cut a rank's matrices into consecutive parts of at most `limit` elements, or one matrix."""
    parts: list[list[int]] = []
    held = 0
    for number in queue:
        size = matrices[number].elements
        if not parts or held + size > limit:
            parts.append([])
            held = 0
        parts[-1].append(number)
        held += size
    return parts
