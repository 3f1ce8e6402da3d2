"""Seeded permutations of range(size) without a table: any part of one costs the same as its numbers.

A generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002): a number
below a x b >= size is split into (number % a, number // a); each round adds to one half a hash of the other.
A result beyond size goes through again, so the numbers below it map among themselves.
"""

from typing import NamedTuple

import numba
import numpy as np
from numba import uint64

ROUNDS = 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Permutation(NamedTuple):
    """What the compiled functions need. a x b >= size; keys: uint64 [ROUNDS]."""

    size: int
    a: int
    b: int
    keys: np.ndarray

    @staticmethod
    def make(size: int, *seed: int) -> "Permutation":
        """A permutation of range(size), below 2^32, for each tuple of seeds (integers of 0 or more)."""
        assert 0 <= size <= 2**32, size
        a = max(1, int(np.ceil(np.sqrt(size))))
        key = np.zeros(1, dtype=np.uint64)
        for number in seed:
            key = hash_numbers(key ^ np.uint64(number % 2**64))
        return Permutation(size, a, -(-size // a), hash_numbers(key + np.arange(1, ROUNDS + 1, dtype=np.uint64)))

    def values(self, start: int, stop: int) -> np.ndarray:
        """Where [start, stop) goes -> int64 [stop - start]."""
        out = np.empty(stop - start, dtype=np.int64)
        fill_permuted(self, start, out)
        return out


def hash_numbers(numbers: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood, 2014) of uint64 numbers."""
    mixed = (numbers + GOLDEN) * GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@numba.njit(inline="always")
def _hash_below(number, key, limit):
    """A hash of (number, key) in [0, limit); all uint64, limit at most 2^32."""
    mixed = number * uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> uint64(32))) * uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> uint64(29))) * uint64(0x94D049BB133111EB)
    return ((mixed >> uint64(32)) * limit) >> uint64(32)


@numba.njit(inline="always")
def permuted(number, permutation):
    """Where one number goes; for compiled callers."""
    size, a, b = uint64(permutation.size), uint64(permutation.a), uint64(permutation.b)
    keys = permutation.keys
    number = uint64(number)
    while True:
        low, high = number % a, number // a
        for i in range(0, ROUNDS, 2):
            low += _hash_below(high, keys[i], a)
            if low >= a:
                low -= a
            high += _hash_below(low, keys[i + 1], b)
            if high >= b:
                high -= b
        number = low + a * high
        if number < size:
            return numba.int64(number)


@numba.njit(nogil=True, cache=True)
def fill_permuted(permutation, start, out):
    """out[i] = where start + i goes."""
    for i in range(len(out)):
        out[i] = permuted(start + i, permutation)
