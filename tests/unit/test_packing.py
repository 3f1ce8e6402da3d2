"""Packing: nothing lost, nothing twice, documents whole, whatever follows on what."""

import numpy as np
import pytest

from data.packing import best_fit
from data.packing.best_fit import BestFit
from data.packing.bins import pack
from data.packing.concat import Concat
from data.packing.place import Place
from data.stream import DocumentStream
from tests.documents import Documents

LENGTHS = [5, 1, 16, 3, 1, 1, 40, 2, 7, 8, 33, 11, 64, 9, 9, 2, 130, 6]


@pytest.fixture
def stream():
    return DocumentStream(Documents(LENGTHS), None, seed=4)


def positions(intervals):
    return [
        position
        for start, length in intervals.tolist()
        for position in range(start, start + length)
    ]


def unread_after(place, until):
    return positions(place.held) + list(range(place.position, until))


def slow_best_fit_decreasing(lengths, capacity):
    rooms = []
    for i in np.argsort(-lengths, kind="stable").tolist():
        best = min(
            (room, number) for number, room in enumerate([*rooms, capacity]) if room >= lengths[i]
        )[1]
        rooms[best : best + 1] = [
            (rooms[best] if best < len(rooms) else capacity) - int(lengths[i])
        ]
    return sorted(capacity - room for room in rooms)


@pytest.mark.parametrize("capacity", [1, 5, 63, 64, 65, 4096, 4097])
@pytest.mark.parametrize("items", [1, 3, 50, 200])
def test_pack_is_best_fit_decreasing(capacity, items):
    lengths = np.random.default_rng(items).integers(1, capacity + 1, items)
    bins = pack(lengths, capacity)
    fills = np.bincount(bins, weights=lengths)
    assert sorted(fills.tolist()) == slow_best_fit_decreasing(lengths, capacity)


def test_pack_fills_a_real_mix():
    """Log-normal lengths, as on the web."""
    lengths = np.minimum(
        np.maximum(1, np.random.default_rng(0).lognormal(6.2, 1.2, 200_000)).astype(np.int64), 8192
    )
    bins = pack(lengths, 8192)
    assert lengths.sum() / (8192 * (bins.max() + 1)) > 0.999
    assert len(pack(np.empty(0, dtype=np.int64), 8)) == 0


@pytest.mark.parametrize("make", [Concat, BestFit])
@pytest.mark.parametrize(
    "place",
    [
        Place(),
        Place(70),
        Place(350, np.array([[3, 9], [40, 100], [300, 1]])),
        Place(348, np.array([[40, 100]])),
        Place(348),
    ],
)
@pytest.mark.parametrize("seq_length", [4, 16, 100])
def test_samples_and_what_they_leave_are_the_stream(monkeypatch, stream, make, place, seq_length):
    monkeypatch.setattr(best_fit, "WINDOW_BINS", 4)
    packer = make(stream, place, seq_length)
    read = []
    for samples in range(12):
        left = packer.after(samples)
        until = left.position + 5
        assert sorted(read + unread_after(left, until)) == unread_after(place, until)
        assert packer.tokens(samples) == len(read) == left.tokens_read - place.tokens_read
        sample = packer.sample(samples)
        assert 0 < sample.intervals[:, 1].sum() <= seq_length and (sample.intervals[:, 1] > 0).all()
        read += positions(sample.intervals)
    assert packer.after(0).tokens_read == place.tokens_read


@pytest.mark.parametrize("seq_length", [16, 64, 200])
def test_best_fit_cuts_only_documents_longer_than_a_sample(monkeypatch, stream, seq_length):
    monkeypatch.setattr(best_fit, "WINDOW_BINS", 4)
    packer = BestFit(stream, Place(), seq_length)
    epoch = stream.tokens_per_epoch
    samples = packer.samples_before(2 * epoch)
    intervals = np.concatenate([packer.sample(number).intervals for number in range(samples)])
    assert sorted(positions(intervals)) == list(range(2 * epoch))
    spans = stream.locate(intervals)
    assert len(spans.lengths) == len(intervals), "an interval is one document or a part of one"
    whole = np.array(LENGTHS)[spans.documents] <= seq_length
    assert (spans.offsets[whole] == 0).all() and (spans.rests[whole] == 0).all()
    assert set(spans.lengths[~whole & (spans.rests > 0)].tolist()) <= {seq_length}
    assert (spans.offsets[~whole] % seq_length == 0).all()


def test_an_epoch_that_is_over_leaves_only_what_was_passed_over(stream):
    epoch = stream.tokens_per_epoch
    packer = BestFit(stream, Place(epoch, np.array([[40, 100]])), 64)
    assert packer.samples_before(packer.place.epoch_end(stream)) == 2
    assert sorted(
        positions(np.concatenate([packer.sample(i).intervals for i in range(2)]))
    ) == list(range(40, 140))
    assert packer.sample(2).intervals.min(axis=0)[0] >= epoch


def test_a_mark_saves_packing_and_changes_nothing(monkeypatch, stream):
    monkeypatch.setattr(best_fit, "WINDOW_BINS", 2)
    plain = BestFit(stream, Place(9), 32)
    mark = plain.mark(14)
    marked = BestFit(stream, Place(9), 32, mark)
    packed = []
    original = BestFit._pack
    monkeypatch.setattr(
        BestFit, "_pack", lambda self, number: packed.append(number) or original(self, number)
    )
    for number in range(13, 30):
        assert np.array_equal(marked.sample(number).intervals, plain.sample(number).intervals)
    assert min(packed) == mark[0] > 0


def test_order_of_packed_samples_is_seeded():
    lengths = np.random.default_rng(0).integers(1, 64, 2000).tolist()
    one, same, other = (
        BestFit(DocumentStream(Documents(lengths), None, seed), Place(), 64) for seed in (1, 1, 2)
    )
    assert all(np.array_equal(one.sample(i).intervals, same.sample(i).intervals) for i in range(50))
    sizes = [len(one.sample(i).intervals) for i in range(400)]
    assert abs(np.corrcoef(sizes, range(400))[0, 1]) < 0.2, "long documents must not come first"
    assert not all(
        np.array_equal(one.sample(i).intervals, other.sample(i).intervals) for i in range(5)
    )


def test_following_is_the_next_token_in_order(stream):
    packer = Concat(stream, Place(350, np.array([[3, 9], [40, 100]])), 16)
    order = unread_after(packer.place, 1000)
    assert [packer.sample(number).following for number in range(20)] == [
        order[16 * n + 16] for n in range(20)
    ]
    assert BestFit(stream, Place(), 16).sample(0).following == -1
