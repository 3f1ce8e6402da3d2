"""The samples of one segment: those of its sources, mixed by the weights of its blend."""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from data.batch import Sample
from data.blend import BlendOrder
from data.config import Exhausted, Packing
from data.packing.packers import make_packer
from data.packing.place import Mark, Packer, Place
from data.segments import DataSettings, Drawn, DrawnBySource
from data.stream import DocumentLengths, DocumentStream


class Mixture:
    """The samples of one segment, by their number in it. Safe to use from several threads."""

    def __init__(
        self,
        settings: DataSettings,
        streams: Mapping[str, DocumentStream],
        places: Mapping[str, Place],
        marks: Mapping[str, Mark | None] | None = None,
        fills: dict[str, float] | None = None,
    ):
        """
        Args:
            streams, places: by name of the source; what is unread of each.
            marks: from `Drawn` of a checkpoint in the same segment; they save packing again.
            fills: tokens of an average sample of each source, as a share of its length; estimated
                if not given.
        """
        self.settings = settings
        self.names = [name for _, name in settings.blend]
        self._lock = threading.RLock()
        self.packers: list[Packer] = [
            make_packer(settings, name, streams[name], places[name], (marks or {}).get(name))
            for name in self.names
        ]
        # How many samples each source has; None = without end.
        self.limits: list[int | None] = [None] * len(self.packers)
        if settings.exhausted != "repeat":
            self.limits = [
                packer.samples_before(packer.place.epoch_end(packer.stream))
                for packer in self.packers
            ]
        # Weights are shares of the tokens, and best_fit's samples are not equally full: a source
        # whose samples are half empty has to give twice as many. One source alone needs no weight.
        if fills is None and len(self.names) > 1:
            fills = {
                name: packer.fill() for name, packer in zip(self.names, self.packers, strict=True)
            }
        self.fills = fills or dict.fromkeys(self.names, 1.0)
        # Under "stop" a source that ends is left out; under "error" `check` refuses instead.
        self.order = BlendOrder(
            _weights_of_samples(settings, self.fills),
            self.limits if settings.exhausted == "stop" else [None] * len(self.limits),
        )
        if len(self.packers) > 1:
            for name, packer in zip(self.names, self.packers, strict=True):
                packer.take_numbers(numbers_of_source(settings, self.fills, name))

    def check(self, samples: int) -> None:
        """Raise ValueError unless the sources have that many samples, as `exhausted` asks."""
        if samples > self.order.samples:
            raise ValueError(
                f"data_exhausted = stop: the sources have {self.order.samples:,} samples of "
                f"{self.settings.seq_length:,} tokens left, {samples:,} are to be drawn. Fix: "
                "fewer tokens, more data, or --data-exhausted repeat."
            )
        if self.settings.exhausted != "error":
            return
        # Under "error" no source may be asked for more than it has.
        counts = self.order.counts(samples).tolist()
        short = [
            f"{name} has {limit:,} samples left, {count:,} are to be drawn"
            for name, limit, count in zip(self.names, self.limits, counts, strict=True)
            if limit is not None and count > limit
        ]
        if short:
            raise ValueError(
                f"data_exhausted = error: {'; '.join(short)} (of "
                f"{self.settings.seq_length:,} tokens each). Fix: fewer tokens, more "
                "data, other weights, or --data-exhausted repeat."
            )

    def samples(self, numbers: Sequence[int]) -> list[Sample]:
        """List the samples of these numbers."""
        with self._lock:
            # The order is drawn once for the whole range, then each sample from its source.
            first = min(numbers)
            sources, places = self.order.draw(first, max(numbers) + 1 - first)
            return [
                self._sample(int(sources[number - first]), int(places[number - first]))
                for number in numbers
            ]

    def document_lengths(self, first: int, count: int) -> list[tuple[np.ndarray, DocumentLengths]]:
        """List how many tokens of each document samples [first, first + count) hold.

        Returns:
            For each source that gives some: which of the samples, int64, counted from 0; theirs.
        """
        with self._lock:
            sources, places = self.order.draw(first, count)
            found = []
            for source in np.unique(sources):
                which = np.flatnonzero(sources == source)
                packer = self.packers[int(source)]
                found.append((which, packer.document_lengths(places[which].tolist())))
            return found

    def _sample(self, source: int, place: int) -> Sample:
        """Give a source's own sample `place`, with the source's number where there are several."""
        sample = self.packers[source].sample(place)
        return sample._replace(source=source) if len(self.packers) > 1 else sample

    def counts(self, samples: int) -> list[tuple[str, Packer, int]]:
        """Tell how many of the first `samples` each source gives: name, packer and number."""
        with self._lock:
            counts = self.order.counts(samples).tolist()
            return list(zip(self.names, self.packers, counts, strict=True))

    def tokens(self, samples: int) -> dict[str, int]:
        """Count the tokens that the first `samples` hold, by source, without padding."""
        with self._lock:
            return {name: packer.tokens(count) for name, packer, count in self.counts(samples)}

    def draw(self, samples: int) -> DrawnBySource:
        """Tell what a segment that closes after `samples` has to remember of each source."""
        with self._lock:
            return {name: _drawn(packer, count) for name, packer, count in self.counts(samples)}


def _drawn(packer: Packer, samples: int) -> Drawn:
    """Tell what the first `samples` of a packer drew of its stream."""
    place = packer.after(samples)
    stream = packer.stream
    return Drawn(
        samples=samples,
        tokens=place.tokens_read - packer.place.tokens_read,
        documents=place.documents_read(stream) - packer.place.documents_read(stream),
        epochs=place.tokens_read / stream.tokens_per_epoch,
        mark=packer.mark(samples),
    )


def _weights_of_samples(settings: DataSettings, fills: Mapping[str, float]) -> list[float]:
    """Weigh the sources of a blend by samples, whose weights are by tokens."""
    return [weight / fills[name] for weight, name in settings.blend]


def numbers_of_source(
    settings: DataSettings, fills: Mapping[str, float], name: str
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that tells which sample of all sources each of a source's own is, while
    none has ended.

    Args:
        fills: as in Mixture.
    """
    weights = _weights_of_samples(settings, fills)
    order = BlendOrder(weights, [None] * len(weights))
    source = [each for _, each in settings.blend].index(name)
    return partial(order.numbers_of, source)


def fresh_mixture(
    blend: Sequence[tuple[float, DocumentStream]],
    seq_length: int,
    packing: Packing = "concat",
    exhausted: Exhausted = "repeat",
) -> Mixture:
    """Mix some streams from their beginnings: for validation sets, tools and tests."""
    streams = {str(number): stream for number, (_, stream) in enumerate(blend)}
    weights = tuple((weight, str(number)) for number, (weight, _) in enumerate(blend))
    return Mixture(
        DataSettings(seq_length, weights, packing, exhausted),
        streams,
        dict.fromkeys(streams, Place()),
    )
