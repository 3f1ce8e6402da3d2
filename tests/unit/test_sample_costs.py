"""The costs of samples, by lookups of lengths alone, against the documents of the batches read."""

import numpy as np
import pytest

from data.batch import read_batch
from data.dealing import Dealing
from data.digest import DIGEST_BITS
from data.document_cost import DocumentCost
from data.excerpts import Excerpt, lay_out
from data.first_pass import FirstPass
from data.loader import Loader
from data.mixture import Mixture, fresh_mixture
from data.sample_costs import sample_costs
from data.stream import DocumentStream
from pretrain.evaluation.probe import probe_costs
from tests.documents import Documents

COST = DocumentCost(1000.0, 50.0, 3.0, ((None, 2), (40, 1)))
SEQ_LENGTH = 2048


def make_stream(seed: int, documents: int = 400) -> DocumentStream:
    lengths = np.random.default_rng(seed).lognormal(4.5, 1.5, documents).astype(int)
    return DocumentStream(Documents(lengths.tolist(), lambda _, n: np.arange(n) % 50), None, seed)


def mixtures() -> dict[str, Mixture | FirstPass]:
    streams = [make_stream(seed) for seed in (1, 2)]
    blend = [(0.7, streams[0]), (0.3, streams[1])]
    return {
        "concat": fresh_mixture(blend[:1], SEQ_LENGTH),
        "two sources": fresh_mixture(blend, SEQ_LENGTH),
        "best_fit": fresh_mixture(blend, SEQ_LENGTH, "best_fit"),
        "first pass": FirstPass(blend, SEQ_LENGTH),
    }


@pytest.mark.parametrize("masking", [True, False])
@pytest.mark.parametrize("name", mixtures())
def test_costs_are_those_of_the_batches_that_are_read(name, masking):
    mixture = mixtures()[name]
    # Beyond the first epoch, or beyond the end of the first pass.
    for first, count in ((0, 16), (5, 1), (20, 60)):
        found = sample_costs(mixture, first, count, COST, document_masking=masking)
        samples = mixture.samples(range(first, first + count))
        expected = [
            COST.of_documents(np.diff(batch.cu_seqlens.numpy())).sum()
            for sample in samples
            for batch in [read_batch([sample], SEQ_LENGTH, document_masking=masking)]
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_costs_of_probes_are_those_of_the_batches_laid_out():
    def excerpt(length: int) -> Excerpt:
        return Excerpt(lambda _, count: np.zeros(count), 0, length, np.empty((0, 2), np.int64))

    # The third one makes up the number of microbatches.
    probes = [[excerpt(2000)], [excerpt(300), excerpt(40)], [], [excerpt(2048)]]
    expected = [
        COST.of_documents(np.diff(batch.cu_seqlens.numpy())).sum()
        for probe in probes
        for batch in [lay_out(probe, 2048, [(0, 2048)], padding=0, vocab_size=1)]
    ]
    np.testing.assert_allclose(probe_costs(probes, 2048, COST), expected, rtol=1e-13)


def test_lengths_found_are_those_of_the_spans():
    stream = make_stream(3)
    chance = np.random.default_rng(0)
    for _ in range(50):
        starts = chance.integers(0, 2 * stream.tokens_per_epoch, 5)
        intervals = np.stack([starts, chance.integers(0, 5000, 5)], axis=1)
        found = stream.find_lengths(intervals)
        spans = stream.locate(intervals)
        assert found.lengths.tolist() == spans.lengths.tolist()
        counts = np.bincount(spans.intervals, minlength=5)
        assert np.diff(found.begins).tolist() == counts.tolist()


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_dealt_ranks_read_each_sample_once_and_the_same_ones_after_a_restart(micro_batch_size):
    mixture = mixtures()["two sources"]
    whole = Loader(
        mixture,
        micro_batch_size=16,
        global_batch_tokens=16 * SEQ_LENGTH,
        dp_rank=0,
        dp_size=1,
        prefetch=False,
    )
    clock = 16 * SEQ_LENGTH
    (expected,) = whole.read(clock)
    samples = []
    digests = 0
    for rank in range(4):
        # Another start, with nothing read before: what a restart does.
        loader = Loader(
            mixtures()["two sources"],
            micro_batch_size=micro_batch_size,
            global_batch_tokens=16 * SEQ_LENGTH,
            dp_rank=rank,
            dp_size=4,
            dealing=Dealing(COST, "step"),
        )
        if rank % 2:
            loader.read(0)
        batches = loader.read(clock)
        digests += sum(batch.digest for batch in batches)
        assert loader.dealt.imbalance is not None and loader.dealt.imbalance_in_order is not None
        assert 1.0 <= loader.dealt.imbalance < loader.dealt.imbalance_in_order
        for batch, own in zip(batches, loader.own_samples().tolist(), strict=True):
            for i, number in enumerate(own):
                samples.append(number)
                tokens = batch.tokens[i * SEQ_LENGTH : (i + 1) * SEQ_LENGTH]
                at = number * SEQ_LENGTH
                assert tokens.tolist() == expected.tokens[at : at + SEQ_LENGTH].tolist()
    assert sorted(samples) == list(range(16))
    assert digests % 2**DIGEST_BITS == expected.digest


def test_one_data_rank_of_a_pipeline_waits_for_no_other():
    loader = Loader(
        mixtures()["two sources"],
        micro_batch_size=1,
        global_batch_tokens=8 * SEQ_LENGTH,
        dp_rank=0,
        dp_size=1,
        prefetch=False,
        dealing=Dealing(COST, "step"),
    )
    loader.read(0)
    slots = loader.dealt.slots.tolist()
    assert slots != sorted(slots) == list(range(8)), "cheap microbatches come first and last"
    assert (loader.dealt.imbalance, loader.dealt.imbalance_in_order) == (None, None)
