"""The documents of an attention call, as every backend reads them.

A microbatch is a row of packed documents. A rank's queries are one or two ranges of it (two with
the second level of context parallelism), and each range is one attention call.
"""

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class KernelCall:
    """Neighbouring documents of an attention call that the backend `mixed` gives to one kernel."""

    rows_q: slice
    rows_k: slice
    documents: int
    length: int
    """Tokens of each document for cuDNN; 0 where the documents go to the varlen op."""
    padded: int
    """The length with padding. More than `length` for one document only."""
    cu_q: torch.Tensor
    """Where each document's queries begin, and the end, from 0: int32 on the device."""
    cu_k: torch.Tensor
    max_q: int
    max_k: int

    @property
    def is_long(self) -> bool:
        return self.length > 0

    @property
    def is_padded(self) -> bool:
        return self.padded > self.length


@dataclass(frozen=True)
class PackedDocuments:
    """The documents of one attention call over tokens [start, stop) of the microbatch."""

    queries: slice
    """Rows of the rank's queries that the call is for."""
    keys: slice
    """Rows of all keys that it reads: from the first document's begin to `stop`."""
    bounds_q: list[int]
    """Where each document's queries begin, and the end: [documents + 1], from 0."""
    bounds_k: list[int]
    """The same for its keys. An earlier rank may hold a document's first keys."""
    cu_q: torch.Tensor
    """`bounds_q` as int32 on the device."""
    cu_k: torch.Tensor
    max_q: int
    """Queries of the longest document."""
    max_k: int
    kernel_calls: dict[int, list[KernelCall]] = field(
        default_factory=dict, compare=False, repr=False
    )
    """What `mixed` makes of the documents, by its crossover (kernel_calls.py: split_documents).

    The first layer fills it, and the others look it up."""


def pack_documents(
    cu_seqlens: torch.Tensor, pieces: list[tuple[int, int]], device: torch.device
) -> list[PackedDocuments]:
    """Describe the attention calls for queries that are the given ranges of the tokens, in order.

    Args:
        cu_seqlens: int32 [documents + 1] on the host, over all tokens of the microbatch.
        pieces: half-open ranges (parallel/context.py: group_pieces).
    """
    edges = cu_seqlens.numpy()
    found = []
    row = 0  # of the rank's queries, which hold the ranges one after the other
    for start, stop in pieces:
        # The documents that the range touches, the first and last perhaps in part.
        first = int(np.searchsorted(edges, start, side="right")) - 1
        last = int(np.searchsorted(edges, stop, side="left"))
        inside = edges[first : last + 1]
        begin = int(edges[first])
        # Queries are cut at both ends of the range, keys only at its end.
        bounds_q = np.clip(inside, start, stop) - start
        bounds_k = np.minimum(inside, stop) - begin
        found.append(
            PackedDocuments(
                queries=slice(row, row + stop - start),
                keys=slice(begin, stop),
                bounds_q=bounds_q.tolist(),
                bounds_k=bounds_k.tolist(),
                cu_q=_on_device(bounds_q, device),
                cu_k=_on_device(bounds_k, device),
                # The kernels size their grids by the longest document.
                max_q=int(np.diff(bounds_q).max()),
                max_k=int(np.diff(bounds_k).max()),
            )
        )
        row += stop - start
    return found


def _on_device(bounds: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy bounds to the device as int32, without waiting for it."""
    return torch.from_numpy(bounds.astype(np.int32)).to(device, non_blocking=True)
