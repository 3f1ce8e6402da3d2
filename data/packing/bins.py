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


NO_LIMIT = np.iinfo(np.int32).max
"""Items of a bin where nothing bounds them."""


def pack(lengths: np.ndarray, capacity: int, most: int = NO_LIMIT) -> np.ndarray:
    """Put each item, longest first, into the fullest bin that still has room for it.

    Args:
        lengths: int64 [items], each in [1, capacity].
        most: items that a bin holds at most.
    Returns:
        The bin of each item, int32 [items]; bins are numbered from 0 in the order they are opened.
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity), capacity
    bins = np.full(len(lengths), -1, dtype=np.int32)
    nothing = np.empty(0, dtype=np.int64)
    fill_up(longest_first(lengths, capacity), lengths, capacity, most, bins, nothing, nothing)
    return bins


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
def fill_up(order, lengths, capacity, most, bins, rooms, items):
    """Put the items that have no bin yet each into the fullest one that has room, by best fit.

    Keeps a list of bins per room (free tokens), and a set of the rooms that have one.

    Args:
        order: numbers of the items, longest first.
        bins: int32 [items], filled in; -1 = in none yet.
        rooms, items: int64 [bins], of the bins that there are: free tokens, and items in them.
    """
    starts, words = _empty_set(capacity)
    heads = np.full(capacity + 1, -1, dtype=np.int32)  # room -> a bin with it
    following = np.empty(len(rooms) + len(lengths), dtype=np.int32)  # bin -> another with the room
    held = np.zeros(len(following), dtype=np.int32)
    held[: len(items)] = items
    count = len(rooms)
    for number in range(count):
        if rooms[number] > 0 and held[number] < most:
            _list_bin(number, rooms[number], heads, following, words, starts)
    for item in order:
        if bins[item] >= 0:
            continue
        # The fullest bin that has room has the smallest room that is enough.
        room = _next_in_set(words, starts, lengths[item])
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
        held[target] += 1
        # The bin moves to the list of the room that it has now.
        room -= lengths[item]
        if room > 0 and held[target] < most:
            _list_bin(target, room, heads, following, words, starts)


@numba.njit(nogil=True, cache=True)
def _list_bin(number, room, heads, following, words, starts):
    """Put a bin at the head of the list of its room."""
    if heads[room] < 0:
        _add_to_set(words, starts, room)
    following[number] = heads[room]
    heads[room] = number


@numba.njit(nogil=True, cache=True)
def longest_first(lengths, capacity):
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


@numba.njit(nogil=True, cache=True)
def _empty_set(largest):
    """Make a set for numbers up to `largest` -> where its levels begin, and its words."""
    levels = [0]
    size = largest + 1
    while True:
        size = (size + 63) >> 6
        levels.append(levels[-1] + size)
        if size == 1:
            break
    return np.array(levels), np.zeros(levels[-1], dtype=np.uint64)


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
