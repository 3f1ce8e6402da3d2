"""Seeded permutations of range(size) without a table: any part of one costs the same as its
numbers.

A generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA
2002): a number below a x b >= size is split into (number % a, number // a); each round adds to one
half a hash of the other. A result beyond size goes through again, so the numbers below it map among
themselves.
"""

from typing import NamedTuple

import numba
import numpy as np
from numba import uint32, uint64

ROUNDS = 8
"""Rounds of the network, half of them on each half."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio, SplitMix64's increment."""
BATCH = 512
"""Numbers that go through the rounds together: eight at a time in vector registers, since halves
are 16 bits wide."""


class Permutation(NamedTuple):
    """A permutation of range(size), as the compiled functions need it."""

    size: int
    a: int
    """Numbers are split into (number % a, number // a); a x b >= size, both at most 2^16."""
    b: int
    keys: np.ndarray
    """uint32 [ROUNDS]"""

    @staticmethod
    def make(size: int, *seed: int) -> "Permutation":
        """Make the permutation of range(size), at most 2^32, that belongs to a tuple of seeds
        (integers of 0 or more)."""
        assert 0 <= size <= 2**32, size
        a = max(1, int(np.ceil(np.sqrt(size))))
        key = np.zeros(1, dtype=np.uint64)
        for number in seed:
            key = hash_numbers(key ^ np.uint64(number % 2**64))
        keys = hash_numbers(key + np.arange(1, ROUNDS + 1, dtype=np.uint64)) >> np.uint64(32)
        return Permutation(size, a, -(-size // a), keys.astype(np.uint32))

    def values(self, start: int, stop: int) -> np.ndarray:
        """Compute where the numbers [start, stop) go -> int64 [stop - start]."""
        out = np.empty(stop - start, dtype=np.int64)
        fill_permuted(self, start, out)
        return out

    def values_of(self, numbers: np.ndarray) -> np.ndarray:
        """Compute where any numbers below size go -> int64 [numbers]."""
        return _permute_each(self, numbers)


def hash_numbers(numbers: np.ndarray) -> np.ndarray:
    """Hash uint64 numbers by SplitMix64 (Steele, Lea, Flood, 2014)."""
    mixed = (numbers + GOLDEN) * GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@numba.njit(inline="always")
def _hash_below(number, key, limit):
    """Hash (number, key) into [0, limit); all uint32, number and limit at most 2^16 (lowbias32,
    Wellons, 2018)."""
    mixed = uint32(uint32(number * uint32(0x9E3779B1)) + key)
    mixed = uint32(uint32(mixed ^ (mixed >> uint32(16))) * uint32(0x7FEB352D))
    mixed = uint32(uint32(mixed ^ (mixed >> uint32(15))) * uint32(0x846CA68B))
    return uint32(uint32((mixed >> uint32(16)) * limit) >> uint32(16))


@numba.njit(inline="always")
def permuted(number, permutation):
    """Compute where one number goes; for compiled callers."""
    size = uint64(permutation.size)
    wide = uint64(permutation.a)
    a = uint32(permutation.a)
    b = uint32(permutation.b)
    keys = permutation.keys
    number = uint64(number)
    # A result beyond size goes through again, until it lies below.
    while True:
        low = uint32(number % wide)
        high = uint32(number // wide)
        # Each round adds to one half a hash of the other, modulo a or b.
        for i in range(0, ROUNDS, 2):
            low = uint32(low + _hash_below(high, keys[i], a))
            low = low - a if low >= a else low
            high = uint32(high + _hash_below(low, keys[i + 1], b))
            high = high - b if high >= b else high
        number = uint64(low) + wide * uint64(high)
        if number < size:
            return numba.int64(number)


@numba.njit(nogil=True, cache=True)
def permuted_batch(start, permutation, low, high, out):
    """Fill out[i] with where start + i goes, for numbers in range; `low` and `high` are uint32
    buffers of at least its size."""
    a = uint32(permutation.a)
    b = uint32(permutation.b)
    keys = permutation.keys
    # The halves of each number: the next one is one column further, or begins a row.
    row = uint32(start // permutation.a)
    column = uint32(start % permutation.a)
    count = len(out)
    for i in range(count):
        low[i] = column
        high[i] = row
        column = uint32(column + uint32(1))
        if column == a:
            column = uint32(0)
            row = uint32(row + uint32(1))
    for k in range(0, ROUNDS, 2):
        for i in range(count):
            moved = uint32(low[i] + _hash_below(high[i], keys[k], a))
            # Modulo a without a branch: below a, the unsigned difference wraps to a large number.
            low[i] = min(moved, uint32(moved - a))
        for i in range(count):
            moved = uint32(high[i] + _hash_below(low[i], keys[k + 1], b))
            high[i] = min(moved, uint32(moved - b))
    for i in range(count):
        out[i] = numba.int64(low[i]) + permutation.a * numba.int64(high[i])
    # The few that landed beyond size go through again.
    for i in range(count):
        if out[i] >= permutation.size:
            out[i] = permuted(out[i], permutation)


@numba.njit(nogil=True, cache=True)
def fill_permuted(permutation, start, out):
    """Fill out[i] with where start + i goes."""
    low = np.empty(BATCH, dtype=np.uint32)
    high = np.empty(BATCH, dtype=np.uint32)
    for first in range(0, len(out), BATCH):
        part = out[first : first + BATCH]
        permuted_batch(start + first, permutation, low, high, part)


@numba.njit(nogil=True, cache=True)
def _permute_each(permutation, numbers):
    """Compute where each of some numbers goes."""
    out = np.empty(len(numbers), dtype=np.int64)
    for i in range(len(numbers)):
        out[i] = permuted(numbers[i], permutation)
    return out
