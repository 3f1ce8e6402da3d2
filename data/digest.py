"""A number that says which tokens and labels a global batch held, however it was cut over ranks."""

from collections.abc import Sequence

import numba
import numpy as np

from data.batch import IGNORE, Batch

DIGEST_BITS = 40
"""Bits of a digest, so that those of 8,192 ranks add up exactly in fp64."""


def digest(
    batch: Batch, pieces: Sequence[tuple[int, int]], firsts: Sequence[int], seq_length: int
) -> int:
    """Hash the inputs and labels and their places in the global batch -> a number below 2^40.

    The digests of all slices of a global batch, added modulo 2^40, are the same however it is cut
    over ranks and microbatches, and whichever rank has which sample.

    Args:
        pieces: ranges of the microbatch's tokens that `batch` holds.
        firsts: place of the first token of each of the microbatch's samples in the global batch,
            whose samples are in the order in which they were drawn.
        seq_length: tokens per sample.
    """
    ranges = np.array(pieces, dtype=np.int64)
    places = np.array(firsts, dtype=np.int64)
    return int(_digest(batch.tokens.numpy(), batch.labels.numpy(), ranges, places, seq_length))


@numba.njit(nogil=True, cache=True)
def _digest(tokens, labels, pieces, firsts, seq_length):
    total = numba.uint64(0)
    read = 0
    for i in range(len(pieces)):
        low = pieces[i, 0]
        # A piece may begin in one sample and end in another.
        while low < pieces[i, 1]:
            sample = low // seq_length
            high = min(pieces[i, 1], (sample + 1) * seq_length)
            shift = firsts[sample] - sample * seq_length
            for place in range(low + shift, high + shift):
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
            low = high
    return total & numba.uint64((1 << DIGEST_BITS) - 1)
