"""Packing that equalises work: full bins of nearly equal cost, few documents, a function of what a
checkpoint stores."""

import json
from dataclasses import replace
from math import comb

import numpy as np
import pytest

from data.document_cost import DocumentCost
from data.ledger import Ledger
from data.packing import best_fit
from data.packing.bins import pack
from data.packing.even_bins import pack_evenly, pack_with_limit
from data.segments import DataSettings
from data.sources import MOCK, Corpus
from data.stream import DocumentStream
from pretrain.batches import settings_of
from pretrain.config.effects import effect_warnings
from pretrain.config.flags import spell
from pretrain.config.load import load_config
from pretrain.schedule.resolve import resolve_phases
from tests.documents import Documents

CAPACITY = 32768
# Attention costs as much as all else at 8,192 tokens of a document.
COST = DocumentCost(per_token=1.0, per_document=2.0, per_pair=2 / 8192, windows=((None, 1),))


def draw_lengths(bins: int, share_of_long: float = 0.34, seed: int = 0) -> np.ndarray:
    """Draw lognormal documents of mean 500, and some of a few thousand tokens."""
    chance = np.random.default_rng(seed)
    short = chance.lognormal(
        np.log(500) - 0.5, 1.0, int(bins * CAPACITY * (1 - share_of_long) / 500)
    )
    long = chance.lognormal(np.log(4000) - 0.18, 0.6, int(bins * CAPACITY * share_of_long / 4000))
    lengths = np.clip(np.concatenate([short, long]), 1, CAPACITY).astype(np.int64)
    return chance.permutation(lengths)


def fill_of(bins: np.ndarray, lengths: np.ndarray) -> float:
    tokens = np.bincount(bins, weights=lengths)
    assert tokens.max() <= CAPACITY
    return tokens.sum() / (CAPACITY * len(tokens))


def slowest(costs: np.ndarray, ranks: int) -> float:
    """Expect the dearest of a step's samples, one for each rank drawn at random, over the mean."""
    count = len(costs)
    # Ways to draw a step whose dearest sample is the one of each place.
    ways = [comb(place, ranks - 1) for place in range(count)]
    shares = np.array([number / comb(count, ranks) for number in ways])
    return float((np.sort(costs) * shares).sum() / costs.mean())


def least_costs(lengths: np.ndarray, count: int) -> np.ndarray:
    """Bound the costs of full bins from below.

    A document costs what it does by itself, and the rest of its bin at least the cheapest token's
    cost; what is left is spread evenly over the bins that cost less.
    """
    costs = COST.of_documents(lengths)
    cheapest = (costs / lengths).min()
    alone = costs + cheapest * np.maximum(0, lengths.sum() / count - lengths)
    alone = np.sort(alone)[::-1][:count]
    heavy = 0
    while alone[heavy] > (costs.sum() - alone[:heavy].sum()) / (count - heavy):
        heavy += 1
    level = (costs.sum() - alone[:heavy].sum()) / (count - heavy)
    return np.concatenate([alone[:heavy], np.full(count - heavy, level)])


@pytest.mark.parametrize("ranks", [16, 64])
@pytest.mark.parametrize("share_of_long", [0.34, 0.0])
def test_bins_are_full_and_cost_the_least_that_the_documents_allow(ranks, share_of_long):
    lengths = draw_lengths(512, share_of_long)
    plain = pack(lengths, CAPACITY)
    even = pack_evenly(lengths, COST.of_documents(lengths), CAPACITY)
    assert fill_of(even, lengths) > 0.995
    assert fill_of(even, lengths) >= 0.999 * fill_of(plain, lengths)
    costs = np.bincount(even, weights=COST.of_documents(lengths))
    before = np.bincount(plain, weights=COST.of_documents(lengths))
    least = slowest(least_costs(lengths, len(costs)), ranks)
    assert slowest(costs, ranks) < 1.003 * least
    assert slowest(before, ranks) > 1.2 * least


def test_documents_of_one_length_or_none_are_packed():
    assert len(pack_evenly(np.empty(0, dtype=np.int64), np.empty(0), 8)) == 0
    assert pack_evenly(np.array([8]), np.ones(1), 8).tolist() == [0]
    alike = pack_evenly(np.full(12, 4), np.ones(12), 8)
    assert np.bincount(alike).tolist() == [2] * 6
    assert sorted(pack_evenly(np.full(5, 8), np.ones(5), 8).tolist()) == list(range(5))


def test_bins_stay_full_where_costs_cannot_be_equal():
    """A few long documents a bin: best fit alone finds fuller bins, which matter more."""
    lengths = np.random.default_rng(0).integers(CAPACITY // 8, CAPACITY // 3, 2000)
    even = pack_evenly(lengths, COST.of_documents(lengths), CAPACITY)
    assert fill_of(even, lengths) >= 0.999 * fill_of(pack(lengths, CAPACITY), lengths)


@pytest.mark.parametrize("most", [400, 130])
def test_no_sample_holds_more_documents_than_allowed(most):
    lengths = draw_lengths(256)
    plain = pack(lengths, CAPACITY)
    assert np.bincount(plain).max() > most
    costs = COST.of_documents(lengths)
    for bins in (
        pack_with_limit(lengths, CAPACITY, most),
        pack_evenly(lengths, costs, CAPACITY, most),
    ):
        assert np.bincount(bins).max() <= most
        assert np.bincount(bins).min() > 0
        assert fill_of(bins, lengths) > 0.995


def test_a_limit_that_no_sample_reaches_changes_nothing():
    lengths = draw_lengths(64)
    assert np.array_equal(pack_with_limit(lengths, CAPACITY, 10**6), pack(lengths, CAPACITY))


def test_a_limit_below_what_samples_hold_pads_them():
    counts = np.bincount(pack_with_limit(np.full(100, 10), CAPACITY, 8))
    assert len(counts) == 13 and counts.max() == 8 and counts.sum() == 100


# ---------------------------------------------------------------- in a run


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.setattr(best_fit, "WINDOW_BINS", 16)
    lengths = np.clip(np.random.default_rng(1).lognormal(3.0, 1.2, 4000), 1, 300).astype(int)
    return {"a": DocumentStream(Documents(lengths.tolist()), None, seed=4)}


SETTINGS = DataSettings(
    256, ((1.0, "a"),), "best_fit", max_documents_per_sample=24, equal_cost=COST
)


def intervals_of(ledger: Ledger, numbers: range) -> list:
    return [sample.intervals.tolist() for sample in ledger.mixture().samples(numbers)]


def test_a_run_goes_on_in_the_middle_of_a_window(streams):
    whole = Ledger(streams)
    whole.enter(0, "one", SETTINGS)
    expected = intervals_of(whole, range(60))
    clock = 256 * 21
    stored = json.loads(json.dumps(whole.to_json(clock)))
    again = Ledger(streams, stored)
    again.enter(clock, "one", SETTINGS)
    assert len(again.segments) == 1
    assert intervals_of(again, range(21, 60)) == expected[21:]
    assert all(len(sample) <= 24 for sample in expected)


def test_a_segment_keeps_the_formula_with_which_it_began(streams):
    """The model's formula may change with the program: the samples of an open segment must not."""
    whole = Ledger(streams)
    whole.enter(0, "one", SETTINGS)
    expected = intervals_of(whole, range(60))
    other = replace(SETTINGS, equal_cost=replace(COST, per_pair=1e-9, per_document=100.0))
    fresh = Ledger(streams)
    fresh.enter(0, "one", other)
    assert intervals_of(fresh, range(60)) != expected, "the formula must matter"
    again = Ledger(streams, json.loads(json.dumps(whole.to_json(256 * 21))))
    again.enter(256 * 21, "one", other)
    assert len(again.segments) == 1 and again.open.settings == SETTINGS
    assert intervals_of(again, range(21, 60)) == expected[21:]


def test_a_closed_segment_is_packed_as_it_was(streams):
    ledger = Ledger(streams)
    ledger.enter(0, "one", SETTINGS)
    ledger.mixture()
    plain = replace(SETTINGS, equal_cost=None, max_documents_per_sample=None)
    ledger.enter(256 * 21, "one", plain)
    assert len(ledger.segments) == 2, "another packing is another segment"
    place = ledger.place("a")
    again = Ledger(streams, json.loads(json.dumps(ledger.to_json(256 * 30))))
    again.enter(256 * 30, "one", plain)
    assert len(again.segments) == 2
    assert again.place("a").position == place.position
    assert again.place("a").held.tolist() == place.held.tolist()
    assert intervals_of(again, range(9, 30)) == intervals_of(ledger, range(9, 30))


def test_what_is_not_asked_for_is_not_stored():
    plain = DataSettings(256, ((1.0, "a"),), "best_fit")
    assert "equal_cost" not in plain.to_json()
    assert "max_documents_per_sample" not in plain.to_json()
    assert DataSettings.from_json(plain.to_json()) == plain
    assert DataSettings.from_json(json.loads(json.dumps(SETTINGS.to_json()))) == SETTINGS
    assert not plain.agrees_with(SETTINGS) and not SETTINGS.agrees_with(plain)


@pytest.mark.parametrize(
    "flags, packs, warning",
    [
        ("--balance window --packing best_fit", True, None),
        ("--balance deal --packing best_fit", False, None),
        ("--packing best_fit", False, None),
        ("--balance window", False, "without --packing best_fit"),
        (
            "--balance window --packing best_fit --no-document-masking",
            False,
            "since samples cost the same without document masking",
        ),
    ],
)
def test_samples_cost_the_same_where_that_is_asked_for_and_can_be(streams, flags, packs, warning):
    base = "--mock-data --vocab-size 64 --seq-length 64 --global-batch-size 4 --train-iters 4"
    config = load_config(spell([*base.split(), *flags.split()]))
    (phase,) = resolve_phases(config)
    settings = settings_of(phase, Corpus({MOCK: streams["a"]}, {}), COST)
    assert settings.equal_cost == (COST if packs else None)
    found = [line for line in effect_warnings(config) if "balance = window" in line]
    assert len(found) == (warning is not None) and all(warning in line for line in found)
