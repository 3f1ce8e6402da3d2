"""A place in a source's stream, and what a packing does: turn what is unread there into samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from data.batch import Sample
from data.stream import DocumentLengths, DocumentStream


@dataclass(frozen=True)
class Place:
    """What of a stream is unread: first the intervals passed over, then all from `position` on."""

    position: int = 0
    held: np.ndarray = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    """int64 [intervals, 2]: stream position, tokens; in the stream's order, below `position`."""

    @property
    def tokens_read(self) -> int:
        """Tokens of the stream that were read before, over all epochs."""
        return self.position - int(self.held[:, 1].sum())

    def documents_read(self, stream: DocumentStream) -> int:
        """Count the documents whose first token was read before, over all epochs."""
        held_starts = int((stream.locate(self.held).offsets == 0).sum())
        return stream.documents_before(self.position) - held_starts

    def epoch_end(self, stream: DocumentStream) -> int:
        """Find the stream position at which the epoch under way ends.

        At the end of an epoch it is that position; at 0 the end of the first epoch.
        """
        epochs = -(-self.position // stream.tokens_per_epoch)
        return max(1, epochs) * stream.tokens_per_epoch


class Mark(NamedTuple):
    """Where counting the samples of a packing may begin again: a window, and what lies before."""

    window: int
    samples_before: int


class Packer(Protocol):
    """Turns what is unread of a stream at a place into samples of one length."""

    stream: DocumentStream
    place: Place
    seq_length: int

    def sample(self, number: int) -> Sample:
        """Find sample `number`, counted from the place."""
        ...

    def document_lengths(self, numbers: Sequence[int]) -> DocumentLengths:
        """List how many tokens of each document these samples hold."""
        ...

    def tokens(self, samples: int) -> int:
        """Count the tokens that the first `samples` hold, without padding."""
        ...

    def after(self, samples: int) -> Place:
        """Find what is unread after the first `samples`."""
        ...

    def samples_before(self, position: int) -> int:
        """Count the samples that hold only what is before `position`, the end of an epoch."""
        ...

    def fill(self) -> float:
        """Estimate the share of a sample that its documents take; padding is the rest."""
        ...

    def take_numbers(self, numbers_of: Callable[[np.ndarray], np.ndarray]) -> None:
        """Take note of which sample of all sources each of its own is; the same until then."""
        ...

    def mark(self, samples: int) -> Mark | None:
        """Find the mark from which a packer that goes on after the first `samples` may count."""
        ...


def find_document_lengths(samples: Sequence[Sample]) -> DocumentLengths:
    """Find how many tokens of each document some samples of one stream hold."""
    intervals = np.concatenate([sample.intervals for sample in samples])
    counts = [len(sample.intervals) for sample in samples]
    found = samples[0].stream.find_lengths(intervals)
    # From where each interval begins to where each sample does.
    firsts = np.concatenate([[0], np.cumsum(counts)])
    return DocumentLengths(found.lengths, found.begins[firsts])
