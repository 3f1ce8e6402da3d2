"""The stream is a pure function of the position; splits are disjoint; settings are checked."""

import hashlib
from threading import Thread

import numpy as np
import pytest

from data.config import DataConfig
from data.document_split import split_documents
from data.indexed import IndexedReader
from data.permutation import Permutation
from data.stream import DocumentStream
from data.synthetic import SyntheticReader
from data.writers.indexed_writer import IndexedWriter
from pretrain.config.facts import problems_of
from tests.documents import Documents

LENGTHS = [3, 0, 1, 7, 2, 1, 12, 5]
FROZEN = [1, 3, 2, 5, 7, 0, 4, 6]
FROZEN_DIGEST = "ad0d7f32c5def2f4"


@pytest.fixture
def reader(tmp_path):
    """Token = document * 100 + offset."""
    with IndexedWriter(str(tmp_path / "c"), np.int32) as writer:
        for document, length in enumerate(LENGTHS):
            writer.add_document(document * 100 + np.arange(length))
        writer.finish()
    return IndexedReader(str(tmp_path / "c"))


def make_stream(reader, seed=3):
    return DocumentStream(reader, np.arange(reader.num_documents), seed)


def test_each_epoch_holds_each_token_once_in_document_order(reader):
    stream = make_stream(reader)
    assert stream.tokens_per_epoch == 31 and 1 not in stream.documents
    orders = []
    for epoch in range(5):
        tokens = stream.read(epoch * 31, 31)
        assert sorted(tokens) == sorted(
            d * 100 + i for d, n in enumerate(LENGTHS) for i in range(n)
        )
        documents, offsets, lengths = stream.spans(epoch * 31, 31)
        assert (offsets == 0).all() and lengths.tolist() == [LENGTHS[d] for d in documents]
        assert tokens.tolist() == [d * 100 + i for d in documents for i in range(LENGTHS[d])]
        orders.append(tuple(documents.tolist()))
    assert len(set(orders)) > 1


def test_any_window_is_the_same_text(reader):
    whole = make_stream(reader).read(0, 200)
    stream = make_stream(reader)
    for start in (150, 0, 61, 62, 93, 7, 31):  # back and forth over more epochs than are kept
        for length in (0, 1, 2, 30, 31, 32, 50):
            assert stream.read(start, length).tolist() == whole[start : start + length].tolist()
            documents, offsets, lengths = stream.spans(start, length)
            assert lengths.sum() == length and (lengths > 0).all()
            assert all(array.dtype == np.int64 for array in (documents, offsets, lengths))


def test_one_document_corpus_ends_at_each_epoch(reader):
    stream = DocumentStream(reader, np.array([3]), seed=0)
    documents, offsets, lengths = stream.spans(5, 12)
    assert (
        documents.tolist() == [3, 3, 3]
        and offsets.tolist() == [5, 0, 0]
        and lengths.tolist() == [2, 7, 3]
    )


def test_threads_read_the_same(reader):
    whole = make_stream(reader).read(0, 310)
    stream = make_stream(reader)
    wrong = []

    def work(step):
        for start in range(0, 300, step):
            if stream.read(start, 10).tolist() != whole[start : start + 10].tolist():
                wrong.append(start)

    threads = [Thread(target=work, args=(step,)) for step in (1, 7, 31, 62)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_empty_stream_is_refused(reader):
    for documents in (np.array([1]), np.array([], dtype=np.int64)):
        with pytest.raises(ValueError, match="no document has a token. Fix"):
            DocumentStream(reader, documents, 0)


def test_permutation_is_frozen():
    """A run is continued years later: these values may never change."""
    assert Permutation.make(8, 1234, 0).values(0, 8).tolist() == FROZEN
    digest = hashlib.sha256(
        Permutation.make(100_000, 1234, 5).values(0, 100_000).tobytes()
    ).hexdigest()
    assert digest[:16] == FROZEN_DIGEST


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 1000, 65_536, 99_991])
def test_permutation_is_one_at_any_place(size):
    for seed in range(3):
        values = Permutation.make(size, seed).values(0, size)
        assert np.array_equal(np.sort(values), np.arange(size))
        assert np.array_equal(
            Permutation.make(size, seed).values(size // 2, size), values[size // 2 :]
        )
        falling = np.arange(size)[::-2]
        assert np.array_equal(Permutation.make(size, seed).values_of(falling), values[falling])


def test_permutations_are_spread_evenly():
    """Each number is as likely at each place, and neighbours do not stay together."""
    size = 7
    seeds = 7000
    found = np.stack([Permutation.make(size, 3, seed).values(0, size) for seed in range(seeds)])
    counts = np.stack([np.bincount(found[:, place], minlength=size) for place in range(size)])
    chi_square = ((counts - seeds / size) ** 2 / (seeds / size)).sum()
    assert chi_square < 80, "36 degrees of freedom: above 80 once in 30,000"
    values = Permutation.make(10_000, 5).values(0, 10_000)
    assert (np.abs(np.diff(values)) == 1).sum() < 15 and abs(
        np.corrcoef(values, range(10_000))[0, 1]
    ) < 0.05
    assert (
        len({Permutation.make(100, 1, epoch).values(0, 100).tobytes() for epoch in range(50)}) == 50
    )


@pytest.mark.parametrize(
    "documents, split, counts",
    [
        (1000, "969,30,1", (969, 30, 1)),
        (10, "969,30,1", (8, 1, 1)),
        (3, "969,30,1", (1, 1, 1)),
        (2, "969,30,1", (1, 1, 0)),
        (1, "969,30,1", (1, 0, 0)),
        (10, "1,0,0", (10, 0, 0)),
        (10, "90,10", (9, 1, 0)),
        (2, "1,1,1", (1, 1, 0)),
        (1, "1,1,1", (1, 0, 0)),
        (7, "1", (7, 0, 0)),
        (5, "0.98,0.02,0", (4, 1, 0)),
        (100, "1,99,0", (1, 99, 0)),
        (10, "1,0,1", (5, 0, 5)),
    ],
)
def test_split(documents, split, counts):
    parts = split_documents(documents, split, seed=1)
    assert tuple(len(part) for part in parts.values()) == counts and list(parts) == [
        "train",
        "valid",
        "test",
    ]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(documents))


def test_split_is_spread_over_the_file():
    valid = split_documents(10_000, "90,10,0", seed=5)["valid"]
    assert 4_700 < valid.mean() < 5_300
    assert not np.array_equal(valid, split_documents(10_000, "90,10,0", seed=6)["valid"])


@pytest.mark.parametrize("split", ["", "a,b", "0,1,1", "1,2,3,4", "-1,2", "nan", "inf,1"])
def test_bad_split(split):
    with pytest.raises(ValueError, match="must be one to three numbers.*Fix"):
        split_documents(10, split, 0)


def test_synthetic_documents_are_pure_and_learnable():
    reader = SyntheticReader(100, seed=1, num_documents=500)
    assert reader.document_lengths.min() >= 16 and reader.document_lengths.max() <= 8192
    assert len(set(reader.document_lengths.tolist())) > 100
    document = int(reader.document_lengths.argmax())
    length = int(reader.document_lengths[document])
    whole = reader.read(document, 0, length)
    assert (
        whole.tolist()
        == np.concatenate(
            [reader.read(document, i, min(13, length - i)) for i in range(0, length, 13)]
        ).tolist()
    )
    assert 0 <= whole.min() and whole.max() < 100
    assert (
        len({tuple(motif) for motif in whole[: length // 8 * 8].reshape(-1, 8)})
        <= SyntheticReader.POOL
    )
    assert whole[:64].tolist() != reader.read((document + 1) % 500, 0, 16).tolist() * 4
    assert reader.fingerprint() != SyntheticReader(100, seed=2, num_documents=500).fingerprint()


FINE = {"data_path": ["c"], "tokenizer_model": "m"}


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"data_path": ["0.3", "a", "b"]},
            "data_path = 0.3 a b: must be prefixes alone, or a weight before each. Fix",
        ),
        ({"data_path": ["-1", "a"]}, "data_path: weight -1.0 of a: must be a finite number"),
        (
            {"skip_data": ["5:4"]},
            "skip_data = 5:4: must be START:END in tokens, END above START. Fix",
        ),
        ({"data_path": []}, "there is nothing to train on. Fix"),
        ({"data_path": [], "valid_data_path": ["v"]}, "there is nothing to train on. Fix"),
        ({"train_data_path": ["t"]}, "train_data_path = t: cannot be combined with data_path.*Fix"),
        (
            {"valid_data_path": ["v"]},
            "valid_data_path = v: split = 969,30,1 makes validation sets, too.*Fix",
        ),
        ({"split": "x"}, "split = x: must be one to three numbers.*Fix"),
        (
            {"tokenizer_model": None},
            "tokenizer_model = None: must be given for SentencePieceTokenizer. Fix",
        ),
        (
            {"tokenizer_type": "NullTokenizer"},
            "vocab_size = None: must be given for NullTokenizer. Fix",
        ),
        ({"vocab_size": 1}, "vocab_size = 1: must be at least 2. Fix"),
        (
            {"reset_position_ids": False},
            "reset_position_ids = False: must agree with document_masking = True. Fix",
        ),
        (
            {"document_masking": False, "reset_attention_mask": True},
            "reset_attention_mask = True: must agree.*Fix",
        ),
        (
            {"mock_data": True, "vocab_size": 99},
            "data_path = c: cannot be combined with mock_data. Fix",
        ),
        (
            {"mock_data": True, "data_path": []},
            "vocab_size = None: must be given for mock_data. Fix",
        ),
        (
            {"mock_data": True, "data_path": [], "vocab_size": 9, "eod_mask_loss": True},
            "eod_mask_loss = True.*Fix",
        ),
    ],
)
def test_config_problems(settings, message):
    problems = problems_of(DataConfig(**(FINE | settings)))
    assert len(problems) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(problems[0])


def test_config_reports_all_problems_and_accepts_good_ones():
    assert (
        len(
            problems_of(
                DataConfig(vocab_size=0, split="x", reset_position_ids=False, data_path=["a", "a"])
            )
        )
        == 5
    )
    for settings in (
        FINE,
        {"train_data_path": ["t"], "valid_data_path": ["v"], "tokenizer_model": "m"},
        {"mock_data": True, "vocab_size": 64},
        FINE | {"reset_position_ids": True},
        {"data_path": ["c"], "tokenizer_type": "NullTokenizer", "vocab_size": 10},
    ):
        assert problems_of(DataConfig(**settings)) == []


def test_first_documents_are_the_long_ones_in_the_order_of_the_stream():
    lengths = [5, 50, 7, 80, 60, 1, 70, 0, 49]
    stream = DocumentStream(Documents(lengths), None, 3)
    order = stream.spans(0, sum(lengths))[0].tolist()
    expected = [number for number in order if lengths[number] >= 50]
    assert len(expected) == 4 and stream.first_documents(99, 50) == expected
    assert stream.first_documents(2, 50) == expected[:2] and stream.first_documents(3, 81) == []
    some = DocumentStream(Documents(lengths), np.array([0, 1, 4, 8]), 3)
    assert sorted(some.first_documents(9, 49)) == [1, 4, 8]
