"""Samples of like cost come in the same steps: of one source or several, also after a restart."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from data.document_cost import DocumentCost
from data.ledger import Ledger
from data.mixture import Mixture
from data.packing import best_fit
from data.packing.best_fit import samples_of_window
from data.packing.place import Place
from data.packing.sample_order import places_by_step, random_places
from data.sample_costs import sample_costs
from data.segments import DataSettings
from data.stream import DocumentStream
from tests.documents import Documents

COST = DocumentCost(per_token=1.0, per_document=2.0, per_pair=2 / 64, windows=((None, 1),))
LENGTH = 256
STEP = 6
SETTINGS = DataSettings(LENGTH, ((1.0, "a"),), "best_fit", equal_cost=COST, samples_per_step=STEP)


def place_by_step(costs, first, per_step, seed=7):
    places = random_places(len(costs), seed, first, LENGTH)
    own = np.arange(first - 1, first + len(costs) + 1)
    steps = np.floor((own + 0.5) / per_step).astype(np.int64)
    return places_by_step(np.asarray(costs, dtype=float), steps, places, seed)


def make_stream(seed: int) -> DocumentStream:
    """Make a stream of documents of which one in ten costs more than a mean sample."""
    chance = np.random.default_rng(seed)
    lengths = np.clip(chance.lognormal(3.0, 1.2, 6000), 1, 120).astype(int)
    lengths[chance.random(6000) < 0.03] = LENGTH
    return DocumentStream(Documents(lengths.tolist()), None, seed=4)


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.setattr(best_fit, "WINDOW_BINS", 60)
    return {name: make_stream(seed) for seed, name in enumerate("ab")}


def costs_of(settings: DataSettings, streams: dict, samples: int) -> np.ndarray:
    mixture = Mixture(settings, streams, dict.fromkeys(streams, Place()))
    return sample_costs(mixture, 0, samples, COST, document_masking=True)


def waits_of(costs: np.ndarray) -> float:
    """Add up the most expensive sample of each step, over the mean."""
    steps = costs.reshape(-1, STEP)
    return float(steps.max(axis=1).sum() / steps.mean(axis=1).sum())


# ---------------------------------------------------------------- the order


def test_steps_get_samples_that_are_neighbours_by_cost():
    """Samples 10 to 21 in steps of 5: the first step is whole, the last reaches beyond them."""
    costs = np.random.default_rng(0).permutation(12)
    places = place_by_step(costs, 10, 5)
    by_place = np.empty(12)
    by_place[places] = costs
    whole = sorted([sorted(by_place[:5].tolist()), sorted(by_place[5:10].tolist())])
    assert whole == [[2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]
    assert sorted(by_place[10:].tolist()) == [0, 1]


def test_steps_that_the_neighbours_share_get_the_cheapest():
    costs = np.random.default_rng(0).permutation(14)
    by_place = np.empty(14)
    # Numbers 8, 9 belong to step 1, 20 and 21 to step 4.
    by_place[place_by_step(costs, 8, 5)] = costs
    assert sorted([*by_place[:2], *by_place[12:]]) == [0, 1, 2, 3]


def test_the_expensive_steps_are_drawn_at_random():
    """Each of 8 steps is the most expensive one with some seed."""
    firsts = {int(place_by_step(np.arange(40), 0, 5, seed)[39]) // 5 for seed in range(60)}
    assert firsts == set(range(8))


def test_within_a_step_the_order_is_random():
    tops = {int(place_by_step(np.arange(40), 0, 5, seed)[39]) % 5 for seed in range(60)}
    assert tops == set(range(5))


@pytest.mark.parametrize("per_step", [0.3, 1.0, 2.5, 7.3, 40.0, 1000.0])
@pytest.mark.parametrize("first", [0, 3, 1000])
def test_each_sample_has_one_place(per_step, first):
    places = place_by_step(np.random.default_rng(1).random(37), first, per_step)
    assert sorted(places.tolist()) == list(range(37))


@pytest.mark.parametrize("per_step", [1e-6, 1e-12])
def test_a_source_with_a_tiny_share_takes_no_memory_for_the_steps_between(per_step):
    """Its window reaches over 40 million steps, or more than there are memory for or ranks of."""
    costs = np.arange(40)
    tracemalloc.start()
    places = place_by_step(costs, 3, per_step)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(places.tolist()) == list(range(40))
    assert peak < 100_000, f"{peak:,} bytes"


def test_the_order_is_frozen():
    """A run is continued years later: this order may never change."""
    found = place_by_step(np.arange(20) % 7, 3, 4.5).tolist()
    assert found == [10, 11, 18, 9, 8, 1, 3, 19, 12, 15, 16, 6, 5, 2, 0, 13, 14, 17, 7, 4]


def test_a_window_within_one_step_is_in_random_order():
    costs = np.arange(37)
    assert np.array_equal(place_by_step(costs, 3, 1000.0), random_places(37, 7, 3, LENGTH))


# ---------------------------------------------------------------- windows


def test_a_window_holds_steps_up_to_a_limit_of_tokens():
    assert samples_of_window(1 << 20, None) == 1024
    # 32 steps of 16 or 64 samples of 1M; 2^31 tokens hold no more than 2,048 of them.
    assert samples_of_window(1 << 20, 16) == 1024
    assert samples_of_window(1 << 20, 64) == 2048
    assert samples_of_window(1 << 20, 1024) == 2048
    # 128K: 32 steps of 256 samples; of 1,024 samples as many as 2^31 tokens hold.
    assert samples_of_window(1 << 17, 256) == 8192
    assert samples_of_window(1 << 17, 1024) == 16384
    # Sources share the tokens, too.
    assert samples_of_window(1 << 17, 1024, share=0.25) == 4096


def test_windows_of_many_sources_hold_together_what_one_source_s_does():
    """Each rank keeps windows of every source: ten such windows would take ten times as much."""
    shares = (0.5, 0.25, 0.125, 0.125)
    found = [samples_of_window(1 << 13, 1024, share) for share in shares]
    assert found == [16384, 8192, 4096, 4096]
    assert sum(found) == samples_of_window(1 << 13, 1024)
    blend = tuple((2 * share, name) for share, name in zip(shares, "abcd", strict=True))
    settings = replace(SETTINGS, blend=blend, samples_per_step=1024)
    streams = {name: make_stream(0) for name in "abcd"}
    mixture = Mixture(settings, streams, dict.fromkeys("abcd", Place()))
    windows = [packer._window_samples for packer in mixture.packers]
    assert windows == found


# ---------------------------------------------------------------- in a run


def test_steps_wait_for_less(streams):
    random = costs_of(replace(SETTINGS, samples_per_step=None), {"a": streams["a"]}, 50 * STEP)
    found = costs_of(SETTINGS, {"a": streams["a"]}, 50 * STEP)
    assert waits_of(random) > 1.5
    assert waits_of(found) - 1 < 0.35 * (waits_of(random) - 1)


def test_steps_of_several_sources_wait_for_less(streams):
    """Sources have their expensive samples in the same steps, whatever their shares."""
    blend = replace(SETTINGS, blend=((2.0, "a"), (1.0, "b")))
    random = costs_of(replace(blend, samples_per_step=None), streams, 50 * STEP)
    found = costs_of(blend, streams, 50 * STEP)
    assert waits_of(found) - 1 < 0.5 * (waits_of(random) - 1)


def test_no_step_of_many_sources_gets_an_expensive_sample_of_its_neighbour(monkeypatch):
    """Where a source's samples fall is known to the sample, not only by its share."""
    monkeypatch.setattr(best_fit, "WINDOW_BINS", 60)
    sources = {name: make_stream(seed) for seed, name in enumerate("abcde")}
    shares = (0.4, 0.27, 0.17, 0.11, 0.05)
    settings = replace(
        SETTINGS, blend=tuple(zip(shares, sources, strict=True)), samples_per_step=32
    )
    costs = costs_of(settings, sources, 90 * 32).reshape(-1, 32)
    assert costs.max(axis=1).sum() / costs.mean(axis=1).sum() < 1.07


def test_the_samples_of_a_window_are_the_same_ones(streams, monkeypatch):
    """A window of no more samples than without steps is packed alike: only the order differs."""
    monkeypatch.setattr(best_fit, "WINDOW_STEPS", 16)
    found = []
    for samples_per_step in (3, None):
        settings = replace(SETTINGS, samples_per_step=samples_per_step)
        packer = Mixture(settings, {"a": streams["a"]}, {"a": Place()}).packers[0]
        count = packer._window(0).samples
        found.append([packer.sample(number).intervals.tolist() for number in range(count)])
    assert found[0] != found[1]
    assert sorted(found[0]) == sorted(found[1])


def test_a_run_goes_on_in_the_middle_of_a_window(streams):
    blend = replace(SETTINGS, blend=((2.0, "a"), (1.0, "b")))
    whole = Ledger(streams)
    whole.enter(0, "one", blend)
    expected = [sample.intervals.tolist() for sample in whole.mixture().samples(range(300))]
    for steps in (7, 23):
        clock = LENGTH * STEP * steps
        again = Ledger(streams, json.loads(json.dumps(whole.to_json(clock))))
        # The batch may have changed: the open segment keeps its order.
        again.enter(clock, "one", replace(blend, samples_per_step=2 * STEP))
        assert len(again.segments) == 1
        numbers = range(STEP * steps, 300)
        found = [sample.intervals.tolist() for sample in again.mixture().samples(numbers)]
        assert found == expected[STEP * steps :]


def test_a_segment_that_closes_unused_leaves_its_sources_where_it_should(streams):
    """A next segment draws the same whether or not the one before it was drawn from."""
    blend = replace(SETTINGS, blend=((2.0, "a"), (1.0, "b")))
    found = []
    for is_drawn_from in (True, False):
        ledger = Ledger(streams)
        ledger.enter(0, "one", blend)
        if is_drawn_from:
            ledger.mixture()
        ledger.enter(LENGTH * STEP * 7, "two", replace(blend, seq_length=2 * LENGTH))
        places = [ledger.place(name) for name in "ab"]
        found.append([(place.position, place.held.tolist()) for place in places])
    assert found[0] == found[1]


@pytest.mark.parametrize("samples_per_step", [None, STEP])
def test_a_segment_may_begin_where_a_source_ends_an_epoch(streams, samples_per_step):
    """The rest of the epoch is a window without samples."""
    blend = ((2.0, "a"), (1.0, "b"))
    settings = replace(SETTINGS, blend=blend, samples_per_step=samples_per_step)
    at_end = Place(streams["a"].tokens_per_epoch)
    mixture = Mixture(settings, streams, {"a": at_end, "b": Place()})
    first = mixture.packers[0].sample(0).intervals
    assert first[0, 0] >= at_end.position
    assert 0.9 < mixture.fills["a"] <= 1


def test_settings_of_an_earlier_version_have_no_steps():
    stored = SETTINGS.to_json()
    assert stored.pop("samples_per_step") == STEP
    earlier = DataSettings.from_json(json.loads(json.dumps(stored)))
    assert earlier.samples_per_step is None
    assert earlier.agrees_with(SETTINGS) and SETTINGS.agrees_with(earlier)
