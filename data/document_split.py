"""Which documents of a source train, validate and test: drawn at random, by shares."""

import numba
import numpy as np

from data.config import parse_split
from data.permutation import BATCH, Permutation, permuted_batch

SPLITS = ("train", "valid", "test")
SPLIT_PURPOSE = 1
"""Keeps the seed of the split apart from those in stream.py."""


def split_documents(num_documents: int, split: str, seed: int) -> dict[str, np.ndarray]:
    """Cut a seeded permutation of the documents by shares -> split name -> document ids, ascending.

    Random, so that each split is representative, while Megatron-LM cuts in file order. A share
    above 0 gets at least one document as long as there are enough; train comes first, then valid.

    Args:
        split: shares such as `969,30,1`.

    Raises:
        ValueError: `split` is malformed.
    """
    # Round the shares, but give each that is wanted a document; the largest pays for it.
    shares = parse_split(split)
    counts = [int(round(share * num_documents)) for share in shares]
    wanted = [i for i, share in enumerate(shares) if share > 0]
    for i in wanted[:num_documents]:
        counts[i] = max(1, counts[i])
    while (excess := sum(counts) - num_documents) > 0:
        largest = max(range(3), key=lambda i: (counts[i], i))
        counts[largest] -= min(excess, max(1, counts[largest] - 1))
    counts[0] += num_documents - sum(counts)
    ends = np.cumsum(counts)
    # Everything trains: no permutation is needed.
    if counts[0] == num_documents:
        whole = np.arange(num_documents, dtype=_id_type(num_documents))
        return {"train": whole, "valid": whole[:0], "test": whole[:0]}
    # A permutation ranks the documents: those of the lowest ranks train.
    permutation = Permutation.make(num_documents, seed, SPLIT_PURPOSE)
    outs = [np.empty(count, dtype=_id_type(num_documents)) for count in counts]
    _deal(permutation, ends, *outs)
    return dict(zip(SPLITS, outs, strict=True))


def _id_type(num_documents: int) -> type[np.integer]:
    """Choose the smallest dtype that holds the documents' numbers."""
    return np.uint32 if num_documents <= 2**32 else np.int64


@numba.njit(nogil=True, cache=True)
def _deal(permutation, ends, train, valid, test):
    """Put each document into the split whose range of ranks its own lies in."""
    counts = np.zeros(3, dtype=np.int64)
    low = np.empty(BATCH, dtype=np.uint32)
    high = np.empty(BATCH, dtype=np.uint32)
    ranks = np.empty(BATCH, dtype=np.int64)
    for document in range(permutation.size):
        if document % BATCH == 0:
            permuted_batch(
                document, permutation, low, high, ranks[: min(BATCH, permutation.size - document)]
            )
        rank = ranks[document % BATCH]
        if rank < ends[0]:
            train[counts[0]] = document
            counts[0] += 1
        elif rank < ends[1]:
            valid[counts[1]] = document
            counts[1] += 1
        else:
            test[counts[2]] = document
            counts[2] += 1
