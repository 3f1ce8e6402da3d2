"""Blends: shares, order by number, sources that end, and how they are written."""

import numpy as np
import pytest

from data.blend import BlendOrder, SourceName, parse_blend


@pytest.mark.parametrize(
    "weights",
    [
        [1],
        [0.7, 0.3],
        [0.34, 0.66],
        [1, 1, 1, 1],
        [5e9, 1e9, 3],
        [1e-9, 2e-9],
        [1e20] * 4,
        [1e-320, 1e-320],
    ],
)
def test_each_source_is_within_one_of_its_share(weights):
    order = BlendOrder(weights, [None] * len(weights))
    sources, _ = order.draw(0, 500)
    shares = np.array(weights) / sum(weights)
    for samples in range(501):
        counts = np.bincount(sources[:samples], minlength=len(weights))
        assert (np.abs(counts - samples * shares) <= 1).all()
        assert np.array_equal(order.counts(samples), counts)


def test_samples_do_not_depend_on_where_one_begins():
    generator = np.random.default_rng(0)
    weights = generator.random(200) + 1e-3
    limits = [None if i % 3 else int(generator.integers(0, 60)) for i in range(200)]
    sources, places = BlendOrder(weights, limits).draw(0, 20_000)
    for source in range(200):
        assert np.array_equal(places[sources == source], np.arange((sources == source).sum()))
    for first in (0, 1, 199, 5_000, 12_345, 19_990, 3):
        found = BlendOrder(weights, limits).draw(first, 10)
        assert np.array_equal(found[0], sources[first : first + 10])
        assert np.array_equal(found[1], places[first : first + 10])
    far = BlendOrder(weights, [None] * 200).counts(10**12)
    assert far.sum() == 10**12 and np.abs(far / 1e12 - weights / weights.sum()).max() < 1e-9


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [0.7, 0.2, 0.1], [3e-4, 5.0, 1.0]])
def test_a_sample_of_a_source_knows_its_number_among_all(weights):
    """Equal weights have equal keys, of which the earlier source's comes first."""
    order = BlendOrder(weights, [None] * len(weights))
    sources, places = order.draw(0, 20_000)
    for source in range(len(weights)):
        expected = np.flatnonzero(sources == source)
        own = np.concatenate([[-1], places[expected]])
        assert order.numbers_of(source, own).tolist() == [-1, *expected]


def test_a_source_that_ends_leaves_its_share_to_the_others():
    order = BlendOrder([3, 1, 1], [6, None, 20])
    sources, _ = order.draw(0, 60)
    assert np.bincount(sources).tolist() == [6, 34, 20]
    assert np.bincount(sources[10:40]).tolist() == [0, 15, 15]
    ended = BlendOrder([1, 1], [2, 3])
    assert ended.samples == 5 and sorted(ended.draw(0, 5)[0].tolist()) == [0, 0, 1, 1, 1]
    assert BlendOrder([1, 1], [2, None]).samples == 2**62


@pytest.mark.parametrize(
    "words, expected",
    [
        (["web"], [(None, "web")]),
        (["web", "code"], [(None, "web"), (None, "code")]),
        (["0.7", "web", "0.3", "code"], [(0.7, "web"), (0.3, "code")]),
        (["7", "web", "0", "code"], [(7.0, "web")]),
        (["1", "web[64Ki:]", "2", "web[:65536]"], [(1.0, "web[65536:]"), (2.0, "web[:65536]")]),
        (["a[1K:2K]"], [(None, "a[1000:2000]")]),
        (["2025"], None),
    ],
)
def test_parse_blend(words, expected):
    if expected is None:
        with pytest.raises(ValueError, match="prefixes alone, or a weight before each. Fix"):
            parse_blend(words, "data_path")
    else:
        assert [
            (weight, str(source)) for weight, source in parse_blend(words, "data_path")
        ] == expected


@pytest.mark.parametrize(
    "words, message",
    [
        (["-1", "web"], "weight -1.0 of web: must be a finite number of at least 0. Fix"),
        (["nan", "web", "1", "code"], "weight nan of web"),
        (["inf", "web"], "weight inf"),
        (["0", "web", "0", "code"], "all weights are 0. Fix"),
        (["0.5", "web", "code"], "or a weight before each. Fix"),
        (["web", "0.5"], "or a weight before each. Fix"),
        (["1", "web", "2", "web"], "would be drawn twice. Fix"),
        (["web", "web[5:]"], "would be drawn twice. Fix"),
        (["corpora/web", "./corpora/web"], "would be drawn twice. Fix"),
        (["web[9:5]"], "no document has at least 9 and fewer than 5"),
        (["web[x:]"], "is no token count.*Fix"),
        (["web[:0]"], "no document has"),
    ],
)
def test_bad_blend(words, message):
    with pytest.raises(ValueError, match=message):
        parse_blend(words, "data_path")


def test_overlaps():
    def overlaps(one, other):
        assert SourceName.parse(one).overlaps(SourceName.parse(other)) == SourceName.parse(
            other
        ).overlaps(SourceName.parse(one))
        return SourceName.parse(one).overlaps(SourceName.parse(other))

    assert overlaps("a", "a[5:]") and overlaps("a[:6]", "a[5:]") and not overlaps("a[:5]", "a[5:]")
    assert not overlaps("a", "b") and not overlaps("a[1:3]", "a[3:9]")
