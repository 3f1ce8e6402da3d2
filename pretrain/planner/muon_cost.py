"""What Muon's update takes of a rank, from numbers alone: memory, operations and exchanges."""

from functools import cache
from math import prod
from typing import NamedTuple

from model.sharding import row_of, shardings_for
from pretrain.config.config import Config
from pretrain.muon.owners import (
    BUCKET_ELEMENTS,
    Matrix,
    assign_owners,
    heads_of,
    make_buckets,
)
from pretrain.planner.model_size import ModelSize

WHOLE_COPIES = 8
"""Most copies of an owner's bucket that exist at once: two that arrive, the matrices put together,
their batch, and what Newton-Schulz and the way back hold."""
SHARD_COPIES = 3
"""Most copies of a rank's shards of a bucket at once: on the way there, and back from two buckets.
As many are in the weights' dtype: gradients as they count, looked-ahead ones, and updates."""

STEP_BYTES = 4
"""Size of AdamW's count of a parameter's steps."""


def hidden_elements(size: ModelSize) -> int:
    """Count the elements of all matrices that Muon updates, of which it keeps one moment."""
    layer = sum(
        prod(shape)
        for name, shape in size.shapes.items()
        if row_of(name, size.config).role == "hidden"
    )
    return size.config.num_layers * layer


class MuonMemory(NamedTuple):
    """Bytes of a rank."""

    saved: int
    """Bytes of second moments and step counts, which Muon does not keep."""
    buffers: int
    """What comes and goes in an update."""


class MuonOwners(NamedTuple):
    """What the owners of a stage's matrices compute, hold and exchange in an update.

    Every rank has a piece of each matrix, all of one shape.
    """

    operations: int
    """Operations of a step of Newton-Schulz on the owner that has most to compute."""
    bucket_elements: int
    """Elements of the matrices that an owner gathers at a time, at most."""
    others: int
    """Ranks that a rank exchanges with."""
    pieces: int
    """Elements of a rank's pieces of all matrices."""
    owned: tuple[int, ...]
    """Rank -> elements of its pieces of the matrices that it owns; those after it own none."""
    fullest: tuple[int, ...]
    """Bucket -> elements of its pieces of its own on the owner that has most: the others wait."""

    def sent_by(self, rank: int) -> int:
        """Count the elements that a rank sends to others, both ways."""
        owned = self.owned[rank] if rank < len(self.owned) else 0
        return self.pieces - owned + self.others * owned


class MuonCost:
    """Counts what the update of the hidden matrices takes."""

    def __init__(
        self, size: ModelSize, element_bytes: int, steps: int, *, is_per_head: bool = False
    ):
        """
        Args:
            element_bytes: size of an element of a matrix that is gathered.
            steps: of Newton-Schulz.
            is_per_head: each head of q, k and v is orthogonalized by itself.
        """
        self.size = size
        self.element_bytes = element_bytes
        self.steps = steps
        self.is_per_head = is_per_head
        # A layout search asks for the same ones of thousands of layouts.
        self.matrices = cache(self._find_matrices)
        self.owners = cache(self._find_owners)

    @staticmethod
    def of_run(config: Config, vocab_size: int, *, on_gpu: bool) -> "MuonCost | None":
        """Return the cost in a run; None where AdamW updates everything."""
        optimizer = config.optimizer
        if optimizer.optimizer != "muon":
            return None
        master_bytes = 8 if optimizer.fp64 else 4
        is_bf16 = on_gpu and not optimizer.fp64 and optimizer.muon_fp32_matmul_prec == "medium"
        size = ModelSize(config.model, vocab_size)
        return MuonCost(
            size,
            2 if is_bf16 else master_bytes,
            optimizer.muon_num_ns_steps,
            is_per_head=optimizer.muon_per_head,
        )

    def of_rank(self, layers: int, tp: int, shards: int, master_bytes: int) -> MuonMemory:
        """Count the bytes of a rank that holds these layers, of those that share them the most."""
        matrices = self.matrices(tp)
        pieces = [matrix.piece_shape(shards, tp) for matrix in matrices]
        held = layers * sum(rows * columns for rows, columns in pieces)
        saved = master_bytes * held + STEP_BYTES * layers * len(matrices)
        owned = self.owners(layers, tp, shards).bucket_elements
        of_shards = SHARD_COPIES * (self.element_bytes + master_bytes) * min(owned, held)
        return MuonMemory(saved, WHOLE_COPIES * self.element_bytes * owned + of_shards)

    def flops(self, layers: int, tp: int, shards: int) -> int:
        """Count the operations of the busiest owner."""
        return self.steps * self.owners(layers, tp, shards).operations

    def _find_owners(self, layers: int, tp: int, shards: int) -> MuonOwners:
        """Share the matrices of these layers out among the ranks of a stage, as muon.py does."""
        matrices = layers * self.matrices(tp)
        costs = [matrix.cost() for matrix in matrices]
        pieces = [prod(matrix.piece_shape(shards, tp)) for matrix in matrices]
        # The first ranks take a matrix each before one takes two.
        ranks = min(tp * shards, len(matrices))
        owners = assign_owners(costs, ranks)
        computed = [0] * ranks
        owned = [0] * ranks
        for owner, cost, size in zip(owners, costs, pieces, strict=True):
            computed[owner] += cost
            owned[owner] += size
        # A stage without layers has no matrices, and no buckets.
        buckets = make_buckets(matrices, owners, ranks, BUCKET_ELEMENTS)
        return MuonOwners(
            operations=max(computed, default=0),
            bucket_elements=max(
                (
                    sum(matrices[number].elements for number in numbers)
                    for by_owner in buckets
                    for numbers in by_owner
                ),
                default=0,
            ),
            others=tp * shards - 1,
            pieces=sum(pieces),
            owned=tuple(owned),
            fullest=tuple(
                max(sum(pieces[number] for number in numbers) for numbers in by_owner)
                for by_owner in buckets
            ),
        )

    def _find_matrices(self, tp: int) -> list[Matrix]:
        """List the hidden matrices of a layer."""
        config = self.size.config
        table = shardings_for(list(self.size.shapes), config, tp)
        found = []
        for name, shape in self.size.shapes.items():
            if row_of(name, config).role == "hidden":
                rows, columns = shape
                blocks = heads_of(name, config) if self.is_per_head else 1
                found.append(Matrix(rows, columns, table[name].dim, blocks))
        return found
