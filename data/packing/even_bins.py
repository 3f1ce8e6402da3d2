"""Bins that cost nearly the same, and are full: documents dealt by cost, the shortest fill up.

A step waits for its most expensive sample. Documents come longest first, each to the bin whose cost
in the end will be least: what it holds, and its room at the mean cost of the tokens that are still
to come. A reserve of the shortest documents is kept to the last and goes by best fit (bins.py), so
that the bins are full. A document that costs more by itself than the mean of the bins cannot be
balanced by any packing; the others are equal then, and beside it lie only the shortest.

All is computed in whole numbers: packing again, anywhere, gives the same.
"""

import math

import numba
import numpy as np

from data.packing.bins import NO_LIMIT, fill_up, longest_first, pack

RESERVES = (0.02, 0.06, 0.2)
"""Shares of the tokens that fill up, tried in turn until the bins are full enough."""
BINS_PER_LOST_ONE = 1000
"""Equal costs may take one bin more than best fit alone for each this many."""
COST_BITS = 26
"""The cost of a mean bin is about 2 ** COST_BITS units."""
RATE_BITS = 16
"""Binary places of costs per token."""
SAME_RATE = 64
"""The bins are sorted again once the cost per token has changed by a part of this many."""
SAME_LENGTH = 32
"""The same for the length of the documents: bins that had no room may have some."""


def pack_evenly(
    lengths: np.ndarray, costs: np.ndarray, capacity: int, most: int = NO_LIMIT
) -> np.ndarray:
    """Put items into bins that are full and cost nearly the same.

    Args:
        lengths: int64 [items], each in [1, capacity].
        costs: float64 [items], at least 0.
        most: items that a bin holds at most.
    Returns:
        The bin of each item, int32 [items].
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        return np.empty(0, dtype=np.int32)
    order = longest_first(lengths, capacity)
    # The least bins that there can be, as far as best fit knows.
    plain = pack(lengths, capacity)
    fewest = max(_count(plain), -(-len(lengths) // most))
    units = _in_units(costs, fewest)
    tried = []
    for reserve in RESERVES:
        bins = _deal_and_fill(order, lengths, units, capacity, most, fewest, reserve)
        if _count(bins) <= fewest + fewest // BINS_PER_LOST_ONE:
            return bins
        tried.append(bins)
    # Full bins matter more than equal ones.
    tried.append(plain if most >= len(lengths) else pack(lengths, capacity, most))
    return min(tried, key=_count)


def pack_with_limit(lengths: np.ndarray, capacity: int, most: int) -> np.ndarray:
    """Put items into bins as `pack` does, or where one has too many spread them evenly.

    Best fit alone puts the shortest together, and bins that are not full would hold all they may.
    """
    bins = pack(lengths, capacity)
    if len(bins) == 0 or np.bincount(bins).max() <= most:
        return bins
    return pack_evenly(lengths, np.ones(len(lengths)), capacity, most)


def _count(bins: np.ndarray) -> int:
    return int(bins.max()) + 1


def _in_units(costs: np.ndarray, bins: int) -> np.ndarray:
    """Round costs to whole units -> int64 [items]; the factor is a power of 2, so exact."""
    _, exponent = math.frexp(_add(costs) / bins)
    return np.rint(np.ldexp(costs, COST_BITS - exponent)).astype(np.int64)


def _deal_and_fill(
    order: np.ndarray,
    lengths: np.ndarray,
    costs: np.ndarray,
    capacity: int,
    most: int,
    count: int,
    reserve: float,
) -> np.ndarray:
    """Pack into `count` bins, or more where they do not hold all -> the bin of each item."""
    # The reserve: the shortest items, as many as hold its share of the tokens.
    before = np.cumsum(lengths[order])
    dealt = int(np.searchsorted(before, (1.0 - reserve) * float(before[-1]), side="right"))
    tokens_dealt = int(before[dealt - 1]) if dealt else 0
    # Each bin keeps room for its part of it.
    spare = (int(before[-1]) - tokens_dealt) // count
    bins = np.full(len(lengths), -1, dtype=np.int32)
    rooms = np.full(count, capacity, dtype=np.int64)
    items = np.zeros(count, dtype=np.int64)
    _deal(order[:dealt], lengths, costs, spare, most, bins, rooms, items)
    fill_up(order, lengths, capacity, most, bins, rooms, items)
    # A bin may have stayed empty where there are few items.
    used = np.bincount(bins) > 0
    return (np.cumsum(used) - 1)[bins].astype(np.int32)


# ---------------------------------------------------------------- dealing


@numba.njit(nogil=True, cache=True)
def _add(costs):
    """Add up in order, which rounds alike everywhere."""
    total = 0.0
    for cost in costs:
        total += cost
    return total


@numba.njit(nogil=True, cache=True)
def _deal(order, lengths, costs, spare, most, bins, rooms, items):
    """Deal items to the bin of the least cost in the end; one that finds no room keeps bin -1.

    Args:
        spare: tokens that stay free in each bin, unless one item alone needs them.
        bins, rooms, items: as in bins.py: fill_up; changed here.
    """
    count = len(rooms)
    loads = np.zeros(count, dtype=np.int64)
    keys = np.empty(count, dtype=np.int64)
    heap = np.empty(count, dtype=np.int32)
    size = 0
    cost_left = costs.sum()
    tokens_left = lengths.sum()
    highest_rate = (np.int64(1) << 61) // rooms.max()
    sorted_rate = np.int64(-1)
    sorted_length = np.int64(0)
    for item in order:
        length = lengths[item]
        # Costs per token fall as the items get shorter: sort again where that may matter.
        rate = min((cost_left << RATE_BITS) // tokens_left, highest_rate)
        is_other = abs(rate - sorted_rate) * SAME_RATE > sorted_rate
        if is_other or length * (SAME_LENGTH + 1) < sorted_length * SAME_LENGTH or size == 0:
            size = _sort_bins(loads, rooms, items, rate, spare, most, keys, heap)
            sorted_rate = rate
            sorted_length = length
        cost_left -= costs[item]
        tokens_left -= length
        # Bins without room leave the heap, until it is sorted again.
        while size > 0 and not _fits(length, rooms[heap[0]], items[heap[0]], spare):
            size = _drop_first(heap, size, keys)
        if size == 0:
            continue
        target = heap[0]
        bins[item] = target
        loads[target] += costs[item]
        rooms[target] -= length
        items[target] += 1
        if rooms[target] <= spare or items[target] >= most:
            size = _drop_first(heap, size, keys)
        else:
            keys[target] = (loads[target] << RATE_BITS) + rooms[target] * sorted_rate
            _sift_down(heap, size, keys, 0)


@numba.njit(inline="always")
def _fits(length, room, items, spare):
    return length + spare <= room or (items == 0 and length <= room)


@numba.njit(nogil=True, cache=True)
def _sort_bins(loads, rooms, items, rate, spare, most, keys, heap):
    """Make a heap of the bins that have room, by their cost in the end -> its size."""
    size = 0
    for number in range(len(rooms)):
        if rooms[number] > spare and items[number] < most:
            keys[number] = (loads[number] << RATE_BITS) + rooms[number] * rate
            heap[size] = number
            size += 1
    for place in range(size // 2 - 1, -1, -1):
        _sift_down(heap, size, keys, place)
    return size


@numba.njit(nogil=True, cache=True)
def _drop_first(heap, size, keys):
    """Take the first bin out of the heap -> the heap's size."""
    heap[0] = heap[size - 1]
    _sift_down(heap, size - 1, keys, 0)
    return size - 1


@numba.njit(nogil=True, cache=True)
def _sift_down(heap, size, keys, place):
    """Move a bin down the heap until none below it has a lower key."""
    while True:
        child = 2 * place + 1
        if child >= size:
            return
        if child + 1 < size and keys[heap[child + 1]] < keys[heap[child]]:
            child += 1
        if keys[heap[child]] >= keys[heap[place]]:
            return
        lower = heap[child]
        heap[child] = heap[place]
        heap[place] = lower
        place = child
