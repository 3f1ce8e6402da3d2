"""Best fit decreasing: items into bins of one capacity, a million items in a second or less."""

import numba
import numpy as np

# fmt: off
DEBRUIJN = np.array(
    [
         0,  1, 48,  2, 57, 49, 28,  3, 61, 58, 50, 42, 38, 29, 17,  4,
        62, 55, 59, 36, 53, 51, 43, 22, 45, 39, 33, 30, 24, 18, 12,  5,
        63, 47, 56, 27, 60, 41, 37, 16, 54, 35, 52, 21, 44, 32, 23, 11,
        46, 26, 40, 15, 34, 20, 31, 10, 25, 14, 19,  9, 13,  8,  7,  6,
    ],
    dtype=np.int64,
)
# fmt: on
"""Number of the lowest set bit, by the top six bits of its product with DEBRUIJN_FACTOR."""
DEBRUIJN_FACTOR = np.uint64(0x03F79D71B4CB0A89)


def pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Put each item, longest first, into the fullest bin that still has room for it.

    Args:
        lengths: int64 [items], each in [1, capacity].
    Returns:
        The bin of each item, int32 [items]; bins are numbered from 0 in the order they are opened.
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity), capacity
    return _pack(lengths, capacity)


@numba.njit(nogil=True, cache=True)
def numbers_by_bin(bins, begins):
    """List item numbers bin after bin, each bin's in order; begins: int64 [bins + 1]."""
    places = begins.copy()
    order = np.empty(len(bins), dtype=np.int32)
    for i in range(len(bins)):
        order[places[bins[i]]] = i
        places[bins[i]] += 1
    return order


@numba.njit(nogil=True, cache=True)
def _pack(lengths, capacity):
    """Pack with a list of bins per room (free tokens), and a set of the rooms that have one."""
    # Levels of the set: bits for rooms, 64 to a word, then bits for the words that are not 0, ...
    levels = [0]
    size = capacity + 1
    while True:
        size = (size + 63) >> 6
        levels.append(levels[-1] + size)
        if size == 1:
            break
    starts = np.array(levels)
    words = np.zeros(starts[-1], dtype=np.uint64)
    heads = np.full(capacity + 1, -1, dtype=np.int32)  # room -> a bin with it
    following = np.empty(len(lengths), dtype=np.int32)  # bin -> another with the same room
    bins = np.empty(len(lengths), dtype=np.int32)
    count = 0
    for item in _longest_first(lengths, capacity):
        length = lengths[item]
        # The fullest bin that has room has the smallest room that is enough.
        room = _next_in_set(words, starts, length)
        if room < 0:
            target = count
            room = capacity
            count += 1
        else:
            target = heads[room]
            heads[room] = following[target]
            if heads[room] < 0:
                _remove_from_set(words, starts, room)
        bins[item] = target
        # The bin moves to the list of the room that it has now.
        room -= length
        if room > 0:
            if heads[room] < 0:
                _add_to_set(words, starts, room)
            following[target] = heads[room]
            heads[room] = target
    return bins


@numba.njit(nogil=True, cache=True)
def _longest_first(lengths, capacity):
    """Sort item numbers by falling length, equal ones in order (counting sort)."""
    counts = np.zeros(capacity + 2, dtype=np.int32)
    for length in lengths:
        counts[capacity - length + 1] += 1
    for i in range(1, len(counts)):
        counts[i] += counts[i - 1]
    order = np.empty(len(lengths), dtype=np.int32)
    for i in range(len(lengths)):
        place = capacity - lengths[i]
        order[counts[place]] = i
        counts[place] += 1
    return order


# ---------------------------------------------------------------- a set of small numbers
# Words of 64 bits; those of level l lie at words[levels[l]:levels[l + 1]]. A bit of level 0 says
# that a number is in the set, a bit of a higher level that the word below it is not 0.


@numba.njit(inline="always")
def _lowest_bit(word):
    """Number the lowest bit that is set in a uint64 other than 0 (de Bruijn multiplication)."""
    lowest = word & (~word + np.uint64(1))
    return DEBRUIJN[(lowest * DEBRUIJN_FACTOR) >> np.uint64(58)]


@numba.njit(nogil=True, cache=True)
def _next_in_set(words, levels, value):
    """Find the smallest number >= value in the set; -1 if there is none."""
    level = 0
    while level < len(levels) - 1:
        word = value >> 6
        bit = value & 63
        if word >= levels[level + 1] - levels[level]:
            return -1
        found = words[levels[level] + word] & (~np.uint64(0) << np.uint64(bit))
        if found:
            # Walk down to the smallest number below this bit.
            value = (word << 6) + _lowest_bit(found)
            while level > 0:
                level -= 1
                value = (value << 6) + _lowest_bit(words[levels[level] + value])
            return value
        # Nothing in the rest of this word: look for a later word, one level up.
        value = word + 1
        level += 1
    return -1


@numba.njit(nogil=True, cache=True)
def _add_to_set(words, levels, value):
    """Add a number to the set."""
    for level in range(len(levels) - 1):
        words[levels[level] + (value >> 6)] |= np.uint64(1) << np.uint64(value & 63)
        value >>= 6


@numba.njit(nogil=True, cache=True)
def _remove_from_set(words, levels, value):
    """Take a number out of the set."""
    for level in range(len(levels) - 1):
        place = levels[level] + (value >> 6)
        words[place] &= ~(np.uint64(1) << np.uint64(value & 63))
        if words[place]:
            return
        value >>= 6
