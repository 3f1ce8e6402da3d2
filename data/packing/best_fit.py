"""`best_fit`: samples are bins of whole documents; only one longer than a sample is cut.

Best-fit decreasing (bins.py) over windows of the stream of about WINDOW_BINS samples, each within
one epoch. A window holds the documents that begin in it; one longer than a sample is cut into full
samples and a rest that is packed like a document. Source of the idea: "Fewer Truncations Improve
Language Modeling" (arXiv 2404.10830). Samples may be asked to cost nearly the same, too
(even_bins.py), and those of like cost to come in the same steps (sample_order.py).
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from typing import NamedTuple

import numpy as np

from data.batch import Sample
from data.document_cost import DocumentCost
from data.packing.bins import NO_LIMIT, numbers_by_bin, pack
from data.packing.even_bins import pack_evenly, pack_with_limit
from data.packing.place import Mark, Place
from data.packing.sample_order import places_by_step, random_places
from data.stream import DocumentLengths, DocumentStream, Spans, usable_cores

WINDOW_BINS = 1024
"""Samples of a window: the half-empty one at its end is less than a thousandth of it."""
WINDOW_STEPS = 32
"""Steps of a window where samples of like cost come in the same steps: the more there are, the more
alike they cost."""
WINDOW_TOKENS = 1 << 31
"""Tokens up to which such a window grows beyond WINDOW_BINS samples: about 2 million documents."""
KEPT_WINDOWS = 2
"""Packed windows in memory, this and the next; some 25 MB per million documents each."""


def samples_of_window(seq_length: int, samples_per_step: int | None, share: float = 1.0) -> int:
    """Compute about how many samples a window has.

    Args:
        samples_per_step: as in BestFit.
        share: of the blend that the source is, so that the windows of many sources together take
            no more memory than one source's.
    """
    if samples_per_step is None:
        return WINDOW_BINS
    of_all = min(WINDOW_STEPS * samples_per_step, WINDOW_TOKENS // seq_length)
    return max(WINDOW_BINS, ceil(of_all * share))


class _Packed(NamedTuple):
    """The documents of a window, and the samples that they were put into, in no order yet."""

    intervals: np.ndarray
    """int64 [pieces, 2]: stream position and tokens of each document, or piece of a long one."""
    bins: np.ndarray
    """int32 [pieces]: the sample of each."""
    samples: int
    low: int
    """Stream position of the window."""
    end: int
    """Stream position after it."""


class _Window(NamedTuple):
    """A packed window. Sample b holds intervals[order[begins[b]:begins[b + 1]]]."""

    intervals: np.ndarray
    """int64 [pieces, 2]: stream position and tokens of each document, or piece of a long one."""
    order: np.ndarray
    """int32 [pieces]: numbers of the intervals, sample after sample."""
    begins: np.ndarray
    """int64 [samples + 1]: where each sample begins in `order`."""
    end: int
    """Stream position after the window."""

    @property
    def samples(self) -> int:
        """Number of samples that the window became."""
        return len(self.begins) - 1

    def intervals_of(self, first: int, last: int) -> np.ndarray:
        """List the intervals of samples [first, last), in the order of the stream."""
        return self.intervals[np.sort(self.order[self.begins[first] : self.begins[last]])]


class BestFit:
    """Samples of a stream: bins of whole documents, in a seeded order within each window.

    Windows are counted from the place on. How many samples lie before a window is known once all
    before it are packed; a mark from an earlier run saves that.
    """

    def __init__(
        self,
        stream: DocumentStream,
        place: Place,
        seq_length: int,
        mark: Mark | None = None,
        *,
        max_documents: int | None = None,
        cost: DocumentCost | None = None,
        samples_per_step: int | None = None,
        share: float = 1.0,
    ):
        """
        Args:
            mark: from `mark` of an earlier packer of the same settings at the same place.
            max_documents: documents of a sample at most; None = any number.
            cost: what samples shall cost nearly the same of; None = they are only full.
            samples_per_step: of all sources together, with a cost: samples of like cost come in the
                same steps; None = in a random order.
            share: of the blend's tokens that come from this source.
        """
        self.stream = stream
        self.place = place
        self.seq_length = seq_length
        self.max_documents = max_documents
        self.cost = cost
        self._window_samples = samples_of_window(seq_length, samples_per_step, share)
        self._samples_per_step = samples_per_step
        # One source alone gives every sample.
        self._numbers_of: Callable[[np.ndarray], np.ndarray] = lambda own: own
        begin = mark or Mark(0, 0)
        self._first = begin.window
        self._before = [begin.samples_before]  # samples before window self._first + i
        self._epoch_end = place.epoch_end(stream)
        self._windows_in_rest = self._window_count(self._epoch_end - place.position)
        self._windows_in_epoch = self._window_count(stream.tokens_per_epoch)
        self._kept: dict[int, _Window] = {}

    def take_numbers(self, numbers_of: Callable[[np.ndarray], np.ndarray]) -> None:
        """Take note of which sample of all sources each of its own is."""
        if self._samples_per_step is not None:
            # Samples come in other steps now.
            self._kept.clear()
        self._numbers_of = numbers_of

    # ---------------------------------------------------------------- what a packer does

    def sample(self, number: int) -> Sample:
        window, place = self._find(number)
        packed = self._window(window)
        return Sample(self.stream, packed.intervals_of(place, place + 1))

    def document_lengths(self, numbers: Sequence[int]) -> DocumentLengths:
        # The packing knows them: each interval is a document, or a piece of one.
        parts = []
        for number in numbers:
            window, place = self._find(number)
            packed = self._window(window)
            own = packed.order[packed.begins[place] : packed.begins[place + 1]]
            parts.append(packed.intervals[own, 1])
        begins = np.cumsum([0, *(len(part) for part in parts)])
        return DocumentLengths(np.concatenate(parts), begins)

    def tokens(self, samples: int) -> int:
        if samples == 0:
            return 0
        window, place = self._find(samples - 1)
        packed = self._window(window)
        unread = int(packed.intervals_of(place + 1, packed.samples)[:, 1].sum())
        return packed.end - self.place.tokens_read - unread

    def after(self, samples: int) -> Place:
        if samples == 0:
            return self.place
        # The later samples of the window under way are passed over, and all that follows is left.
        window, place = self._find(samples - 1)
        packed = self._window(window)
        return Place(packed.end, _join(packed.intervals_of(place + 1, packed.samples)))

    def samples_before(self, position: int) -> int:
        # Packs all windows up to there.
        windows = self._windows_in_rest
        if position > self._epoch_end:
            epochs = (position - self._epoch_end) // self.stream.tokens_per_epoch
            windows += epochs * self._windows_in_epoch
        while self._first + len(self._before) - 1 < windows:
            self._count(windows - self._first - len(self._before) + 1)
        return self._before[windows - self._first]

    def fill(self) -> float:
        # The average over the window of the first sample: those before it are empty.
        assert self._first == 0, "a checkpoint stores the fill with the mark"
        number, _ = self._find(0)
        window = self._window(number)
        return int(window.intervals[:, 1].sum()) / (window.samples * self.seq_length)

    def mark(self, samples: int) -> Mark | None:
        if samples == 0:
            return None
        window, _ = self._find(samples - 1)
        return Mark(window, self._before[window - self._first])

    # ---------------------------------------------------------------- windows

    def _window_count(self, tokens: int) -> int:
        """Compute into how many windows a range of the stream is cut."""
        return max(1, round(tokens / (self._window_samples * self.seq_length)))

    def _find(self, number: int) -> tuple[int, int]:
        """Find the window of a sample, and its number in it."""
        assert number >= self._before[0], "a mark beyond the sample"
        while number >= self._before[-1]:
            missing = (number + 1 - self._before[-1]) // self._window_samples
            self._count(max(1, missing - 1))
        index = bisect_right(self._before, number) - 1
        return self._first + index, number - self._before[index]

    def _count(self, windows: int) -> None:
        """Count the samples of the next windows; packing several takes all cores."""
        first = self._first + len(self._before) - 1
        if windows == 1:
            counts = [self._window(first).samples]
        else:
            # A few per core at a time: their packings are dropped, only the counts stay.
            numbers = range(first, first + min(windows, 4 * usable_cores()))
            with ThreadPoolExecutor(usable_cores()) as pool:
                counts = list(pool.map(lambda number: self._pack(number).samples, numbers))
        for count in counts:
            self._before.append(self._before[-1] + count)

    def _window(self, number: int) -> _Window:
        """Give a packed window, from memory or packed now."""
        packed = self._kept.get(number)
        if packed is None:
            packed = self._in_order(self._pack(number), number)
            while len(self._kept) >= KEPT_WINDOWS:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[number] = packed
        return packed

    def _edges(self, number: int) -> tuple[int, int]:
        """Compute a window's stream positions; the documents that begin in them are its."""
        if number < self._windows_in_rest:
            # In the rest of the epoch under way.
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

    def _pack(self, number: int) -> _Packed:
        """Pack the documents of a window into samples."""
        low, high = self._edges(number)
        # What is unread: from the first document that begins in the window to the first one after
        # it, and for the first window also what was passed over before the place.
        start = low if number == 0 else self.stream.document_start(low)
        end = self.stream.document_start(high)
        unread = np.array([[start, end - start]] if end > start else [], dtype=np.int64)
        unread = unread.reshape(-1, 2)
        if number == 0:
            unread = np.concatenate([self.place.held, unread])
        intervals = _cut(unread, self.stream.locate(unread), self.seq_length)
        bins = self._pack_lengths(intervals[:, 1])
        samples = int(bins.max()) + 1 if len(bins) else 0
        return _Packed(intervals, bins, samples, low, end)

    def _in_order(self, packed: _Packed, number: int) -> _Window:
        """Put a window's samples into the order in which they are drawn."""
        bins = packed.bins
        if packed.samples:
            # The bins come longest documents first: a seeded order mixes them.
            bins = self._places(packed, self._before[number - self._first])[bins]
        begins = np.zeros(packed.samples + 1, dtype=np.int64)
        np.cumsum(np.bincount(bins, minlength=packed.samples), out=begins[1:])
        return _Window(packed.intervals, numbers_by_bin(bins, begins), begins, packed.end)

    def _places(self, packed: _Packed, first: int) -> np.ndarray:
        """Give each of a window's samples its place in the order -> int64 [samples].

        Args:
            first: samples before the window.
        """
        seed = self.stream.seed
        places = random_places(packed.samples, seed, packed.low, self.seq_length)
        if self._samples_per_step is None:
            return places
        assert self.cost is not None, "steps are formed by cost"
        costs = np.bincount(packed.bins, weights=self.cost.of_documents(packed.intervals[:, 1]))
        numbers = self._numbers_of(np.arange(first - 1, first + packed.samples + 1))
        return places_by_step(costs, numbers // self._samples_per_step, places, seed)

    def _pack_lengths(self, lengths: np.ndarray) -> np.ndarray:
        """Put documents of these lengths into samples -> the sample of each, int32 [documents]."""
        most = NO_LIMIT if self.max_documents is None else self.max_documents
        if self.cost is not None:
            return pack_evenly(lengths, self.cost.of_documents(lengths), self.seq_length, most)
        if self.max_documents is not None:
            return pack_with_limit(lengths, self.seq_length, most)
        return pack(lengths, self.seq_length)


def _cut(unread: np.ndarray, spans: Spans, seq_length: int) -> np.ndarray:
    """Cut documents longer than a sample into full ones and a rest -> int64 [pieces, 2], position
    and tokens.

    Args:
        unread: int64 [intervals, 2]; spans: the documents in them.
    """
    if len(spans.lengths) == 0:
        return np.empty((0, 2), dtype=np.int64)
    # Where each span begins in the stream: where its interval does, and behind the spans before it.
    begins = np.cumsum(spans.lengths) - spans.lengths
    first_spans = np.searchsorted(spans.intervals, np.arange(len(unread)))
    within = begins - begins[first_spans][spans.intervals]
    starts = unread[:, 0][spans.intervals] + within
    # Piece k of a span begins k samples after it.
    pieces = -(-spans.lengths // seq_length)
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut_starts = np.repeat(starts, pieces) + number * seq_length
    lengths = np.minimum(seq_length, np.repeat(starts + spans.lengths, pieces) - cut_starts)
    return np.stack([cut_starts, lengths], axis=1)


def _join(intervals: np.ndarray) -> np.ndarray:
    """Put intervals that are neighbours in the stream together; they come in its order."""
    if len(intervals) == 0:
        return intervals
    apart = np.flatnonzero(intervals[1:, 0] != intervals[:-1].sum(axis=1)) + 1
    firsts = np.concatenate([[0], apart])
    return np.stack([intervals[firsts, 0], np.add.reduceat(intervals[:, 1], firsts)], axis=1)
