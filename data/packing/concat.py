"""`concat`: the stream is cut into samples of one length, across documents."""

from collections.abc import Callable, Sequence

import numpy as np

from data.batch import Sample
from data.packing.place import Mark, Place, find_document_lengths
from data.stream import DocumentLengths, DocumentStream


class Concat:
    """Samples of a stream: number j holds tokens [j x seq_length, (j + 1) x seq_length) of what is
    unread."""

    def __init__(
        self,
        stream: DocumentStream,
        place: Place,
        seq_length: int,
        mark: Mark | None = None,
    ):
        """Takes a mark, as every packer does, and needs none."""
        self.stream = stream
        self.place = place
        self.seq_length = seq_length
        self._held_ends = np.cumsum(place.held[:, 1])
        self._held_tokens = int(self._held_ends[-1]) if len(place.held) else 0

    def sample(self, number: int) -> Sample:
        start = number * self.seq_length
        stop = (number + 1) * self.seq_length
        # The usual case: the intervals passed over are used up, and the sample is one interval.
        if start >= self._held_tokens:
            position = self._position_of(start)
            interval = np.array([[position, self.seq_length]])
            return Sample(self.stream, interval, position + self.seq_length)
        # Otherwise the sample begins with held intervals, and may go on behind the place.
        parts = [self._held_part(start, stop)]
        if stop > self._held_tokens:
            start = max(start, self._held_tokens)
            parts.append(np.array([[self._position_of(start), stop - start]]))
        # The token that follows the sample may be a held one too.
        next_held = self._held_part(stop, stop + 1)
        following = int(next_held[0, 0]) if len(next_held) else self._position_of(stop)
        return Sample(self.stream, np.concatenate(parts), following)

    def document_lengths(self, numbers: Sequence[int]) -> DocumentLengths:
        return find_document_lengths([self.sample(number) for number in numbers])

    def tokens(self, samples: int) -> int:
        return samples * self.seq_length

    def after(self, samples: int) -> Place:
        read = samples * self.seq_length
        return Place(
            self.place.position + max(0, read - self._held_tokens),
            self._held_part(read, max(read, self._held_tokens)),
        )

    def samples_before(self, position: int) -> int:
        return (self._held_tokens + position - self.place.position) // self.seq_length

    def fill(self) -> float:
        return 1.0

    def take_numbers(self, numbers_of: Callable[[np.ndarray], np.ndarray]) -> None:
        # Samples are cut from the stream as it comes, whatever step they are in.
        pass

    def mark(self, samples: int) -> Mark | None:
        return None

    def _position_of(self, number: int) -> int:
        """Find the stream position of unread token `number`, which lies behind the held ones."""
        return self.place.position + number - self._held_tokens

    def _held_part(self, start: int, stop: int) -> np.ndarray:
        """Cut out the intervals of the held tokens [start, stop), as far as there are any."""
        begins = self._held_ends - self.place.held[:, 1]
        low = np.searchsorted(self._held_ends, start, side="right")
        high = np.searchsorted(begins, stop, side="left")
        cut_start = np.maximum(begins[low:high], start)
        cut_stop = np.minimum(self._held_ends[low:high], stop)
        positions = self.place.held[low:high, 0] + cut_start - begins[low:high]
        return np.stack([positions, cut_stop - cut_start], axis=1)
