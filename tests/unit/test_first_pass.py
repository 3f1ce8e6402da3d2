"""A validation set's samples hold each of its tokens once, whatever the length of a sample and the
size of the set."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import IGNORE
from data.first_pass import FirstPass
from data.loader import Loader
from data.stream import DocumentStream
from tests.documents import Documents


def counted(
    blend, seq_length: int, *, batch: int = 4, masking: bool = True, dp: int = 1
) -> Counter:
    """How often each (token, its target) is counted over as many batches as the set has samples
    for."""
    samples = FirstPass(blend, seq_length)
    found: Counter = Counter()
    for rank in range(dp):
        loader = Loader(
            samples,
            micro_batch_size=1,
            global_batch_tokens=batch * seq_length,
            dp_rank=rank,
            dp_size=dp,
            document_masking=masking,
            prefetch=False,
        )
        for first in range(0, samples.num_samples, batch):
            for microbatch in loader.read(first * seq_length):
                tokens = microbatch.tokens.numpy()
                labels = microbatch.labels.numpy()
                kept = labels != IGNORE
                found.update(zip(tokens[kept].tolist(), labels[kept].tolist(), strict=True))
    return found


def pairs_of(*streams: DocumentStream) -> Counter:
    """Each token of each document with the next one: what there is to count, from the documents
    themselves."""
    return Counter(
        (int(a), int(b))
        for stream in streams
        for tokens in stream.reader.tokens
        for a, b in zip(tokens, tokens[1:], strict=False)
    )


def stream_of(lengths, base: int = 0) -> DocumentStream:
    return DocumentStream(
        Documents(lengths, lambda number, n: base + number * 1000 + np.arange(n)), None, 5
    )


def test_a_set_below_one_sample_counts_each_document_once():
    """20 tokens in samples of 64: three documents came four times, the others three."""
    stream = stream_of((3, 5, 2, 4, 6))
    assert counted([(1.0, stream)], 64) == pairs_of(stream)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12),
    seq_length=st.sampled_from((8, 16, 50, 64)),
    batch=st.sampled_from((2, 4)),
    dp=st.sampled_from((1, 2)),
)
def test_each_target_is_counted_once(lengths, seq_length, batch, dp):
    stream = stream_of(lengths)
    assert counted([(1.0, stream)], seq_length, batch=batch, dp=dp) == pairs_of(stream)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.9, 0.1), (0.01, 0.99)])
def test_of_a_blend_no_source_comes_twice(weights):
    streams = [stream_of((40, 3, 90)), stream_of((7, 5), base=500_000)]
    assert counted(list(zip(weights, streams, strict=True)), 16) == pairs_of(*streams)


def test_without_document_masking_no_target_leads_into_a_second_pass():
    stream = stream_of((10, 20, 30))
    found = counted([(1.0, stream)], 16, masking=False)
    order = stream.read(0, 60).tolist()
    assert found == Counter(zip(order, order[1:], strict=False))


def test_the_whole_samples_are_those_of_training():
    from data.mixture import fresh_mixture

    stream = stream_of((40, 3, 90, 33))
    ours = FirstPass([(1.0, stream)], 32).samples(range(5))
    theirs = fresh_mixture([(1.0, stream)], 32).samples(range(5))
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one.intervals, other.intervals)
