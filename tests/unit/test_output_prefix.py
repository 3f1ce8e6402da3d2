"""What is replaced at an output prefix: no input, no foreign file, nothing without --overwrite."""

import hashlib
import json
import os

import numpy as np
import pytest

from data.indexed import IndexedReader, OpenFiles
from data.writers.indexed_writer import IndexedWriter
from data.writers.output_prefix import check_output
from tests.unit.test_preprocess import lines, null
from tools import preprocess_data
from tools.merge_datasets import Arguments as MergeArguments
from tools.merge_datasets import merge
from tools.split_dataset import Arguments as SplitArguments
from tools.split_dataset import split

TOKENIZER = {"type": "NullTokenizer", "vocab_size": 300, "fingerprint": "f"}


def write_pair(prefix, *documents):
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for ids in documents:
            writer.add_document(ids)
        writer.finish(TOKENIZER)
    return str(prefix)


def hashes(folder):
    """Every name below a folder, with what it holds or where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def read_all(prefix):
    reader = IndexedReader(str(prefix))
    lengths = reader.document_lengths.tolist()
    return [reader.read(number, 0, length).tolist() for number, length in enumerate(lengths)]


def preprocess_to(tmp_path, *inputs, **settings):
    return null(tmp_path, *inputs, **{"overwrite": False} | settings)[0]


def merge_to(tmp_path, inputs, output, **settings):
    inputs = [str(tmp_path / name) for name in inputs]
    merge(MergeArguments(input=inputs, output_prefix=str(tmp_path / output), **settings))


def split_to(tmp_path, source, output, parts=2, **settings):
    arguments = SplitArguments(
        input=str(tmp_path / source), output_prefix=str(tmp_path / output), parts=parts, **settings
    )
    return split(arguments)


def test_preprocess_replaces_a_finished_pair_only_when_asked(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(lines("1 2", "3"))
    assert preprocess_to(tmp_path, path) == [[1, 2], [3]]
    before = hashes(tmp_path)
    message = r"out/c.bin exists \(2 documents, 3 tokens\). Fix: another prefix, or --overwrite"
    with pytest.raises(ValueError, match=message):
        preprocess_to(tmp_path, path)
    assert hashes(tmp_path) == before
    path.write_text(lines("7"))
    assert preprocess_to(tmp_path, path, overwrite=True) == [[7]]


@pytest.mark.parametrize(
    "prefix, example", [("", "corpus"), (".", "corpus"), ("new/", "new/corpus"), ("/", "/corpus")]
)
def test_a_folder_as_a_prefix_is_refused_with_a_prefix_in_it(prefix, example):
    with pytest.raises(ValueError, match=f"is a folder; .* Fix: for example {example}[.]$"):
        check_output(prefix, overwrite=True)


def test_a_pair_that_another_run_finished_in_between_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text(lines("1 2", "3"))
    choose = preprocess_data.choose_encoder

    def finish_another(*arguments):
        write_pair(tmp_path / "out" / "c", [7])
        return choose(*arguments)

    monkeypatch.setattr(preprocess_data, "choose_encoder", finish_another)
    with pytest.raises(ValueError, match="c.bin exists .*--overwrite"):
        preprocess_to(tmp_path, path)
    assert read_all(tmp_path / "out" / "c") == [[7]]
    assert sorted(file.suffix for file in (tmp_path / "out").iterdir()) == [".bin", ".idx", ".json"]


def test_an_unfinished_publication_goes_on_without_being_asked(tmp_path):
    """Killed while publishing: the .bin is there, the .idx is not, and the progress is kept."""
    path = tmp_path / "x.jsonl"
    path.write_text(lines("1 2", "3"))
    preprocess_to(tmp_path, path)
    (tmp_path / "out" / "c.idx").unlink()
    with pytest.raises(ValueError, match="c.bin exists"):
        preprocess_to(tmp_path, path)
    state = {"bytes": 0, "sequences": 0, "documents": 0, "note": {}}
    (tmp_path / "out" / "c.progress.json").write_text(json.dumps(state))
    assert preprocess_to(tmp_path, path) == [[1, 2], [3]]


@pytest.mark.parametrize("overwrite", [False, True])
def test_preprocess_never_replaces_an_input(tmp_path, overwrite):
    """The .json beside the pair has the name of a corpus in JSON."""
    corpus = tmp_path / "out" / "c.json"
    corpus.parent.mkdir()
    corpus.write_text(lines("1 2"))
    (tmp_path / "link.json").symlink_to(corpus)
    before = hashes(tmp_path)
    for name in (corpus, tmp_path / "link.json", corpus.parent):
        with pytest.raises(
            ValueError, match=r"c.json would replace the input .*\.json. Fix: another prefix"
        ):
            preprocess_to(tmp_path, name, overwrite=overwrite)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize(
    "name, content",
    [
        ("c.json", '{"model_type": "llama"}'),
        ("c.bin", "weights of a model"),
        ("c.idx", "an index of something else"),
        ("c.progress.json", '{"epoch": 3}'),
    ],
)
def test_a_file_that_is_not_ours_is_kept_even_when_asked(tmp_path, name, content):
    path = tmp_path / "x.jsonl"
    path.write_text(lines("1 2"))
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir()
    foreign.write_text(content)
    with pytest.raises(
        ValueError, match=f"{name} is no file that these tools wrote, and is not replaced. Fix"
    ):
        preprocess_to(tmp_path, path, overwrite=True)
    assert [(file.name, file.read_text()) for file in (tmp_path / "out").iterdir()] == [
        (name, content)
    ]


def test_merging_replaces_only_when_asked(tmp_path):
    write_pair(tmp_path / "a", [1])
    write_pair(tmp_path / "b", [2])
    merge_to(tmp_path, ["a"], "out")
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match="out.bin exists.*--overwrite"):
        merge_to(tmp_path, ["a", "b"], "out")
    assert hashes(tmp_path) == before
    merge_to(tmp_path, ["a", "b"], "out", overwrite=True)
    assert read_all(tmp_path / "out") == [[1], [2]]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("output", ["a", "b", "../{}/a", "linked/a", "alias"])
def test_merging_into_an_input_is_refused(tmp_path, output, overwrite):
    folder = tmp_path / "in"
    write_pair(folder / "a", [1])
    write_pair(folder / "b", [2])
    (folder / "linked").symlink_to(folder)
    for end in ("bin", "idx", "json"):
        (folder / f"alias.{end}").symlink_to(folder / f"a.{end}")
    before = hashes(tmp_path)
    with pytest.raises(
        ValueError, match=r"would replace the input .*in/[ab].bin. Fix: another prefix"
    ):
        merge_to(folder, ["a", "b"], output.format("in"), overwrite=overwrite)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_splitting_onto_its_input_is_refused(tmp_path, overwrite):
    """Part 0 would replace the file that part 1 is read from."""
    write_pair(tmp_path / "c_0", [1], [2], [3], [4])
    before = hashes(tmp_path)
    with pytest.raises(
        ValueError, match=r"c_0.bin would replace the input .*c_0.bin. Fix: another prefix"
    ):
        split_to(tmp_path, "c_0", "c", overwrite=overwrite)
    assert hashes(tmp_path) == before


def test_parts_of_another_split_do_not_mix(tmp_path):
    write_pair(tmp_path / "a", *([number] for number in range(12)))
    split_to(tmp_path, "a", "p", parts=3)
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match="p_0.bin exists"):
        split_to(tmp_path, "a", "p", parts=3)
    for parts, remains in ((2, "p_2.idx"), (11, "p_0.idx")):
        with pytest.raises(
            ValueError, match=f"{remains} is a part of another split, and would remain"
        ):
            split_to(tmp_path, "a", "p", parts=parts, overwrite=True)
    assert hashes(tmp_path) == before
    assert len(split_to(tmp_path, "a", "p", parts=4, overwrite=True)) == 4


def test_open_readers_keep_the_files_that_were_replaced(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(lines("1 2 3"))
    preprocess_to(tmp_path, path)
    files = OpenFiles(1)
    reader = IndexedReader(str(tmp_path / "out" / "c"), files)
    assert reader.read(0, 0, 3).tolist() == [1, 2, 3]
    path.write_text(lines("7 8 9"))
    preprocess_to(tmp_path, path, overwrite=True)
    assert reader.read(0, 0, 3).tolist() == [1, 2, 3]
    other = IndexedReader(write_pair(tmp_path / "other", [5]), files)
    # The limit of open files closes the first pair, and its names lead to other files now.
    assert other.read(0, 0, 1).tolist() == [5]
    with pytest.raises(
        ValueError, match="c: its files were replaced or changed since they were opened. Fix"
    ):
        reader.read(0, 0, 3)


def test_the_command_answers_in_one_line(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text(lines("1 2"))
    words = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]
    words += ["--input", str(path), "--output-prefix", str(tmp_path / "c")]
    assert preprocess_data.main(words) == 0
    capsys.readouterr()
    assert preprocess_data.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "c.bin exists (1 documents, 2 tokens)" in line
