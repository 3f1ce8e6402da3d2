"""Opening a run's data: splits, ranges of lengths, blends, validation sets, checks of ids."""

import os

import numpy as np
import pytest

from data.config import DataConfig, parse_windows
from data.indexed import IndexedReader, OpenFiles
from data.loader import Loader
from data.mixture import fresh_mixture
from data.sources import open_corpus
from data.synthetic import SyntheticReader
from data.writers.indexed_writer import IndexedWriter


def write(prefix, documents, dtype=np.uint16):
    with IndexedWriter(str(prefix), dtype) as writer:
        for ids in documents:
            writer.add_document(ids)
        writer.finish()
    return [str(prefix)]


def ids_of(stream):
    return (
        set(range(stream.num_documents))
        if stream.documents is None
        else set(stream.documents.tolist())
    )


def test_split_and_fingerprint(tmp_path):
    path = write(tmp_path / "c", [[i] * (i % 3) for i in range(100)])

    def opened(**settings):
        return open_corpus(DataConfig(**settings), 1, 100)

    corpus = opened(data_path=path, split="80,20")
    assert set(corpus.validation) == {"valid"}
    train = ids_of(corpus.train[path[0]])
    valid = ids_of(corpus.validation["valid"][0][1])
    assert not train & valid and train | valid == {i for i in range(100) if i % 3}
    again = opened(data_path=path, split="80,20")
    other = opened(data_path=path, split="70,30")
    assert (
        corpus.train[path[0]].fingerprint()
        == again.train[path[0]].fingerprint()
        != other.train[path[0]].fingerprint()
    )
    assert corpus.empty == {path[0]: 34}
    assert opened(data_path=path, split="1").validation == {}
    own = opened(train_data_path=path, valid_data_path=write(tmp_path / "v", [[1, 2]]))
    assert (
        own.train[path[0]].tokens_per_epoch == 99
        and own.validation["valid"][0][1].tokens_per_epoch == 2
    )
    write(tmp_path / "empty", [[], []])
    with pytest.raises(ValueError, match="no document has a token. Fix"):
        opened(data_path=[str(tmp_path / "empty")])


def test_the_cache_changes_nothing(tmp_path):
    path = write(tmp_path / "c", [[i] * (1 + i % 7) for i in range(200)])
    plain = open_corpus(DataConfig(data_path=path), 1, 200).train[path[0]]
    for _ in range(2):
        cached = open_corpus(
            DataConfig(data_path=path, data_cache_path=str(tmp_path / "cache")), 1, 200
        ).train[path[0]]
        assert np.array_equal(plain.read(100, 900), cached.read(100, 900))
        assert plain.fingerprint() == cached.fingerprint()
    assert len(list((tmp_path / "cache").glob("*.index"))) == 3, (
        "the split, and the offsets of two epochs"
    )


def test_length_ranges(tmp_path):
    path = write(tmp_path / "c", [[1] * (1 + i % 50) for i in range(500)])[0]
    corpus = open_corpus(
        DataConfig(data_path=["1", f"{path}[20:]", "2", f"{path}[:20]"], split="90,10"), 1, 100
    )
    long = corpus.train[f"{path}[20:]"]
    short = corpus.train[f"{path}[:20]"]
    assert long.lengths.min() >= 20 > short.lengths.max()
    held_out = [stream for blend in corpus.validation.values() for _, stream in blend]
    assert set(corpus.validation) == {"c[20:]", "c[:20]"}
    parts = [ids_of(stream) for stream in (long, short, *held_out)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 500
    with pytest.raises(ValueError, match="has no document to train on. Fix"):
        open_corpus(DataConfig(data_path=[f"{path}[900:]"]), 1, 100)


def test_blends_and_their_weights(tmp_path):
    web = write(tmp_path / "web", [[1] * 30] * 9)[0]
    code = write(tmp_path / "code", [[2] * 10] * 9)[0]
    corpus = open_corpus(
        DataConfig(train_data_path=[web]), 1, 100, phase_blends=[["3", web, "1", code]]
    )
    assert set(corpus.train) == {web, code}
    by_size = corpus.settings(8, [web, code], "data_path", "concat", "repeat")
    assert by_size.blend == ((270.0, web), (90.0, code))
    assert corpus.settings(8, ["3", web, "1", code], "data_path", "concat", "repeat").blend == (
        (3.0, web),
        (1.0, code),
    )


def test_validation_sets(tmp_path):
    web, code, held = (
        write(tmp_path / name, [[n] * 30] * 40)[0] for n, name in enumerate(("web", "code", "held"))
    )
    split = open_corpus(DataConfig(data_path=[web, code], split="90,10"), 1, 100)
    assert set(split.validation) == {"web", "code"}
    named = open_corpus(
        DataConfig(train_data_path=[web], valid_data_path=[f"one={held}", f"two={code}"]), 1, 100
    )
    assert set(named.validation) == {"one", "two"}
    blend = open_corpus(
        DataConfig(train_data_path=[web], valid_data_path=["1", held, "2", code]), 1, 100
    )
    assert [weight for weight, _ in blend.validation["valid"]] == [1.0, 2.0]
    write(tmp_path / "copy", [[0] * 30] * 40)
    for path in (web, str(tmp_path / "copy")):
        with pytest.raises(
            ValueError, match="holds the documents of .*web, which is trained on. Fix"
        ):
            open_corpus(DataConfig(train_data_path=[web], valid_data_path=[path]), 1, 100)
    with pytest.raises(ValueError, match="the name 'a' is given twice"):
        open_corpus(
            DataConfig(train_data_path=[web], valid_data_path=[f"a={held}", f"a={code}"]), 1, 100
        )
    many = [write(tmp_path / f"m{n}", [[n, n]] * 20)[0] for n in range(20)]
    assert set(open_corpus(DataConfig(data_path=many, split="90,10"), 1, 100).validation) == {
        "valid"
    }


def test_many_prefixes_keep_few_files_open(tmp_path):
    files = OpenFiles(limit=8)
    readers = [
        IndexedReader(write(tmp_path / f"p{n}", [[n, n + 1]] * 3)[0], files) for n in range(200)
    ]
    for _ in range(2):
        for n, reader in enumerate(readers):
            assert reader.read(2, 0, 2).tolist() == [n, n + 1] and len(files) <= 8
    opened = [
        os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd")
        if name.isdigit() and os.path.exists(f"/proc/self/fd/{name}")
    ]
    assert len(files) == 8 and sum(str(tmp_path) in path for path in opened) == 16


@pytest.mark.parametrize("side", ["ours", "missing", "of another corpus"])
def test_ids_are_checked(tmp_path, side):
    path = write(tmp_path / "c", [[1, 2], [500]])
    if side == "missing":
        (tmp_path / "c.json").unlink()
    elif side == "of another corpus":
        (tmp_path / "c.json").write_text('{"documents": 9, "tokens": 9, "max_token_id": 9}')
    with pytest.raises(
        ValueError, match=r"c: holds token id 500; ids must be in \[0, vocab_size = 500\). Fix"
    ):
        open_corpus(DataConfig(data_path=path), 1, 500)
    assert open_corpus(DataConfig(data_path=path), 1, 501)


def test_mock_data():
    corpus = open_corpus(DataConfig(mock_data=True, vocab_size=50), 1, 50)
    (stream,) = corpus.train.values()
    assert (
        isinstance(stream.reader, SyntheticReader)
        and corpus.validation["valid"][0][1].tokens_per_epoch > 0
    )
    loader = Loader(
        fresh_mixture([(1.0, stream)], 4096),
        micro_batch_size=1,
        global_batch_tokens=8192,
        dp_rank=0,
        dp_size=1,
        vocab_size=50,
    )
    batch = loader.read(0)[0]
    assert batch.tokens.max() < 50 and batch.num_targets > 4000


def test_a_path_with_an_equals_sign_is_no_name(tmp_path):
    web, held = (
        write(tmp_path / name, [[n] * 30] * 40)[0] for n, name in enumerate(("web", "lr=3"))
    )
    corpus = open_corpus(DataConfig(train_data_path=[web], valid_data_path=[held]), 1, 100)
    assert set(corpus.validation) == {"valid"}
    named = open_corpus(DataConfig(train_data_path=[web], valid_data_path=[f"x={held}"]), 1, 100)
    assert set(named.validation) == {"x"}


def test_windows_to_skip():
    assert parse_windows(["120B:121B", "1Ki:2Ki"]) == [(1024, 2048), (120 * 10**9, 121 * 10**9)]
    for words, message in (
        (["5"], "must be START:END"),
        (["5:5"], "END above START"),
        (["a:b"], "no token count"),
        (["1:5", "4:9"], "windows overlap"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_windows(words)
