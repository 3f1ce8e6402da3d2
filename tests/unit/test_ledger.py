"""Exactly once: over lengths, packings, blends, batches, layouts, skips and restarts, counted on
the batches."""

import json
from collections import Counter

import numpy as np
import pytest

from data.batch import IGNORE
from data.forecast import forecast
from data.ledger import Ledger
from data.loader import Loader
from data.mixture import fresh_mixture
from data.packing import best_fit
from data.segments import DataSettings
from data.stream import DocumentStream
from tests.documents import Documents

SIZES = {"a": 60, "b": 25, "c": 40}
"""Documents of each source."""


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(best_fit, "WINDOW_BINS", 4)


def make_streams(**changed):
    """Token = 1,000,000 x source + 1,000 x document + offset."""
    streams = {}
    for number, (name, count) in enumerate((SIZES | changed).items()):
        lengths = np.random.default_rng(number).integers(1, 90, count).tolist()
        base = 1_000_000 * number
        reader = Documents(
            lengths, lambda document, n, base=base: base + 1000 * document + np.arange(n)
        )
        reader.prefix = name
        streams[name] = DocumentStream(reader, None, seed=number)
    return streams


def settings(seq_length, blend, packing="concat", exhausted="repeat"):
    return DataSettings(seq_length, tuple(blend), packing, exhausted)


PHASES = [
    (settings(8, [(2, "a"), (1, "b")]), 64, 1, 2, 1, 6),
    (settings(32, [(2, "a"), (1, "b")], "best_fit"), 128, 2, 1, 2, 4),
    (settings(16, [(1, "a"), (3, "c")], "best_fit"), 64, 1, 2, 4, 5),
    (settings(128, [(1, "b"), (1, "c"), (1, "a")]), 256, 1, 1, 8, 3),
    (settings(64, [(0.3, "c"), (0.7, "a")], "best_fit"), 128, 1, 2, 1, 4),
    (settings(16, [(5, "b")]), 96, 2, 1, 1, 9),
]
"""Settings, batch tokens, micro batch, dp, cp, steps."""


def read_step(mixture, start, clock, batch_tokens, micro, dp, cp, masking):
    """(tokens, labels) of all ranks' batches of a step."""
    tokens = []
    labels = []
    size = mixture.settings.seq_length * micro
    for d in range(dp):
        for c in range(cp):
            loader = Loader(
                mixture,
                start,
                micro_batch_size=micro,
                global_batch_tokens=batch_tokens,
                dp_rank=d,
                dp_size=dp,
                pieces=[(c * size // cp, (c + 1) * size // cp)],
                document_masking=masking,
                prefetch=False,
                eod=-7,
            )
            for batch in loader.read(clock):
                tokens += batch.tokens.tolist()
                labels += batch.labels.tolist()
    return tokens, labels


def run(restart_at=(), masking=True, skip=None):
    """All phases; the ledger goes through JSON and new objects at the given clocks -> steps,
    ledger, clock."""
    streams = make_streams()
    stored = None
    clock = 0
    steps = []
    ledger = Ledger(streams)
    for number, (wanted, batch_tokens, micro, dp, cp, count) in enumerate(PHASES):
        ledger.enter(clock, f"phase{number}", wanted)
        for _ in range(count):
            if clock in restart_at:
                stored = json.loads(json.dumps(ledger.to_json(clock)))
                streams = make_streams()
                ledger = Ledger(streams, stored)
                ledger.enter(clock, f"phase{number}", wanted)
            if skip and skip[0] <= clock and not ledger.has_skipped(skip[1]):
                ledger.skip(clock, skip[1])
            steps.append(
                read_step(
                    ledger.mixture(),
                    ledger.open.start,
                    clock,
                    batch_tokens,
                    micro,
                    dp,
                    cp,
                    masking,
                )
            )
            clock += batch_tokens
    return steps, ledger, clock


def expected_tokens(ledger, clock):
    """What the account says was read, and what is left of each source's epochs."""
    ledger.enter(clock, "end", settings(1, [(1, name) for name in SIZES]))
    return {name: ledger.place(name) for name in SIZES}


@pytest.mark.parametrize("masking", [True, False])
def test_each_token_is_an_input_once_and_a_target_once(masking):
    steps, ledger, clock = run(masking=masking)
    inputs = sorted(token for tokens, _ in steps for token in tokens if token != -7)
    targets = sorted(label for _, labels in steps for label in labels if label != IGNORE)
    streams = ledger.streams
    places = expected_tokens(ledger, clock)
    read = {
        name: np.setdiff1d(
            np.arange(place.position),
            np.concatenate([np.arange(a, a + n) for a, n in place.held.tolist()] or [np.empty(0)]),
        )
        for name, place in places.items()
    }
    assert any(len(place.held) for place in places.values())
    epochs = {
        name: place.position / streams[name].tokens_per_epoch for name, place in places.items()
    }
    assert max(epochs.values()) > 1 > min(epochs.values())
    found = {name: streams[name].read(0, place.position + 1) for name, place in places.items()}
    assert inputs == sorted(token for name in SIZES for token in found[name][read[name]].tolist())
    # The token after each input that lies in the same document.
    followers = sorted(
        int(found[name][i + 1])
        for name in SIZES
        for i in read[name].tolist()
        if found[name][i + 1] % 1000 and found[name][i + 1] == found[name][i] + 1
    )
    if masking:
        assert targets == followers
    else:
        assert not set(followers) - set(targets)
        counts = np.unique(targets, return_counts=True)[1]
        assert counts.max() <= max(2, int(np.ceil(max(epochs.values()))))


def test_restarts_change_nothing():
    undisturbed = run()[0]
    clocks = {64, 192, 384, 512, 640, 896, 960, 1024, 1152, 1280}
    assert run(restart_at=clocks)[0] == undisturbed


def test_other_batch_and_layout_read_the_same_samples():
    stream = make_streams()
    for packing_name in ("concat", "best_fit"):
        mixture = fresh_mixture([(2, stream["a"]), (1, stream["b"])], 16, packing_name)
        whole = read_step(mixture, 0, 0, 768, 1, 1, 1, True)
        for batch_tokens, micro, dp, cp in ((64, 1, 2, 2), (128, 2, 4, 1), (768, 4, 2, 8)):
            found = [
                read_step(mixture, 0, clock, batch_tokens, micro, dp, cp, True)
                for clock in range(0, 768, batch_tokens)
            ]
            assert sorted(token for tokens, _ in found for token in tokens) == sorted(whole[0])


def test_later_settings_leave_the_past_alone():
    """A changed blend goes on where each source stood; one that comes back is where it was left."""
    ledger = Ledger(make_streams())
    ledger.enter(0, "one", settings(8, [(1, "a"), (1, "b")]))
    before = ledger.mixture().samples(range(10))
    ledger.enter(80, "two", settings(16, [(1, "b"), (1, "c")]))
    ledger.enter(240, "three", settings(16, [(1, "a")]))
    assert ledger.place("a").position == 40
    assert ledger.mixture().samples([0])[0].intervals.tolist() == [[40, 16]]
    assert ledger.place("b").position == 40 + 80
    fresh = Ledger(make_streams())
    fresh.enter(0, "one", settings(8, [(1, "a"), (1, "b")]))
    assert [s.intervals.tolist() for s in before] == [
        s.intervals.tolist() for s in fresh.mixture().samples(range(10))
    ]
    ledger.enter(256, "three", settings(16, [(1, "a")]))
    assert len(ledger.segments) == 3, "the same settings go on in the same segment"


def test_a_skipped_window_is_not_drawn_and_nothing_else_is_lost():
    plain, _, _ = run()
    skipped, ledger, clock = run(skip=(128, 256))
    assert skipped[:2] == plain[:2] and skipped[2] != plain[2]
    streams = ledger.streams
    places = expected_tokens(ledger, clock)
    inputs = [token for tokens, _ in skipped for token in tokens if token != -7]
    passed = [row for row in ledger.account(clock) if row["skipped"]]
    assert sum(row["tokens"] for row in passed) == 128
    read = sum(place.tokens_read for place in places.values())
    assert len(inputs) == read - 128 == sum(ledger.tokens_by_source(clock).values())
    for number, (name, place) in enumerate(places.items()):
        own = [token for token in inputs if token // 1_000_000 == number]
        epochs_begun = -(-place.position // streams[name].tokens_per_epoch)
        times = max(Counter(own).values())
        assert times <= epochs_begun, f"{name}: a token {times} times in {epochs_begun} epochs"
    again = run(skip=(128, 256), restart_at={192, 512})[0]
    assert again == skipped


def test_account_adds_up():
    steps, ledger, clock = run()
    rows = ledger.account(clock)
    assert {row["phase"] for row in rows} == {f"phase{n}" for n in range(6)}
    real = sum(token != -7 for tokens, _ in steps for token in tokens)
    assert (
        sum(row["tokens"] for row in rows) == real == sum(ledger.tokens_by_source(clock).values())
    )
    begun = sum(token % 1000 == 0 for tokens, _ in steps for token in tokens if token != -7)
    assert sum(row["documents"] for row in rows) == begun > 0
    last = {row["source"]: row["epochs"] for row in rows}
    assert last["b"] > 1 > last["c"]


def test_shares_are_reached():
    ledger = Ledger(make_streams())
    ledger.enter(0, "one", settings(4, [(0.34, "a"), (0.5, "b"), (0.16, "c")]))
    totals = ledger.tokens_by_source(40_000)
    assert [totals[name] / 40_000 for name in SIZES] == pytest.approx([0.34, 0.5, 0.16], abs=1e-3)


def test_shares_count_tokens_also_where_samples_are_not_full(monkeypatch):
    """Documents of which only one fits into a sample, beside short ones that fill theirs."""
    monkeypatch.setattr(best_fit, "WINDOW_BINS", 256)
    generator = np.random.default_rng(0)
    streams = {
        name: DocumentStream(Documents(generator.integers(low, high, 4000).tolist()), None, seed=1)
        for name, low, high in (("long", 33, 64), ("short", 1, 8))
    }
    ledger = Ledger(streams)
    ledger.enter(0, "one", settings(64, [(1, "long"), (1, "short")], "best_fit"))
    totals = ledger.tokens_by_source(64 * 400)
    assert totals["long"] / sum(totals.values()) == pytest.approx(0.5, abs=0.01)
    again = Ledger(streams, json.loads(json.dumps(ledger.to_json(64 * 400))))
    again.enter(64 * 400, "one", settings(64, [(1, "long"), (1, "short")], "best_fit"))
    assert [s.intervals.tolist() for s in again.mixture().samples(range(400, 420))] == [
        s.intervals.tolist() for s in ledger.mixture().samples(range(400, 420))
    ]


def test_sources_that_end():
    streams = make_streams()
    epoch = streams["b"].tokens_per_epoch
    for packing_name in ("concat", "best_fit"):
        ledger = Ledger(streams)
        ledger.enter(0, "one", settings(16, [(1, "a"), (9, "b")], packing_name, "stop"))
        samples = ledger.mixture().order.samples
        totals = ledger.tokens_by_source(16 * samples)
        assert epoch - 16 < totals["b"] <= epoch and totals["a"] <= streams["a"].tokens_per_epoch
        with pytest.raises(
            ValueError, match="data_exhausted = stop: the sources have .* samples of 16 tokens left"
        ):
            ledger.mixture().check(samples + 1)
        ledger.mixture().check(samples)
        strict = Ledger(streams)
        strict.enter(0, "one", settings(16, [(1, "a"), (9, "b")], packing_name, "error"))
        with pytest.raises(
            ValueError, match="data_exhausted = error: b has .* samples left, .* to be drawn.*Fix"
        ):
            strict.mixture().check(samples)


def test_changed_data_is_named():
    ledger = Ledger(make_streams())
    ledger.enter(0, "one", settings(8, [(1, "a"), (1, "b")]))
    stored = ledger.to_json(64)
    changed = make_streams(b=26)
    with pytest.raises(
        ValueError, match="b: is not the data.*documents 25 -> 26.*--accept-changes data"
    ):
        Ledger(changed, stored)
    accepted = Ledger(changed, stored, accept_changes=True)
    accepted.enter(64, "one", settings(8, [(1, "a"), (1, "b")]))
    assert accepted.place("b").position == 0 and accepted.place("a").position == 32
    assert sum(accepted.tokens_by_source(64).values()) == 64
    moved = make_streams()
    moved["elsewhere"] = moved.pop("a")
    renamed = Ledger(moved, stored)
    renamed.enter(64, "one", settings(16, [(1, "elsewhere")]))
    assert renamed.place("elsewhere").position == 32
    twins = make_streams()
    twins["b"].fingerprint()["corpus"] = twins["a"].fingerprint()["corpus"] = "same"
    both = Ledger({"a": twins["a"]})
    both.enter(0, "one", settings(8, [(1, "a")]))
    stored = both.to_json(64)
    stored["sources"]["copy"] = stored["sources"]["a"]
    stored["segments"][0]["so_far"]["copy"] = {
        "samples": 0,
        "tokens": 0,
        "documents": 0,
        "epochs": 0.0,
    }
    elsewhere = Ledger({"c": twins["a"], "d": twins["a"]}, stored)
    elsewhere.enter(64, "two", settings(8, [(1, "c"), (1, "d")]))
    assert sorted(elsewhere.place(name).position for name in "cd") == [0, 64]
    with pytest.raises(ValueError, match="earlier version"):
        Ledger(moved, {"train": {}})


def test_forecast():
    streams = make_streams()
    ledger = Ledger(streams)
    phases = [
        ("one", 800, settings(8, [(3, "a"), (1, "b")])),
        ("two", 4000, settings(32, [(1, "b")], "best_fit")),
    ]
    rows = forecast(ledger, 0, phases)
    assert [(row.phase, row.source, row.tokens) for row in rows] == [
        ("one", "a", 600),
        ("one", "b", 200),
        ("two", "b", 3200),
    ]
    assert rows[0].share == 0.75 and rows[2].to_epoch == pytest.approx(
        3400 / streams["b"].tokens_per_epoch
    )
    ledger.enter(0, *phases[0][::2])
    later = forecast(Ledger(streams, ledger.to_json(400)), 400, phases)
    assert (
        later[0].tokens == pytest.approx(300, abs=8)
        and later[0].from_epoch == pytest.approx(300 / streams["a"].tokens_per_epoch, abs=0.01)
        and later[2].to_epoch == pytest.approx(rows[2].to_epoch, abs=0.02)
    )
    with pytest.raises(ValueError, match="data_exhausted = error: b has"):
        forecast(
            ledger, 400, [*phases, ("three", 9000, settings(32, [(1, "b")], "concat", "error"))]
        )
