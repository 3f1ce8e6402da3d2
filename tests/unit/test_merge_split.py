"""tools.merge_datasets and tools.split_dataset: each undoes the other; tokenizers do not mix."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from data import idx_format
from data.idx_format import read_index, read_side_file
from data.writers import indexed_writer
from data.writers.indexed_writer import IndexedWriter
from tests.unit.test_preprocess import ROOT
from tools.merge_datasets import Arguments as MergeArguments
from tools.merge_datasets import merge
from tools.split_dataset import Arguments as SplitArguments
from tools.split_dataset import main as split_main
from tools.split_dataset import split

TOKENIZER = {"type": "NullTokenizer", "vocab_size": 300, "fingerprint": "f"}


def write(prefix, documents, dtype=np.uint16, tokenizer=TOKENIZER, text=None):
    with IndexedWriter(str(prefix), dtype) as writer:
        for ids in documents:
            writer.add_document(ids)
        writer.finish(tokenizer, text)
    return str(prefix)


def files(prefix):
    return [open(f"{prefix}.{end}", "rb").read() for end in ("bin", "idx", "json")]


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 11])
def test_split_and_merged_again_is_the_same(tmp_path, parts):
    whole = write(tmp_path / "whole", [[i % 300] * (i * 7 % 23) for i in range(200)])
    prefixes = split(SplitArguments(input=whole, output_prefix=str(tmp_path / "part"), parts=parts))
    assert [prefix[len(str(tmp_path)) :] for prefix in prefixes] == (
        [f"/part_{i}" for i in range(parts)]
        if parts < 11
        else [f"/part_{i:02d}" for i in range(parts)]
    )
    tokens = [read_index(prefix).num_tokens for prefix in prefixes]
    assert max(tokens) - min(tokens) <= 2 * 22 and sum(tokens) == read_index(whole).num_tokens
    assert read_side_file(prefixes[0])["tokenizer"] == TOKENIZER
    merge(MergeArguments(input=prefixes, output_prefix=str(tmp_path / "merged")))
    assert files(tmp_path / "merged") == files(whole)


def test_how_text_became_ids_is_kept(tmp_path, capsys):
    text = {"append_eod": True, "prepend_bos": False}
    whole = write(tmp_path / "whole", [[1, 2], [3, 4]], text=text)
    parts = split(SplitArguments(input=whole, output_prefix=str(tmp_path / "part"), parts=2))
    assert [read_side_file(prefix)["text"] for prefix in parts] == [text, text]
    merge(MergeArguments(input=parts, output_prefix=str(tmp_path / "merged")))
    assert files(tmp_path / "merged") == files(whole)
    assert capsys.readouterr().err == ""


def test_inputs_whose_text_became_ids_in_two_ways_are_named(tmp_path, capsys):
    a = write(tmp_path / "a", [[1]], text={"append_eod": True})
    b = write(tmp_path / "b", [[2]])
    c = write(tmp_path / "c", [[3]], text={"append_eod": False})
    merge(MergeArguments(input=[b, a], output_prefix=str(tmp_path / "one")))
    assert "text" not in read_side_file(str(tmp_path / "one"))
    assert capsys.readouterr().err == "", "b does not say"
    merge(MergeArguments(input=[a, b, c], output_prefix=str(tmp_path / "two")))
    assert "text" not in read_side_file(str(tmp_path / "two"))
    message = (
        f"warning: text became ids with {{'append_eod': True}} for {a}, and with "
        f"{{'append_eod': False}} for {c}: the output's .json names neither.\n"
    )
    assert capsys.readouterr().err == message


def test_refuses(tmp_path):
    a = write(tmp_path / "a", [[1], [2] * 99, [3]])
    other = TOKENIZER | {"fingerprint": "g"}
    b = write(tmp_path / "b", [[1]], tokenizer=other)
    c = write(tmp_path / "c", [[1]], np.int32)
    unknown = write(tmp_path / "unknown", [[5]], tokenizer=None)
    before = sorted(tmp_path.iterdir())
    for inputs, message in (
        ([a, b], "b: made with the tokenizer .*'g'.*but .*a with .*Fix"),
        ([a, c], "c: dtype int32, but .* is written as uint16. Fix"),
        ([a, str(tmp_path / "none")], "none: no .*none.json that names its tokenizer"),
        ([a, unknown], "unknown: no .*unknown.json that names its tokenizer. Fix"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(MergeArguments(input=inputs, output_prefix=str(tmp_path / "out")))
    for parts, message in (
        (0, r"parts = 0: must be in \[1, 3\]"),
        (4, r"parts = 4: must be in \[1, 3\].*Fix"),
        (3, "parts = 3: a document of 99 tokens is longer than a part of 33. Fix"),
    ):
        with pytest.raises(ValueError, match=message):
            split(SplitArguments(input=a, output_prefix=str(tmp_path / "out"), parts=parts))
    assert sorted(tmp_path.iterdir()) == before
    merge(
        MergeArguments(
            input=[a, unknown], output_prefix=str(tmp_path / "out"), accept_unknown_tokenizers=True
        )
    )
    assert read_side_file(str(tmp_path / "out"))["tokenizer"] is None


def test_merging_holds_a_few_bytes_per_document(tmp_path, monkeypatch):
    for module in (idx_format, indexed_writer):
        monkeypatch.setattr(module, "COPY_BYTES", 64 << 10)
    documents = 50_000
    a = write(tmp_path / "a", [[1]] * documents)
    merge(MergeArguments(input=[a], output_prefix=str(tmp_path / "out")))  # compiles
    tracemalloc.start()
    merge(MergeArguments(input=[a], output_prefix=str(tmp_path / "out"), overwrite=True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 12 of the output and 12 of the input, with room to grow; lists of Python integers would be
    # over 60.
    assert peak < 40 * documents + 4 * (64 << 10)


def test_command_lines(tmp_path, capsys):
    a = write(tmp_path / "a", [[1, 2], [3]])
    b = write(tmp_path / "b", [[4]])
    c = str(tmp_path / "c")
    d = str(tmp_path / "d")
    command = [sys.executable, "-m", "tools.merge_datasets", "--input", a, b, "--output-prefix", c]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "3 documents, 4 tokens of 2 inputs" in done.stdout, done.stderr
    assert split_main(["--input", c, "--output-prefix", d, "--parts", "2"]) == 0
    assert "wrote 2 parts" in capsys.readouterr().out
    assert split_main(["--input", c, "--output-prefix", d, "--parts", "9"]) == 2
    assert "error: parts = 9" in capsys.readouterr().err
