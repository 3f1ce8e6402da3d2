"""How a source's stream becomes samples of one length: `concat` cuts it, `best_fit` keeps documents
whole.

Both start from a `Place` (what of the stream is still to be read), give sample j by its number, and
say what is left after n samples, so that a phase of another length or packing goes on with exactly
the rest.

Best-fit decreasing over windows of the stream of about WINDOW_BINS samples, each within one epoch.
A window holds the documents that begin in it; one longer than a sample is cut into full samples and
a rest that is packed like a document. Source of the idea: "Fewer Truncations Improve Language
Modeling" (arXiv 2404.10830).
"""

from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numba
import numpy as np

from data.batch import Sample
from data.permutation import Permutation
from data.stream import DocumentStream, usable_cores

WINDOW_BINS = 1024
"""Samples of a window: enough for the one that stays half empty at its end to be less than a
thousandth."""
KEPT_WINDOWS = 2
"""The one under way and the next; about 25 MB per million documents each."""
ORDER_PURPOSE = 3
"""Keeps the seed of the order of samples apart from those in stream.py."""


@dataclass(frozen=True)
class Place:
    """What of a stream is unread: first the intervals passed over, then everything from `position`
    on."""

    position: int = 0
    held: np.ndarray = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    """int64 [intervals, 2]: stream position, tokens; in the order of the stream, below
    `position`."""

    @property
    def tokens_read(self) -> int:
        """Tokens of the stream that were read before, over all epochs."""
        return self.position - int(self.held[:, 1].sum())

    def documents_read(self, stream: DocumentStream) -> int:
        """Documents whose first token was read before, over all epochs."""
        return stream.documents_before(self.position) - int(
            (stream.locate(self.held).offsets == 0).sum()
        )

    def epoch_end(self, stream: DocumentStream) -> int:
        """Stream position at which the epoch under way ends; at such a position it is that one, and
        at 0 the first."""
        return max(1, -(-self.position // stream.tokens_per_epoch)) * stream.tokens_per_epoch


class Concat:
    """Sample j holds tokens [j x seq_length, (j + 1) x seq_length) of what is unread."""

    def __init__(
        self,
        stream: DocumentStream,
        place: Place,
        seq_length: int,
        mark: tuple[int, int] | None = None,
    ):
        self.stream = stream
        self.place = place
        self.seq_length = seq_length
        self._held_ends = np.cumsum(place.held[:, 1])
        self._held_tokens = int(self._held_ends[-1]) if len(place.held) else 0

    def sample(self, number: int) -> Sample:
        start = number * self.seq_length
        stop = (number + 1) * self.seq_length
        if start >= self._held_tokens:
            position = self.place.position + start - self._held_tokens
            return Sample(
                self.stream, np.array([[position, self.seq_length]]), position + self.seq_length
            )
        parts = [self._held_part(start, stop)]
        if stop > self._held_tokens:
            start = max(start, self._held_tokens)
            parts.append(
                np.array([[self.place.position + start - self._held_tokens, stop - start]])
            )
        following = self._held_part(stop, stop + 1)
        after = (
            int(following[0, 0])
            if len(following)
            else self.place.position + stop - self._held_tokens
        )
        return Sample(self.stream, np.concatenate(parts), after)

    def _held_part(self, start: int, stop: int) -> np.ndarray:
        """The intervals of held tokens [start, stop), as far as there are any."""
        begins = self._held_ends - self.place.held[:, 1]
        low = np.searchsorted(self._held_ends, start, side="right")
        high = np.searchsorted(begins, stop, side="left")
        cut_start = np.maximum(begins[low:high], start)
        cut_stop = np.minimum(self._held_ends[low:high], stop)
        return np.stack(
            [self.place.held[low:high, 0] + cut_start - begins[low:high], cut_stop - cut_start],
            axis=1,
        )

    def tokens(self, samples: int) -> int:
        """Tokens that the first `samples` hold."""
        return samples * self.seq_length

    def after(self, samples: int) -> Place:
        """What is unread after the first `samples`."""
        read = samples * self.seq_length
        return Place(
            self.place.position + max(0, read - self._held_tokens),
            self._held_part(read, max(read, self._held_tokens)),
        )

    def samples_before(self, position: int) -> int:
        """Samples that hold nothing from stream position `position` on."""
        return (self._held_tokens + position - self.place.position) // self.seq_length

    def mark(self, samples: int) -> tuple[int, int] | None:
        return None


class _Window(NamedTuple):
    """A packed window. Sample b holds intervals[order[begins[b]:begins[b + 1]]]."""

    intervals: np.ndarray
    order: np.ndarray
    begins: np.ndarray
    end: int
    """Stream position after the window."""

    @property
    def samples(self) -> int:
        return len(self.begins) - 1

    def of_samples(self, first: int, last: int) -> np.ndarray:
        """Intervals of samples [first, last), in the order of the stream."""
        return self.intervals[np.sort(self.order[self.begins[first] : self.begins[last]])]


class BestFit:
    """Samples are bins of whole documents, in a seeded order within each window.

    Windows are counted from the place on. How many samples lie before a window is known once all
    before it are packed; `mark` = (window, samples before it), from an earlier run, saves that.
    """

    def __init__(
        self,
        stream: DocumentStream,
        place: Place,
        seq_length: int,
        mark: tuple[int, int] | None = None,
    ):
        self.stream = stream
        self.place = place
        self.seq_length = seq_length
        self._first, (before) = mark if mark else (0, 0)
        self._before = [before]  # samples before window self._first + i
        epoch = stream.tokens_per_epoch
        self._epoch_end = place.epoch_end(stream)
        rest = self._epoch_end - place.position
        self._windows_in_rest = max(1, round(rest / (WINDOW_BINS * seq_length)))
        self._windows_in_epoch = max(1, round(epoch / (WINDOW_BINS * seq_length)))
        self._kept: dict[int, _Window] = {}

    def sample(self, number: int) -> Sample:
        window, place = self._find(number)
        packed = self._window(window)
        return Sample(self.stream, packed.of_samples(place, place + 1))

    def tokens(self, samples: int) -> int:
        """Tokens that the first `samples` hold."""
        if samples == 0:
            return 0
        window, place = self._find(samples - 1)
        packed = self._window(window)
        unread = int(packed.of_samples(place + 1, packed.samples)[:, 1].sum())
        return packed.end - self.place.tokens_read - unread

    def after(self, samples: int) -> Place:
        """What is unread after the first `samples`: of the window under way, and all that
        follows."""
        if samples == 0:
            return self.place
        window, place = self._find(samples - 1)
        packed = self._window(window)
        return Place(packed.end, _joined(packed.of_samples(place + 1, packed.samples)))

    def samples_before(self, position: int) -> int:
        """Samples of the windows before stream position `position`, an epoch's end. Packs them
        all."""
        windows = self._windows_in_rest
        if position > self._epoch_end:
            windows += (
                (position - self._epoch_end)
                // self.stream.tokens_per_epoch
                * self._windows_in_epoch
            )
        while self._first + len(self._before) - 1 < windows:
            self._count(windows - self._first - len(self._before) + 1)
        return self._before[windows - self._first]

    def fill(self) -> float:
        """Share of a sample that its documents take, on average over the first window that has
        any."""
        window = next(self._window(number) for number in range(3) if self._window(number).samples)
        return int(window.intervals[:, 1].sum()) / (window.samples * self.seq_length)

    def mark(self, samples: int) -> tuple[int, int] | None:
        """Window of the last of the first `samples`, and the samples before it."""
        if samples == 0:
            return None
        window = self._find(samples - 1)[0]
        return window, self._before[window - self._first]

    def _find(self, number: int) -> tuple[int, int]:
        """Window of a sample, and its place there."""
        assert number >= self._before[0], "a mark beyond the sample"
        while number >= self._before[-1]:
            missing = (number + 1 - self._before[-1]) // WINDOW_BINS
            self._count(max(1, missing - 1))
        index = bisect_right(self._before, number) - 1
        return self._first + index, number - self._before[index]

    def _count(self, windows: int) -> None:
        """Count the samples of the next windows; packing them takes all cores where there are
        several."""
        first = self._first + len(self._before) - 1
        if windows == 1:
            counts = [self._window(first).samples]
        else:
            with ThreadPoolExecutor(usable_cores()) as pool:
                counts = list(
                    pool.map(
                        lambda window: self._pack(window).samples,
                        range(first, first + min(windows, 4 * usable_cores())),
                    )
                )
        for count in counts:
            self._before.append(self._before[-1] + count)

    def _window(self, number: int) -> _Window:
        packed = self._kept.get(number)
        if packed is None:
            packed = self._pack(number)
            while len(self._kept) >= KEPT_WINDOWS:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[number] = packed
        return packed

    def _edges(self, number: int) -> tuple[int, int]:
        """Stream positions of a window: documents that begin in them are its."""
        if number < self._windows_in_rest:
            start = self.place.position
            size = self._epoch_end - self.place.position
            place = number
            parts = self._windows_in_rest
        else:
            epoch, place = divmod(number - self._windows_in_rest, self._windows_in_epoch)
            size = self.stream.tokens_per_epoch
            parts = self._windows_in_epoch
            start = self._epoch_end + epoch * size
        return start + size * place // parts, start + size * (place + 1) // parts

    def _pack(self, number: int) -> _Window:
        low, high = self._edges(number)
        start = low if number == 0 else self.stream.document_start(low)
        end = self.stream.document_start(high)
        unread = (
            np.array([[start, end - start]]) if end > start else np.empty((0, 2), dtype=np.int64)
        )
        if number == 0:
            unread = np.concatenate([self.place.held, unread])
        intervals = _cut(unread, self.stream.locate(unread), self.seq_length)
        bins = pack(intervals[:, 1], self.seq_length)
        count = int(bins.max()) + 1 if len(bins) else 0
        if count:
            order = Permutation.make(count, self.stream.seed, ORDER_PURPOSE, low, self.seq_length)
            bins = order.values(0, count)[bins]
        begins = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(np.bincount(bins, minlength=count), out=begins[1:])
        return _Window(intervals, _by_bin(bins, begins), begins, end)


PACKINGS: dict[str, type[Concat] | type[BestFit]] = {"concat": Concat, "best_fit": BestFit}


def _cut(unread, spans, seq_length: int) -> np.ndarray:
    """Documents as stream intervals int64 [pieces, 2], those longer than a sample cut into full
    ones and a rest."""
    begins = np.cumsum(spans.lengths) - spans.lengths
    first = np.searchsorted(
        spans.intervals, np.arange(len(unread))
    )  # the first span of each interval
    starts = (
        begins - begins[first][spans.intervals] + unread[:, 0][spans.intervals]
        if len(unread)
        else begins
    )
    pieces = -(-spans.lengths // seq_length)
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut_starts = np.repeat(starts, pieces) + number * seq_length
    lengths = np.minimum(seq_length, np.repeat(starts + spans.lengths, pieces) - cut_starts)
    return np.stack([cut_starts, lengths], axis=1)


def _joined(intervals: np.ndarray) -> np.ndarray:
    """The same tokens with neighbours in the stream put together; `intervals` in the order of the
    stream."""
    if len(intervals) == 0:
        return intervals
    apart = np.flatnonzero(intervals[1:, 0] != intervals[:-1].sum(axis=1)) + 1
    firsts = np.concatenate([[0], apart])
    return np.stack([intervals[firsts, 0], np.add.reduceat(intervals[:, 1], firsts)], axis=1)


def pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best fit decreasing: each item, longest first, into the fullest bin that still has room for
    it.

    Args:
        lengths: int64 [items], each in [1, capacity].
    Returns:
        The bin of each item, int32 [items]; bins are numbered from 0 in the order they are opened.
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity), capacity
    return _pack(lengths, capacity)


@numba.njit(nogil=True, cache=True)
def _longest_first(lengths, capacity):
    """Item numbers by falling length, equal ones in order (counting sort)."""
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


@numba.njit(nogil=True, cache=True)
def _by_bin(bins, begins):
    """Item numbers, bin after bin, each bin's in order."""
    places = begins.copy()
    order = np.empty(len(bins), dtype=np.int32)
    for i in range(len(bins)):
        order[places[bins[i]]] = i
        places[bins[i]] += 1
    return order


@numba.njit(inline="always")
def _lowest_bit(word):
    """Number of the lowest bit that is set in a uint64 other than 0 (de Bruijn multiplication)."""
    return DEBRUIJN[
        ((word & (~word + np.uint64(1))) * np.uint64(0x03F79D71B4CB0A89)) >> np.uint64(58)
    ]


DEBRUIJN = np.array(
    [
        0,
        1,
        48,
        2,
        57,
        49,
        28,
        3,
        61,
        58,
        50,
        42,
        38,
        29,
        17,
        4,
        62,
        55,
        59,
        36,
        53,
        51,
        43,
        22,
        45,
        39,
        33,
        30,
        24,
        18,
        12,
        5,
        63,
        47,
        56,
        27,
        60,
        41,
        37,
        16,
        54,
        35,
        52,
        21,
        44,
        32,
        23,
        11,
        46,
        26,
        40,
        15,
        34,
        20,
        31,
        10,
        25,
        14,
        19,
        9,
        13,
        8,
        7,
        6,
    ],
    dtype=np.int64,
)


@numba.njit(nogil=True, cache=True)
def _next_set(words, levels, value):
    """The smallest number >= value in a set kept as bits, 64 to a word of the level above; -1 if
    there is none."""
    level = 0
    while level < len(levels) - 1:
        word = value >> 6
        bit = value & 63
        if word >= levels[level + 1] - levels[level]:
            return -1
        found = words[levels[level] + word] & (~np.uint64(0) << np.uint64(bit))
        if found:
            value = (word << 6) + _lowest_bit(found)
            while level > 0:
                level -= 1
                value = (value << 6) + _lowest_bit(words[levels[level] + value])
            return value
        value = word + 1
        level += 1
    return -1


@numba.njit(nogil=True, cache=True)
def _pack(lengths, capacity):
    """Bins with the same room form a list; a set of bits tells which rooms have one."""
    order = _longest_first(lengths, capacity)
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
    for item in order:
        length = lengths[item]
        room = _next_set(words, starts, length)
        if room < 0:
            target = count
            room = capacity
            count += 1
        else:
            target = heads[room]
            heads[room] = following[target]
            if heads[room] < 0:
                _clear(words, starts, room)
        bins[item] = target
        room -= length
        if room > 0:
            if heads[room] < 0:
                value = room
                for level in range(len(starts) - 1):
                    words[starts[level] + (value >> 6)] |= np.uint64(1) << np.uint64(value & 63)
                    value >>= 6
            following[target] = heads[room]
            heads[room] = target
    return bins


@numba.njit(nogil=True, cache=True)
def _clear(words, starts, value):
    """Take a number out of the set."""
    for level in range(len(starts) - 1):
        place = starts[level] + (value >> 6)
        words[place] &= ~(np.uint64(1) << np.uint64(value & 63))
        if words[place]:
            return
        value >>= 6
