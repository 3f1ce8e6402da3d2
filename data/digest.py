"""A number that says which tokens and labels a global batch held, however it was cut over ranks."""

from collections.abc import Sequence

import numba
import numpy as np

from data.batch import IGNORE, Batch

DIGEST_BITS = 40
"""Bits of a digest, so that those of 8,192 ranks add up exactly in fp64."""


def digest(batch: Batch, pieces: Sequence[tuple[int, int]], first: int) -> int:
    """Hash the inputs and labels and their places in the global batch -> a number below 2^40.

    The digests of all slices of a global batch, added modulo 2^40, are the same however it is cut
    over ranks and microbatches.

    Args:
        pieces: ranges of the microbatch's tokens that `batch` holds.
        first: place of the microbatch's first token in the global batch.
    """
    ranges = np.array(pieces, dtype=np.int64)
    return int(_digest(batch.tokens.numpy(), batch.labels.numpy(), ranges, first))


@numba.njit(nogil=True, cache=True)
def _digest(tokens, labels, pieces, first):
    total = numba.uint64(0)
    read = 0
    for i in range(len(pieces)):
        for place in range(first + pieces[i, 0], first + pieces[i, 1]):
            # A place's weight: the mixing step of SplitMix64 (Steele, Lea, Flood 2014).
            weight = numba.uint64(place + 1) * numba.uint64(0x9E3779B97F4A7C15)
            weight = (weight ^ (weight >> numba.uint64(30))) * numba.uint64(0xBF58476D1CE4E5B9)
            weight = (weight ^ (weight >> numba.uint64(27))) * numba.uint64(0x94D049BB133111EB)
            weight ^= weight >> numba.uint64(31)
            # Labels have a weight of their own, or swapping one with a token would not show.
            label_weight = weight ^ numba.uint64(0x9E3779B97F4A7C15)
            total += weight * numba.uint64(tokens[read] + 1)
            total += label_weight * numba.uint64(labels[read] + 1 - IGNORE)
            read += 1
    return total & numba.uint64((1 << DIGEST_BITS) - 1)
