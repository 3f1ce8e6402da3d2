"""The samples of a validation set, in which each of its tokens comes exactly once."""

from collections.abc import Sequence

import numpy as np

from data.batch import Sample
from data.blend import BlendOrder
from data.packing.concat import Concat
from data.packing.place import Place, find_document_lengths
from data.segments import DataSettings
from data.stream import DocumentLengths, DocumentStream


class FirstPass:
    """Mixes streams by their weights, up to the end of each stream's first epoch.

    A stream's last sample is padded, where another epoch would follow in training, and behind the
    last sample of all come empty ones. So also a set that is smaller than a batch, or than one
    sample, counts each of its documents once.
    """

    def __init__(self, blend: Sequence[tuple[float, DocumentStream]], seq_length: int):
        weights = [weight for weight, _ in blend]
        self.settings = DataSettings(
            seq_length, tuple((weight, str(i)) for i, weight in enumerate(weights))
        )
        self.streams = [stream for _, stream in blend]
        self._packers = [Concat(stream, Place(), seq_length) for stream in self.streams]
        limits = [-(-stream.tokens_per_epoch // seq_length) for stream in self.streams]
        self._order = BlendOrder(weights, limits)
        self.num_samples = sum(limits)

    def samples(self, numbers: Sequence[int]) -> list[Sample]:
        """List the samples of these numbers; those behind the last one are empty."""
        first = min(numbers)
        last = min(max(numbers) + 1, self.num_samples)
        count = max(0, last - first)
        empty = Sample(self.streams[0], np.empty((0, 2), dtype=np.int64))
        if not count:
            return [empty] * len(numbers)
        sources, places = self._order.draw(first, count)
        return [
            self._sample(int(sources[number - first]), int(places[number - first]))
            if number < last
            else empty
            for number in numbers
        ]

    def document_lengths(self, first: int, count: int) -> list[tuple[np.ndarray, DocumentLengths]]:
        """List how many tokens of each document samples [first, first + count) hold; see
        `Mixture.document_lengths`. Empty samples are left out."""
        last = min(first + count, self.num_samples)
        if last <= first:
            return []
        sources, places = self._order.draw(first, last - first)
        found = []
        for source in np.unique(sources):
            which = np.flatnonzero(sources == source)
            samples = [self._sample(int(source), int(place)) for place in places[which]]
            found.append((which, find_document_lengths(samples)))
        return found

    def _sample(self, source: int, place: int) -> Sample:
        """Give a source's own sample `place`, without what lies beyond its first epoch."""
        sample = self._packers[source].sample(place)
        end = sample.stream.tokens_per_epoch
        # A sample of `concat` reads on into the next epoch: that part becomes padding.
        intervals = sample.intervals.copy()
        intervals[:, 1] = np.minimum(intervals[:, 1], end - intervals[:, 0])
        following = sample.following if sample.following < end else -1
        return Sample(sample.stream, intervals, following)
