"""Blends: which sources a run draws from, in what shares, and which source gives the next sample.

The order is the one of Sainte-Lague's divisors: source i's sample number j has the key (j + 1/2) /
weight i, and the samples come in the order of their keys. So after any number of samples each
source is within one of its share, and which source gives sample k does not depend on how far the
run goes.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from data.units import parse_tokens

RANGE = re.compile(r"(?P<prefix>.+)\[(?P<low>[^:\[\]]*):(?P<high>[^:\[\]]*)\]")
"""PREFIX[LOW:HIGH], a range of document lengths."""
NO_LIMIT = 2**62
"""Samples of a source without end."""


@dataclass(frozen=True)
class SourceName:
    """One source of a blend: a corpus, or those of its documents that have [low, high) tokens."""

    prefix: str
    low: int = 0
    high: int | None = None

    @staticmethod
    def parse(text: str) -> "SourceName":
        """Read `PREFIX` or `PREFIX[LOW:HIGH]`, where LOW or HIGH may be left out, as in web[64Ki:].

        Raises:
            ValueError: the range is no range.
        """
        match = RANGE.fullmatch(text)
        if match is None:
            return SourceName(text)
        try:
            low = parse_tokens(match["low"]) if match["low"] else 0
            high = parse_tokens(match["high"]) if match["high"] else None
        except ValueError as error:
            raise ValueError(
                f"{text}: {error}. Fix: a range of document lengths is written PREFIX[64Ki:] or "
                "PREFIX[1Ki:64Ki]."
            ) from None
        if high is not None and high <= max(low, 1):
            raise ValueError(
                f"{text}: no document has at least {low} and fewer than {high} tokens. Fix: the "
                "range."
            )
        return SourceName(match["prefix"], low, high)

    def overlaps(self, other: "SourceName") -> bool:
        """Could a document be in both?"""
        # ./web is web. Not Path.resolve(): a link's target may move between starts.
        same_corpus = os.path.abspath(self.prefix) == os.path.abspath(other.prefix)
        begins_before = other.high is None or self.low < other.high
        ends_after = self.high is None or other.low < self.high
        return same_corpus and begins_before and ends_after

    def __str__(self) -> str:
        if self.low == 0 and self.high is None:
            return self.prefix
        return f"{self.prefix}[{self.low or ''}:{'' if self.high is None else self.high}]"


def parse_blend(words: Sequence[str], field: str) -> list[tuple[float | None, SourceName]]:
    """Read Megatron's `[weight prefix ...]` or `[prefix ...]` -> (weight, source) each.

    Without weights (None) sources are drawn in proportion to their tokens. Sources of weight 0 are
    left out.

    Args:
        field: the setting that gives the words, for messages.

    Raises:
        ValueError: weights and prefixes do not alternate, a weight is negative or not a number, all
            are 0, or two sources share documents; all problems, a line each.
    """
    numbers = [_number(word) for word in words]
    weighted = len(words) % 2 == 0 and all(number is not None for number in numbers[::2])
    if not weighted and any(number is not None for number in numbers):
        raise ValueError(
            f"{field} = {' '.join(words)}: must be prefixes alone, or a weight before each. Fix: "
            "for example 0.7 web 0.3 code."
        )
    # All problems are collected, so that one start shows them.
    weights = numbers[::2] if weighted else [None] * len(words)
    texts = list(words[1::2] if weighted else words)
    problems = [
        f"{field}: weight {weight} of {text}: must be a finite number of at least 0. Fix: give one."
        for weight, text in zip(weights, texts, strict=True)
        if weight is not None and not 0 <= weight < math.inf
    ]
    if weighted and not problems and not any(weights):
        problems.append(f"{field} = {' '.join(words)}: all weights are 0. Fix: give one above 0.")
    entries = []
    for weight, text in zip(weights, texts, strict=True):
        try:
            entries.append((weight, SourceName.parse(text)))
        except ValueError as error:
            problems.append(f"{field}: {error}")
    problems += _overlaps([source for _, source in entries], field)
    if problems:
        raise ValueError("\n".join(problems))
    return [(weight, source) for weight, source in entries if weight != 0]


def _overlaps(sources: Sequence[SourceName], field: str) -> list[str]:
    """Name the pairs of sources that share documents."""
    problems = []
    by_prefix: dict[str, list[SourceName]] = {}  # there may be thousands of prefixes
    for source in sources:
        same_prefix = by_prefix.setdefault(os.path.abspath(source.prefix), [])
        problems += [
            f"{field}: {other} and {source}: the same documents would be drawn twice. Fix: name a "
            "prefix once, or give ranges that do not overlap."
            for other in same_prefix
            if source.overlaps(other)
        ]
        same_prefix.append(source)
    return problems


def _number(word: str) -> float | None:
    """Read a number; None where the word is none."""
    try:
        return float(word)
    except ValueError:
        return None


class BlendOrder:
    """Tells which source gives sample k."""

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None]):
        """
        Args:
            weights: above 0, any sum.
            limits: samples that each source has; None = without end.
        """
        self.weights = np.array(weights, dtype=np.float64)
        assert (self.weights > 0).all(), weights
        # Near 1, so that no key is infinite; by a power of 2, which leaves the order as it is.
        self.weights = np.ldexp(self.weights, -int(np.frexp(self.weights.max())[1]))
        self._limits = np.array(
            [NO_LIMIT if limit is None else limit for limit in limits], dtype=np.int64
        )
        # Samples counted last, and what each source gave of them: the next draw goes on from there.
        self._seen: tuple[int, np.ndarray] = (0, np.zeros(len(self.weights), dtype=np.int64))

    @property
    def samples(self) -> int:
        """Samples of all sources together; NO_LIMIT = without end."""
        return min(NO_LIMIT, sum(self._limits.tolist()))

    def counts(self, samples: int) -> np.ndarray:
        """Count how many of the first `samples` each source gives -> int64 [sources]."""
        assert 0 <= samples <= self.samples, (samples, self.samples)
        # Near what was counted last, draw on from there; elsewhere, from a few samples before.
        known, counts = self._seen
        if not known <= samples <= known + 4096:
            counts = _counts_below(self.weights, self._limits, samples)
        counts = counts.copy()
        missing = samples - int(counts.sum())
        _draw(self.weights, self._limits, counts, np.empty(missing, dtype=np.int64))
        self._seen = samples, counts
        return counts.copy()

    def draw(self, first: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Name the source of each of samples [first, first + number), and which of the source's own
        samples it is."""
        counts = self.counts(first)
        before = counts.copy()
        sources = np.empty(number, dtype=np.int64)
        _draw(self.weights, self._limits, counts, sources)
        self._seen = first + number, counts
        # A source gives its own samples in order.
        places = np.empty(number, dtype=np.int64)
        for source in np.unique(sources).tolist():
            mine = sources == source
            places[mine] = before[source] + np.arange(int(mine.sum()))
        return sources, places

    def numbers_of(self, source: int, own: np.ndarray) -> np.ndarray:
        """Find which sample of all sources each of a source's own is; -1 stays -1.

        Args:
            own: the source's numbers of its samples, int64 [samples]; none beyond its limit.
        """
        return _numbers_of(self.weights, self._limits, source, own)


@numba.njit(nogil=True, cache=True)
def _numbers_of(weights, limits, source, own):
    """Count the samples of all sources that come before each of a source's own."""
    numbers = own.copy()
    for j in range(len(own)):
        if own[j] < 0:
            continue
        key = (own[j] + 0.5) / weights[source]
        for i in range(len(weights)):
            if i < source:
                numbers[j] += _up_to(weights[i], limits[i], key)
            elif i > source:
                # Of equal keys the earlier source's comes first.
                numbers[j] += _up_to(weights[i], limits[i], np.nextafter(key, 0.0))
    return numbers


@numba.njit(nogil=True, cache=True)
def _counts_below(weights, limits, samples):
    """Count what each source gives of almost the first `samples`: at most a few per source fewer.

    Searches for the highest key up to which no more samples come.
    """
    low = 0.0
    high = 1.0
    while _number_up_to(weights, limits, high) <= samples and high < 1e300:
        high *= 2.0
    # Bisection, to the last bit of a float.
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle == low or middle == high:
            break
        if _number_up_to(weights, limits, middle) <= samples:
            low = middle
        else:
            high = middle
    counts = np.empty(len(weights), dtype=np.int64)
    for i in range(len(weights)):
        counts[i] = _up_to(weights[i], limits[i], low)
    return counts


@numba.njit(nogil=True, cache=True)
def _number_up_to(weights, limits, key):
    """Count the samples of all sources whose keys are at most `key`."""
    total = 0
    for i in range(len(weights)):
        total += _up_to(weights[i], limits[i], key)
    return total


@numba.njit(inline="always")
def _up_to(weight, limit, key):
    """Count a source's samples whose keys are at most `key`, by the same division as `_draw`'s."""
    if key * weight > limit:
        return limit
    # A first guess, then to the sample, as rounding may be off by one either way.
    count = int(key * weight + 0.5)
    while count > 0 and (count - 0.5) / weight > key:
        count -= 1
    while (count + 0.5) / weight <= key:
        count += 1
    return min(count, limit)


@numba.njit(nogil=True, cache=True)
def _draw(weights, limits, counts, sources):
    """Fill the sources of the next len(sources) samples: each time the lowest key; counts go up."""
    for k in range(len(sources)):
        best = -1
        lowest = np.inf
        for i in range(len(weights)):
            if counts[i] < limits[i]:
                key = (counts[i] + 0.5) / weights[i]
                if key < lowest:
                    best = i
                    lowest = key
        sources[k] = best
        counts[best] += 1
