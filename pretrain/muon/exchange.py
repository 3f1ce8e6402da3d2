"""Gather whole matrices on their owners, and give each rank its part of the results.

One all-to-all each way for all matrices of a bucket. On the wire every rank's part of a matrix has
the same shape (`Matrix.piece_shape`), so that an owner puts a matrix together in one copy. Shapes:
D ranks of dp_cp, T ranks of tp, r rows and c columns of a piece, R and C those of the whole.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from parallel.collectives import start_all_to_all
from parallel.layout import Layout
from pretrain.muon.owners import Matrix


class Bucket:
    """Exchanges the matrices of a bucket between the ranks of a pipeline stage.

    Args:
        matrices: all that the ranks of the stage hold, in an order that is the same on each.
        by_owner: rank -> numbers of the matrices in this bucket that it owns.
        dtype: on the wire, and of the whole matrices.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        by_owner: Sequence[Sequence[int]],
        layout: Layout,
        dtype: torch.dtype,
    ):
        self.axis = layout.dp_cp_tp
        self.grid = (layout.dp_cp.size, layout.tp.size)
        self.tp_rank = layout.tp.rank
        self.device = layout.device
        self.dtype = dtype
        self.matrices = matrices
        self.numbers = [number for numbers in by_owner for number in numbers]
        """Numbers of the bucket's matrices, owner by owner: the order of what each rank sends."""
        self.owned = list(by_owner[self.axis.rank])
        """Numbers of this rank's own matrices."""
        self.send_sizes = [self._piece_elements(numbers) for numbers in by_owner]
        # Every rank sends this owner as much as it sends itself.
        self.receive_sizes = [self._piece_elements(self.owned)] * self.axis.size

    def gather(self, shards: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Start to send this rank's shards to the owners.

        Args:
            shards: this rank's rows and columns of each matrix in `numbers`; in the host's memory
                or on the device.

        Returns:
            A function that waits for the exchange and returns the matrices in `owned`, whole.
        """
        # A shard with fewer rows than a piece is followed by zeros.
        sent = torch.zeros(sum(self.send_sizes), dtype=self.dtype, device=self.device)
        for piece, shard in zip(self._pieces(sent), shards, strict=True):
            piece[: shard.shape[0]].copy_(shard)
        finish = start_all_to_all(sent, self.send_sizes, self.receive_sizes, self.axis)

        def whole() -> list[torch.Tensor]:
            blocks = self._owned_blocks(finish())
            return [
                self._join(block_DTrc, matrix)
                for matrix, block_DTrc in zip(self.owned_matrices, blocks, strict=True)
            ]

        return whole

    def scatter(self, wholes: Sequence[torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Start to send the owners' results to everyone.

        Args:
            wholes: the result for each matrix in `owned`.

        Returns:
            A function that waits for the exchange and returns this rank's pieces, flat, one after
            the other; `shards_of` takes them apart.
        """
        sent = torch.zeros(sum(self.receive_sizes), dtype=self.dtype, device=self.device)
        blocks = self._owned_blocks(sent)
        for matrix, block_DTrc, whole_RC in zip(self.owned_matrices, blocks, wholes, strict=True):
            self._split(whole_RC, block_DTrc, matrix)
        return start_all_to_all(sent, self.receive_sizes, self.send_sizes, self.axis)

    def shards_of(self, pieces: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return views of the shards in `pieces`, without the zeros after their rows.

        Args:
            like: tensors of the shards' shapes.
        """
        return [
            piece[: shard.shape[0]] for piece, shard in zip(self._pieces(pieces), like, strict=True)
        ]

    @property
    def owned_matrices(self) -> list[Matrix]:
        """This rank's own matrices."""
        return [self.matrices[number] for number in self.owned]

    def _piece_elements(self, numbers: Sequence[int]) -> int:
        shapes = [self.matrices[number].piece_shape(*self.grid) for number in numbers]
        return sum(rows * columns for rows, columns in shapes)

    def _pieces(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return views of this rank's pieces of all matrices of the bucket."""
        shapes = [self.matrices[number].piece_shape(*self.grid) for number in self.numbers]
        parts = flat.split([rows * columns for rows, columns in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _owned_blocks(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return views of all ranks' pieces of this rank's own matrices: [D, T, r, c] each."""
        if not self.owned:
            return []
        shapes = [matrix.piece_shape(*self.grid) for matrix in self.owned_matrices]
        # A rank's pieces of all matrices follow each other.
        by_rank = flat.view(self.axis.size, -1)
        parts = by_rank.split([rows * columns for rows, columns in shapes], dim=-1)
        return [part.view(*self.grid, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def _join(self, block_DTrc: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Put a matrix together from all ranks' pieces."""
        tp = self.grid[1]
        if matrix.tp_dim == 0:
            # The rows of a tp rank follow each other, and zeros follow them.
            rows_TRC = block_DTrc.transpose(0, 1).reshape(tp, -1, matrix.columns)
            return rows_TRC[:, : matrix.rows // tp].reshape(matrix.rows, matrix.columns)
        if matrix.tp_dim == 1:
            rows_RC = block_DTrc.transpose(1, 2).reshape(-1, matrix.columns)
        else:
            # All tp ranks have sent the same rows: those of one are enough.
            rows_RC = block_DTrc[:, self.tp_rank].reshape(-1, matrix.columns)
        return rows_RC[: matrix.rows]

    def _split(self, whole_RC: torch.Tensor, block_DTrc: torch.Tensor, matrix: Matrix) -> None:
        """Cut a matrix into all ranks' pieces, in `block_DTrc`: the reverse of `_join`."""
        dp_cp, tp, piece_rows, columns = block_DTrc.shape
        cut_rows = tp if matrix.tp_dim == 0 else 1
        rows_TRC = whole_RC.reshape(cut_rows, -1, matrix.columns)
        missing = dp_cp * piece_rows - rows_TRC.shape[1]
        if missing:
            rows_TRC = nn.functional.pad(rows_TRC, (0, 0, 0, missing))
        if matrix.tp_dim == 1:
            pieces_DTrc = rows_TRC.view(dp_cp, piece_rows, tp, columns).transpose(1, 2)
        else:
            # Where tp does not cut the rows, all of its ranks get the same.
            pieces_DTrc = rows_TRC.view(cut_rows, dp_cp, piece_rows, columns).transpose(0, 1)
        block_DTrc.copy_(pieces_DTrc)
