"""Documents without a token, as Megatron-Core's builder writes them: of no sequence, anywhere."""

import numpy as np
import pytest
import torch

from data.config import DataConfig
from data.idx_format import read_index
from data.indexed import IndexedReader
from data.packing.place import Place
from data.sources import open_corpus
from data.stream import DocumentStream
from tools.audit_data import Counter
from tools.inspect_data import main as inspect_data
from tools.merge_datasets import Arguments as MergeArguments
from tools.merge_datasets import merge
from tools.split_dataset import Arguments as SplitArguments
from tools.split_dataset import split

EMPTY_ENDS = [[], [[1, 2], [3]], [], [[4]], [], []]
"""Documents as lists of sequences; the last one begins behind the last sequence."""
AS_MANY_AS_SEQUENCES = [[], [[1, 2], [3]], [[4, 5, 6]], [], [[7], [8]]]
"""Five documents in five sequences, but document i is not sequence i."""
CASES = [EMPTY_ENDS, AS_MANY_AS_SEQUENCES]


@pytest.fixture(scope="module")
def megatron():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def build(megatron, prefix, documents):
    """Write the documents with Megatron-Core's own builder -> the prefix."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def flat(documents):
    return [sum(sequences, []) for sequences in documents]


def whole(prefix):
    reader = IndexedReader(prefix)
    lengths = reader.document_lengths.tolist()
    return [reader.read(number, 0, length).tolist() for number, length in enumerate(lengths)]


@pytest.mark.parametrize("documents", CASES)
def test_documents_are_read_as_they_were_written(megatron, tmp_path, documents):
    assert whole(build(megatron, tmp_path / "c", documents)) == flat(documents)


def test_an_empty_document_amid_spans_gives_nothing(megatron, tmp_path):
    reader = IndexedReader(build(megatron, tmp_path / "c", EMPTY_ENDS))
    out = np.empty(4, dtype=np.int64)
    lengths = np.array([3, 0, 1, 0])
    reader.read_spans(np.array([1, 5, 3, 0]), np.zeros(4, dtype=np.int64), lengths, out)
    assert out.tolist() == [1, 2, 3, 4], out


@pytest.mark.parametrize("documents", CASES)
def test_a_stream_gives_each_document_that_has_tokens_once(megatron, tmp_path, documents):
    reader = IndexedReader(build(megatron, tmp_path / "c", documents))
    stream = DocumentStream(reader, None, seed=3)
    found, offsets, lengths = stream.spans(0, stream.tokens_per_epoch)
    drawn = [reader.read(*span).tolist() for span in zip(found, offsets, lengths, strict=True)]
    assert sorted(drawn) == sorted(ids for ids in flat(documents) if ids)


@pytest.mark.parametrize(
    "words, expected",
    [
        ("{}", [1, 2, 3, 4]),
        ("{}[2:]", [1, 2, 3]),
        ("{}[0:2]", [4]),
    ],
)
def test_ranges_of_lengths_leave_empty_documents_out(megatron, tmp_path, words, expected):
    path = words.format(build(megatron, tmp_path / "c", EMPTY_ENDS))
    corpus = open_corpus(DataConfig(data_path=[path], split="1"), 5, 100)
    (stream,) = corpus.train.values()
    assert sorted(stream.read(0, stream.tokens_per_epoch).tolist()) == expected
    assert list(corpus.empty.values()) == [4], corpus.empty


@pytest.mark.parametrize("documents", CASES)
def test_inspect_data_shows_samples_of_all(megatron, tmp_path, documents, capsys):
    prefix = build(megatron, tmp_path / "c", documents)
    assert inspect_data(["--data-path", prefix, "--samples", "9"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.count("  document ") == len(documents), out
    for ids in flat(documents):
        assert not ids or f"    {' '.join(map(str, ids))}\n" in out, (ids, out)


@pytest.mark.parametrize("documents", CASES)
def test_merging_and_splitting_keep_them(megatron, tmp_path, documents):
    prefix = build(megatron, tmp_path / "c", documents)
    merged = str(tmp_path / "merged")
    merge(
        MergeArguments(input=[prefix, prefix], output_prefix=merged, accept_unknown_tokenizers=True)
    )
    assert whole(merged) == flat(documents) * 2
    parts = split(SplitArguments(input=merged, output_prefix=str(tmp_path / "part"), parts=2))
    assert sum((whole(part) for part in parts), []) == flat(documents) * 2
    assert all(read_index(part).num_tokens for part in parts)


def test_a_part_without_a_token_is_refused(megatron, tmp_path):
    prefix = build(megatron, tmp_path / "c", [[[1, 2, 3]], [], []])
    with pytest.raises(
        ValueError, match=r"parts = 2: part 1 would hold no token. Fix: fewer parts"
    ):
        split(SplitArguments(input=prefix, output_prefix=str(tmp_path / "part"), parts=2))
    assert not list(tmp_path.glob("part*"))


@pytest.mark.parametrize("documents", CASES)
def test_the_audit_counts_each_token_once(megatron, tmp_path, documents):
    stream = DocumentStream(IndexedReader(build(megatron, tmp_path / "c", documents)), None, seed=3)
    counter = Counter(stream)
    epoch = stream.tokens_per_epoch
    counter.add(np.array([[0, epoch]]), counter.drawn)
    assert counter.drawn.tolist() == [1] * epoch
    assert counter.expected(Place(epoch)).tolist() == [1] * epoch
