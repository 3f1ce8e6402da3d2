"""Documents of the balance benchmark: lengths as text has them, and a stream of them."""

import math

import numpy as np

from data.stream import DocumentStream
from data.synthetic import SyntheticReader
from tools.bench.data_engine.corpus import draw_lengths

MEAN_TOKENS = 1000
"""Mean of the lognormal documents, whose spread is that of data_engine/corpus.py."""
LONG_FROM = 32 * 1024
"""Tokens of a long document at least; the logarithm of their lengths is uniform."""
LONG_UP_TO = 256 * 1024
"""Tokens of a long document at most, where no other limit is given."""
LONG_SHARE = 0.34
"""Share of the tokens that are in long documents, where there are some."""


class GivenLengths(SyntheticReader):
    """Synthetic documents of the lengths that are given."""

    def __init__(self, lengths: np.ndarray, vocab_size: int, seed: int):
        super().__init__(vocab_size, seed, num_documents=1)
        self.document_lengths = lengths
        self.num_documents = len(lengths)
        self.num_tokens = int(lengths.sum())


def make_stream(
    tokens: int,
    long_share: float,
    seed: int,
    *,
    long_up_to: int = LONG_UP_TO,
    vocab_size: int = 1000,
) -> DocumentStream:
    """Make a stream of about that many tokens, a share of them in long documents."""
    lengths = draw_lengths(math.ceil((1 - long_share) * tokens / MEAN_TOKENS), MEAN_TOKENS, seed)
    long = draw_long(round(long_share * tokens), long_up_to, seed)
    reader = GivenLengths(np.concatenate([lengths, long]).astype(np.int64), vocab_size, seed)
    return DocumentStream(reader, None, seed)


def draw_long(tokens: int, up_to: int, seed: int) -> np.ndarray:
    """Draw lengths of long documents that have about that many tokens together.

    Args:
        up_to: tokens of the longest.
    """
    rng = np.random.default_rng(seed + 1)
    # The mean of log-uniform numbers.
    mean = (up_to - LONG_FROM) / math.log(up_to / LONG_FROM)
    # Half as many again as needed on average: the last ones are cut off.
    count = math.ceil(1.5 * tokens / mean) + 16 * (tokens > 0)
    drawn = np.exp(rng.uniform(math.log(LONG_FROM), math.log(up_to), count)).astype(np.int64)
    return drawn[: int(np.searchsorted(np.cumsum(drawn), tokens, side="right"))]
