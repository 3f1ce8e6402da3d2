"""Finding documents at places of an epoch: a walk through a permutation, which has no table.

The tokens before each block of permuted documents are known (`blocks`): a block is found by binary
search, a document by a walk in it. Everything here is compiled, and lets other threads run.
"""

import numba
import numpy as np

from data.permutation import BATCH, permuted, permuted_batch

BLOCK = 16
"""Documents per prefix offset."""


@numba.njit(nogil=True, cache=True)
def find_document(position, lengths, permutation, blocks):
    """Find the document at a position -> (place in the epoch's order, document, its beginning)."""
    # The block by binary search, the document by a walk in it.
    block = np.searchsorted(blocks, position, side="right") - 1
    place = block * BLOCK
    start = blocks[block]
    document = permuted(place, permutation)
    while start + lengths[document] <= position:
        start += lengths[document]
        place += 1
        document = permuted(place, permutation)
    return place, document, start


@numba.njit(nogil=True, cache=True)
def find_spans(starts, counts, lengths, permutation, blocks):
    """Find the spans at positions [starts, starts + counts) of the epoch -> documents, offsets,
    lengths, rests and the number of their interval."""
    # Five rows, in the order of the result; they grow when they are full.
    room = 2 * len(starts) + 64
    out = np.empty((5, room), dtype=np.int64)
    used = 0
    low = np.empty(BATCH, dtype=np.uint32)
    high = np.empty(BATCH, dtype=np.uint32)
    batch = np.empty(BATCH, dtype=np.int64)
    for i in range(len(starts)):
        if counts[i] == 0:
            continue
        position = starts[i]
        end = starts[i] + counts[i]
        place, document, start = find_document(position, lengths, permutation, blocks)
        # Document after document; a batch pays where an interval has many of them.
        first_batched = place + BLOCK
        next_batch = first_batched
        size = 0
        while True:
            # Write the span down, and make room for it first.
            if used == room:
                room *= 2
                larger = np.empty((5, room), dtype=np.int64)
                larger[:, :used] = out
                out = larger
            stop = min(end, start + lengths[document])
            out[0, used] = document
            out[1, used] = position - start
            out[2, used] = stop - position
            out[3, used] = start + lengths[document] - stop
            out[4, used] = i
            used += 1
            if stop == end:
                break
            # The next document begins where this one ends.
            position = stop
            start = stop
            place += 1
            if place < first_batched:
                document = permuted(place, permutation)
            else:
                if place == next_batch:
                    size = min(BATCH, permutation.size - place)
                    permuted_batch(place, permutation, low, high, batch[:size])
                    next_batch = place + size
                document = batch[place - next_batch + size]
    out = out[:, :used]
    return out[0], out[1], out[2], out[3], out[4]


@numba.njit(nogil=True, cache=True)
def find_lengths(starts, counts, lengths, permutation, blocks):
    """Find how many tokens of each document lie at positions [starts, starts + counts) of the epoch
    -> int64 [documents], and where each interval begins in them, int64 [intervals + 1].

    A quarter of the time of `find_spans`: nothing but lengths is looked up, and those of a batch
    together, so that the memory's answers overlap.
    """
    # At most the documents of the blocks that an interval touches.
    firsts = np.searchsorted(blocks, starts, side="right") - 1
    lasts = np.searchsorted(blocks, starts + counts, side="left")
    out = np.empty(BLOCK * np.maximum(lasts - firsts, 0).sum(), dtype=np.int64)
    begins = np.zeros(len(starts) + 1, dtype=np.int64)
    used = 0
    low = np.empty(BATCH, dtype=np.uint32)
    high = np.empty(BATCH, dtype=np.uint32)
    batch = np.empty(BATCH, dtype=np.int64)
    for i in range(len(starts)):
        begins[i + 1] = used
        if counts[i] == 0:
            continue
        # The first document, without what lies before the interval.
        place, document, start = find_document(starts[i], lengths, permutation, blocks)
        length = min(counts[i], start + lengths[document] - starts[i])
        out[used] = length
        used += 1
        left = counts[i] - length
        place += 1
        while left > 0:
            size = min(BATCH, permutation.size - place, lasts[i] * BLOCK - place)
            permuted_batch(place, permutation, low, high, batch[:size])
            place += size
            for j in range(size):
                batch[j] = lengths[batch[j]]
            for j in range(size):
                # The last one, without what lies behind the interval.
                length = min(left, batch[j])
                out[used] = length
                used += 1
                left -= length
                if left == 0:
                    break
        begins[i + 1] = used
    return out[:used], begins
