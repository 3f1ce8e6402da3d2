"""Token files: byte-compatible with Megatron-Core, whole or not at all, damage refused."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from data import idx_format
from data.batch import read_batch
from data.idx_format import optimal_dtype, read_side_file
from data.indexed import IndexedReader
from data.mixture import fresh_mixture
from data.stream import DocumentStream
from data.writers import indexed_writer
from data.writers.indexed_writer import IndexedWriter

DTYPES = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]
DOCUMENTS = [[5, 6, 7], [], [1], list(range(100)), [127, 0]]


@pytest.fixture(scope="module")
def megatron():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def write(prefix, documents=DOCUMENTS, dtype=np.uint16, tokenizer=None):
    with IndexedWriter(str(prefix), dtype) as writer:
        for ids in documents:
            writer.add_document(ids)
        return writer.finish(tokenizer)


def whole(reader):
    return [reader.read(i, 0, int(n)).tolist() for i, n in enumerate(reader.document_lengths)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bytes_as_megatron_core(megatron, tmp_path, dtype):
    ours = str(tmp_path / "ours")
    theirs = str(tmp_path / "theirs")
    write(ours, dtype=dtype)
    builder = megatron.IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
    for ids in DOCUMENTS:
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
    builder.finalize(f"{theirs}.idx")
    for end in ("bin", "idx"):
        assert Path(f"{ours}.{end}").read_bytes() == Path(f"{theirs}.{end}").read_bytes()
    assert whole(IndexedReader(theirs)) == DOCUMENTS
    dataset = megatron.IndexedDataset(ours)
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert IndexedReader(ours).dtype == dtype


@pytest.mark.parametrize("multimodal", [False, True])
def test_documents_of_several_sequences(megatron, tmp_path, multimodal):
    prefix = str(tmp_path / "several")
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32, multimodal=multimodal)
    for document in ([[1, 2], [3]], [[4, 5, 6], [7], [8, 9]]):
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    reader = IndexedReader(prefix)
    assert whole(reader) == [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    assert reader.read(1, 2, 3).tolist() == [6, 7, 8]
    with IndexedWriter(str(tmp_path / "merged"), np.int32) as writer:
        writer.add_document([99])
        writer.append_from(prefix)
        writer.finish()
    assert whole(IndexedReader(str(tmp_path / "merged"))) == [[99], [1, 2, 3], [4, 5, 6, 7, 8, 9]]
    assert len(megatron.IndexedDataset(str(tmp_path / "merged"))) == 6
    assert read_side_file(str(tmp_path / "merged"))["max_token_id"] == 99


def test_merging_gives_the_bytes_of_one_writer(tmp_path):
    write(tmp_path / "one", DOCUMENTS + DOCUMENTS[:2])
    write(tmp_path / "a"), write(tmp_path / "b", DOCUMENTS[:2])
    with IndexedWriter(str(tmp_path / "merged"), np.uint16) as writer:
        writer.append_from(str(tmp_path / "a")), writer.append_from(str(tmp_path / "b"))
        writer.finish()
    for end in ("bin", "idx", "json"):
        assert (tmp_path / f"one.{end}").read_bytes() == (tmp_path / f"merged.{end}").read_bytes()
    with (
        IndexedWriter(str(tmp_path / "other"), np.int32) as writer,
        pytest.raises(ValueError, match="dtype uint16"),
    ):
        writer.append_from(str(tmp_path / "a"))


def test_reader_copies_and_describes(tmp_path):
    outputs = write(tmp_path / "c", tokenizer={"type": "NullTokenizer"})
    assert [Path(path).suffix for path in outputs] == [".bin", ".json", ".idx"]
    reader = IndexedReader(str(tmp_path / "c"))
    assert (reader.num_documents, reader.num_tokens) == (5, 106)
    assert reader.document_lengths.dtype == np.int32 and reader.document_lengths.tolist() == [
        3,
        0,
        1,
        100,
        2,
    ]
    assert reader.token_range() == (0, 127)
    tokens = reader.read(3, 10, 5)
    reader.close()
    assert tokens.dtype == np.int64 and tokens.tolist() == [10, 11, 12, 13, 14]
    side = json.loads((tmp_path / "c.json").read_text())
    assert side == {
        "tokenizer": {"type": "NullTokenizer"},
        "dtype": "uint16",
        "documents": 5,
        "tokens": 106,
        "max_token_id": 127,
    }


def test_fingerprint_sees_lengths_and_tokens(tmp_path):
    for name, documents in (
        ("a", [[1, 2], [3]]),
        ("b", [[1, 2], [3]]),
        ("c", [[1], [2, 3]]),
        ("d", [[1, 2], [4]]),
    ):
        write(tmp_path / name, documents)
    a, b, c, d = (IndexedReader(str(tmp_path / name)).fingerprint() for name in "abcd")
    assert a == b and len({a, c, d}) == 3


def test_long_documents_become_several_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_writer, "LONGEST_SEQUENCE", 4)
    write(tmp_path / "long", [list(range(n)) for n in range(10)])
    assert whole(IndexedReader(str(tmp_path / "long"))) == [list(range(n)) for n in range(10)]
    assert idx_format.read_sequences(str(tmp_path / "long"))[0].max() == 4


def test_optimal_dtype_is_megatrons(megatron):
    for size in (1, 65499, 65500, 65536, 150_000):
        assert optimal_dtype(size) == megatron.DType.optimal_dtype(size)


def test_abort_keeps_the_earlier_output(tmp_path):
    write(tmp_path / "c", [[1, 2, 3]])
    with (
        pytest.raises(RuntimeError, match="interrupted"),
        IndexedWriter(str(tmp_path / "c"), np.uint16) as writer,
    ):
        writer.add_document([9] * 1000)
        raise RuntimeError("interrupted")
    assert whole(IndexedReader(str(tmp_path / "c"))) == [[1, 2, 3]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx", "c.json"]


def test_writer_refuses(tmp_path):
    with pytest.raises(ValueError, match="no documents. Fix"):
        write(tmp_path / "c", [])
    for bad, dtype in ((70_000, np.uint16), (-1, np.int32), (200, np.int8)):
        with pytest.raises(
            ValueError,
            match=rf"token id {bad}: must be in \[0, \d+\] for {np.dtype(dtype).name}.*Fix",
        ):
            write(tmp_path / "c", [[1], [3, bad]], dtype)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write there.*Fix"):
        IndexedWriter(str(tmp_path / "file" / "c"), np.int32)


def damage(tmp_path, end, change):
    path = tmp_path / f"c.{end}"
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "end, change, message",
    [
        ("bin", lambda b: b[:-2], r"c.bin: 210 bytes, but c.idx describes 212: truncated.*Fix"),
        ("bin", lambda b: b + b"\0", r"213 bytes, but c.idx describes 212: too long.*Fix"),
        ("idx", lambda b: b"X" + b[1:], "not an index of version 1.*Fix"),
        ("idx", lambda b: b[:20], "not an index|damaged"),
        ("idx", lambda b: b"", "not an index of version 1.*Fix"),
        ("idx", lambda b: b[:9] + struct.pack("<Q", 2) + b[17:], "not an index of version 1.*Fix"),
        (
            "idx",
            lambda b: b[:17] + b"\x07" + b[18:],
            "dtype code 7: token ids must be integers.*Fix",
        ),
        ("idx", lambda b: b[:17] + b"\x63" + b[18:], "dtype code 99.*Fix"),
        ("idx", lambda b: b[:-8], "bytes, but its header asks for 142: it is damaged. Fix"),
        ("idx", lambda b: b[:18] + struct.pack("<Q", 2**60) + b[26:], "it is damaged. Fix"),
        (
            "idx",
            lambda b: b[:34] + struct.pack("<i", 4) + b[38:],
            "lengths and offsets disagree.*Fix",
        ),
        ("idx", lambda b: b[:-8] + struct.pack("<q", 4), "document ranges do not cover.*Fix"),
        ("idx", lambda b: b[:18] + struct.pack("<QQ", 0, 1) + b"\0" * 8, "zero documents. Fix"),
    ],
)
def test_damage_is_refused(tmp_path, end, change, message):
    write(tmp_path / "c")
    damage(tmp_path, end, change)
    with pytest.raises(ValueError, match=message):
        IndexedReader(str(tmp_path / "c"))


def test_missing_files(tmp_path):
    write(tmp_path / "c")
    with pytest.raises(ValueError, match="no such file. Fix"):
        IndexedReader(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="The prefix has no ending"):
        IndexedReader(str(tmp_path / "c.bin"))
    (tmp_path / "c.bin").unlink()
    with pytest.raises(ValueError, match="c.bin: no such file"):
        IndexedReader(str(tmp_path / "c"))


SIDE = '{"documents": 1, "tokens": 2, "max_token_id": 3, "tokenizer": null}'


def test_side_file_of_someone_else_is_ignored(tmp_path):
    assert read_side_file(str(tmp_path / "c")) is None
    (tmp_path / "d.json").mkdir()
    assert read_side_file(str(tmp_path / "d")) is None
    # Other JSON, and a corpus of a text per line.
    for text in ("[]", '{"documents": 1}', '{"text": "a"}\n{"text": "b"}\n', '\ufeff{"a": 1}'):
        (tmp_path / "c.json").write_text(text)
        assert read_side_file(str(tmp_path / "c")) is None, text
    (tmp_path / "c.json").write_text(SIDE)
    assert read_side_file(str(tmp_path / "c")) == json.loads(SIDE)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        SIDE[:-9].encode(),
        bytes(len(SIDE)),
        b"\xff" + SIDE.encode(),
        SIDE.encode() * 2,
        SIDE.replace("2", '"2"').encode(),
        SIDE.replace("null", '"Llama"').encode(),
    ],
)
def test_a_damaged_side_file_is_refused(tmp_path, content):
    """It is no absent one: that would switch off the comparison of tokenizers."""
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.json: damaged \(.*Fix: copy it again"):
        read_side_file(str(tmp_path / "c"))


def test_a_side_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(ValueError, match=r"c\.json: cannot be read \(Permission denied\). Fix"):
        read_side_file(str(tmp_path / "c"))


def test_beyond_two_to_the_31(tmp_path):
    """Tokens, bytes and stream positions over epochs; the files are sparse."""
    longest = idx_format.LONGEST_SEQUENCE
    first = 100
    lengths = np.array(
        [first, longest, longest, 7], dtype=np.int32
    )  # the second document is two sequences
    starts = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])
    with open(tmp_path / "far.idx", "wb") as file:
        file.write(idx_format.HEADER.pack(idx_format.MAGIC, 1, 4, 4, 4))
        lengths.tofile(file)
        (starts[:-1] * 4).tofile(file)
        np.array([0, 1, 3, 4], dtype=np.int64).tofile(file)
    with open(tmp_path / "far.bin", "wb") as file:
        file.truncate(int(starts[-1]) * 4)
        for position, ids in (
            (99, [5, 6, 7]),
            (int(starts[2]) - 1, [11, 12]),
            (int(starts[3]) - 2, [21, 22, 23, 24]),
        ):
            file.seek(position * 4)
            np.array(ids, dtype=np.int32).tofile(file)
    reader = IndexedReader(str(tmp_path / "far"))
    assert (
        reader.document_lengths.tolist() == [first, 2 * longest, 7]
        and reader.num_tokens == starts[-1] > 2**32
    )
    assert reader.read(0, 99, 1).tolist() == [5] and reader.read(1, 0, 2).tolist() == [6, 7]
    assert reader.read(1, longest - 1, 2).tolist() == [11, 12]
    assert reader.read(1, 2 * longest - 2, 2).tolist() == [21, 22]
    assert reader.read(2, 0, 3).tolist() == [23, 24, 0]
    stream = DocumentStream(reader, None, seed=1)
    for epoch in range(3):
        documents, offsets, counts = stream.spans(
            epoch * stream.tokens_per_epoch, stream.tokens_per_epoch
        )
        assert sorted(documents.tolist()) == [0, 1, 2]
        assert counts.tolist() == reader.document_lengths[documents].tolist()
        begin = epoch * stream.tokens_per_epoch + int(counts[: documents.tolist().index(1)].sum())
        assert stream.read(begin + longest - 1, 2).tolist() == [11, 12]
    packed = fresh_mixture([(1.0, stream)], 2**20, "best_fit")
    samples = packed.packers[0].samples_before(stream.tokens_per_epoch)
    assert packed.tokens(samples) == {"0": stream.tokens_per_epoch}
    far = [
        sample
        for sample in packed.samples(range(samples - 3, samples))
        if sample.intervals[0, 0] > 2**31
    ]
    assert far and read_batch(far, 2**20, [(0, 8)]).tokens.shape == (8,)
