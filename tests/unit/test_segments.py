"""The record of a run's data: what earlier versions stored is read, and written as it was."""

import json

import pytest

from data.ledger import Ledger
from data.packing import best_fit
from data.packing.place import Mark
from data.segments import ClosedSegment, OpenSegment, Saved, read_segment
from tests.unit.test_ledger import make_streams, settings

BLEND = [[2, "a"], [1, "b"]]
LONG = {"phase": "long", "seq_length": 32, "blend": BLEND} | {
    "packing": "best_fit",
    "exhausted": "repeat",
}
BASE = LONG | {"phase": "base", "seq_length": 8, "packing": "concat"}


def drawn(samples, tokens, documents, epochs, mark=True):
    entry = {"samples": samples, "tokens": tokens, "documents": documents, "epochs": epochs}
    return entry | ({"mark": [0, 0]} if mark else {})


# As the first version with segments wrote it, at clock 512.
STORED = [
    {"start": 0, **BASE}
    | {"fills": {"a": 1.0, "b": 1.0}}
    | {
        "drawn": {
            "a": drawn(5, 40, 1, 0.014825796886582653, mark=False),
            "b": drawn(3, 24, 2, 0.019933554817275746, mark=False),
        }
    },
    {"start": 64, **LONG}
    | {"fills": {"a": 0.925, "b": 0.83125}}
    | {
        "drawn": {
            "a": drawn(3, 84, 4, 0.04595997034840623),
            "b": drawn(1, 23, 1, 0.03903654485049834),
        }
    },
    {"start": 192, "skipped_until": 256, **LONG}
    | {"fills": {"a": 0.9866071428571429, "b": 0.9479166666666666}}
    | {
        "drawn": {
            "a": drawn(1, 32, 0, 0.05782060785767235),
            "b": drawn(1, 32, 1, 0.06561461794019934),
        }
    },
    {"start": 192, **LONG}
    | {"fills": {"a": 0.9427083333333334, "b": 0.9086538461538461}}
    | {
        "at": 512,
        "so_far": {
            "a": drawn(7, 205, 4, 0.13380281690140844),
            "b": drawn(3, 74, 2, 0.1270764119601329),
        },
    },
]


@pytest.fixture
def stored():
    sources = {name: stream.fingerprint() for name, stream in make_streams().items()}
    return {"sources": sources, "segments": STORED, "account": []}


@pytest.mark.parametrize("number", range(len(STORED)))
def test_a_stored_segment_is_written_as_it_was(number):
    assert json.loads(json.dumps(read_segment(STORED[number]).to_json())) == STORED[number]


def test_each_state_of_a_segment_is_read():
    closed, _, skipped, opened = (read_segment(entry) for entry in STORED)
    assert isinstance(closed, ClosedSegment) and closed.skipped_until is None
    assert isinstance(skipped, ClosedSegment) and skipped.skipped_until == 256
    assert isinstance(opened, OpenSegment) and opened.saved is not None
    assert opened.saved.clock == 512
    assert opened.saved.drawn["a"].mark == Mark(0, 0)
    fresh = read_segment({"start": 0, **BASE})
    assert isinstance(fresh, OpenSegment) and fresh.saved is None and fresh.fills is None


def test_a_renamed_source_is_renamed_everywhere():
    opened = read_segment(STORED[3]).renamed({"a": "moved"})
    assert isinstance(opened, OpenSegment) and isinstance(opened.saved, Saved)
    assert opened.settings.blend == ((2, "moved"), (1, "b"))
    assert opened.fills is not None and list(opened.fills) == ["moved", "b"]
    assert list(opened.saved.drawn) == ["moved", "b"]


def test_a_run_goes_on_from_what_was_stored(stored, monkeypatch):
    """The samples and places are those that the version which stored it went on with."""
    monkeypatch.setattr(best_fit, "WINDOW_BINS", 4)
    ledger = Ledger(make_streams(), stored)
    ledger.enter(512, "long", settings(32, [(2, "a"), (1, "b")], "best_fit"))
    assert len(ledger.segments) == 4
    found = [sample.intervals.tolist() for sample in ledger.mixture().samples(range(8, 11))]
    assert found == [[[377, 28], [437, 4]], [[94, 6], [102, 1], [163, 25]], [[397, 32]]]
    places = {
        name: (place.position, place.held.tolist()) for name, place in ledger.places_at(640).items()
    }
    assert places == {
        "a": (518, [[62, 32], [188, 32], [441, 32]]),
        "b": (457, [[24, 47], [103, 6], [132, 25], [189, 32], [267, 102], [429, 28]]),
        "c": (0, []),
    }
