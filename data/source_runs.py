"""Which source the tokens of a slice come from: a sample has one, so that a few runs say it all."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NO_SOURCE = -1
"""Stands for a source that nobody asks for: there is only one, or it is a validation set's."""


class SourceRun(NamedTuple):
    """Tokens [begin, end) of a rank's slice, which one source gave."""

    begin: int
    end: int
    source: int
    """Number of the source in its blend."""
    num_targets: int


def source_runs(
    sources: Sequence[int],
    seq_length: int,
    pieces: Sequence[tuple[int, int]],
    has_target: np.ndarray,
) -> tuple[SourceRun, ...]:
    """List the runs of a microbatch's slice; none where a sample's source is not known.

    Args:
        sources: number of each sample's source.
        pieces: half-open ranges of the microbatch's tokens that the slice holds, in its order.
        has_target: bool [t], of each token of the slice.
    """
    if NO_SOURCE in sources:
        return ()
    runs: list[SourceRun] = []
    begin = 0
    for low, high in pieces:
        # A piece may begin in one sample and end in another.
        for sample in range(low // seq_length, -(-high // seq_length)):
            first = max(low, sample * seq_length)
            last = min(high, (sample + 1) * seq_length)
            end = begin + last - first
            targets = int(np.count_nonzero(has_target[begin:end]))
            # Neighbours of one source are one run.
            if runs and runs[-1].source == sources[sample]:
                before = runs.pop()
                runs.append(before._replace(end=end, num_targets=before.num_targets + targets))
            else:
                runs.append(SourceRun(begin, end, sources[sample], targets))
            begin = end
    return tuple(runs)
