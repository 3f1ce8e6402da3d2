"""Values of columns, lines and files that are no documents are named by their place."""

import gzip
import json
import re

import hypothesis
import numpy as np
import pyarrow
import pytest
from hypothesis import strategies
from pyarrow import parquet

from tests.unit.test_preprocess import lines, null, write
from tools.preprocess_data import Arguments, preprocess
from tools.preprocessing import tables
from tools.preprocessing.ids_files import _parse_lines
from tools.preprocessing.json_documents import NAMES, text_of
from tools.preprocessing.text_files import read_documents, read_pieces
from tools.train_tokenizer import sample_texts

MARK = b"\xef\xbb\xbf"


def write_parquet(path, column):
    parquet.write_table(pyarrow.table({"text": column}), path)
    return path


def not_utf8(*values):
    """A column of texts made of bytes that nobody has checked."""
    ends = np.cumsum([0, *map(len, values)]).astype(np.int32)
    buffers = [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(b"".join(values))]
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), buffers)


def test_rows_of_parquet_that_are_not_utf8_are_named_or_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PARQUET_ROWS", 2)
    path = write_parquet(
        tmp_path / "x.parquet", not_utf8(b"1", b"2", b"\xff\xfe", b"3", b"4 \xe4", b"5")
    )
    with pytest.raises(
        ValueError, match=r"x.parquet:3: not UTF-8 \(invalid start byte at byte 0\). Fix"
    ):
        null(tmp_path, path)
    documents, summary = null(tmp_path, path, skip_bad_lines=True)
    assert documents == [[1], [2], [3], [5]], documents
    assert summary.bad == 2, summary.bad


def test_words_of_a_dictionary_that_are_not_utf8_are_named(tmp_path):
    words = not_utf8(b"1", b"\xff")
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1, None, 0]), words)
    values = tables._column_values("x", "text", column)
    assert values[0] == values[3] == "1"
    assert "not UTF-8" in values[1].reason and values[2] is None


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
)
def test_every_kind_of_text_column_is_read(tmp_path, kind):
    texts = ["1", "2 3", "", "1"] * 200
    path = write_parquet(tmp_path / "x.parquet", pyarrow.array(texts).cast(kind))
    expected = [
        [int(word) for word in text.split()]
        for text in parquet.read_table(path)["text"].to_pylist()
        if text
    ]
    assert null(tmp_path, path)[0] == expected


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.list_(pyarrow.uint16()),
        pyarrow.large_list(pyarrow.int64()),
        pyarrow.list_(pyarrow.int32(), 2),
    ],
)
def test_every_kind_of_list_column_is_read_as_ids(tmp_path, kind):
    rows = [[1, 2], [3, 4], [5, 6]] * 200
    path = write_parquet(tmp_path / "x.parquet", pyarrow.array(rows, kind))
    assert null(tmp_path, path)[0] == parquet.read_table(path)["text"].to_pylist() == rows


@pytest.mark.parametrize("make", [pyarrow.list_view, pyarrow.large_list_view])
def test_views_of_lists_are_read_as_ids(make):
    values = tables._column_values(
        "x", "text", pyarrow.array([[1, 2], None, []], make(pyarrow.int32()))
    )
    assert values == [[1, 2], None, []]


@pytest.mark.parametrize(
    "rows, kind, message",
    [
        (
            [[1], [2, None]],
            pyarrow.list_(pyarrow.int32()),
            "2: must be a list of integers, and holds null. Fix",
        ),
        ([[1], None], pyarrow.list_(pyarrow.int32()), "2: null, not text. Fix"),
        ([[1, 2], None], pyarrow.list_(pyarrow.int32(), 2), "2: null, not text. Fix"),
        ([[1], [-1]], pyarrow.list_(pyarrow.int8()), "2: token id -1: must be in"),
        (
            [[1], [2**64 - 1]],
            pyarrow.list_(pyarrow.uint64()),
            f"2: token id {2**64 - 1}: must be in",
        ),
    ],
)
def test_lists_in_parquet_that_are_no_ids_are_named_or_left_out(tmp_path, rows, kind, message):
    path = write_parquet(tmp_path / "x.parquet", pyarrow.array(rows, kind))
    with pytest.raises(ValueError, match=f"x.parquet:{message}"):
        null(tmp_path, path)
    documents, summary = null(tmp_path, path, skip_bad_lines=True)
    assert documents == [rows[0]] and summary.bad == 1, (documents, summary.bad)


@pytest.mark.parametrize(
    "rows, kind",
    [
        ([[[1], [2]]], pyarrow.list_(pyarrow.list_(pyarrow.int32()))),
        ([[1.5]], pyarrow.list_(pyarrow.float32())),
        ([b"1"], pyarrow.binary()),
        ([True], pyarrow.bool_()),
        ([{"a": "1"}], pyarrow.struct([("a", pyarrow.string())])),
    ],
)
def test_columns_of_other_kinds_are_refused_as_a_whole(tmp_path, rows, kind):
    path = write_parquet(tmp_path / "x.parquet", pyarrow.array(rows, kind))
    with pytest.raises(
        ValueError, match="column 'text' holds .*: must be text, or lists of integers. Fix"
    ):
        null(tmp_path, path, skip_bad_lines=True)


@pytest.mark.parametrize("value", [True, 5, 0.5, None, [1], {"a": "b"}])
def test_a_value_of_another_type_is_called_what_it_is(value):
    with pytest.raises(ValueError, match=rf"^key 'body' is {NAMES[type(value)]}, not text. Fix"):
        text_of(json.loads(json.dumps({"body": value})), "body", lists=False)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("x.txt", b"1 2", [[1, 2]]),
        ("x.jsonl", lines("1 2", "3").encode(), [[1, 2], [3]]),
        ("x.json", json.dumps([{"text": "1 2"}, {"text": "3"}], indent=1).encode(), [[1, 2], [3]]),
        ("x.ids", b"1 2\n3\n", [[1, 2], [3]]),
        ("x.csv", b"text,id\n1 2,x\n3,y\n", [[1, 2], [3]]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name, content, expected, packed):
    data = MARK + content
    path = write(tmp_path / f"{name}{'.gz' * packed}", gzip.compress(data) if packed else data)
    assert null(tmp_path, path)[0] == expected


def test_only_the_beginning_of_a_file_has_a_byte_order_mark(tmp_path):
    path = write(tmp_path / "x.txt", MARK + "a\ufeffb".encode())
    (piece,) = read_pieces(path, 100, "text")
    assert read_documents(piece, "text", skip_bad=False).texts == ["a\ufeffb"]


def test_training_a_tokenizer_sees_no_byte_order_mark(tmp_path):
    path = write(tmp_path / "x.txt", MARK + b"abc")
    assert list(sample_texts([path], 100, 1, "text")) == ["abc"]


IDS_LINE = re.compile(r"\d+(?:(?:\s*,\s*|\s+)\d+)*")


def ids_of_line(line, vocab_size):
    """What a line of .ids means, by a regular expression; None where it is no list of ids."""
    text = line.strip()
    inner = text[1:-1].strip() if len(text) > 1 and text[0] == "[" and text[-1] == "]" else text
    if inner and not IDS_LINE.fullmatch(inner):
        return None
    ids = [int(word) for word in re.findall(r"\d+", inner)]
    return ids if all(number < vocab_size for number in ids) else None


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(strategies.text("019 ,[]\t\n", max_size=30))
@hypothesis.example("[1, 2]\n[[1], 2]\n[1\n1]\n][\n[]\n,\n1,\n1,,1\n1 , 1\n[ 1 ] 1\n100\n")
def test_lines_of_ids_mean_what_a_regular_expression_says(text):
    ids, lengths = _parse_lines(np.frombuffer(text.encode(), dtype=np.uint8), 100)
    expected = [ids_of_line(line, 100) for line in text.split("\n") if line.strip()]
    assert lengths.tolist() == [-1 if found is None else len(found) for found in expected], text
    assert ids.tolist() == [number for found in expected for number in found or []], text


@pytest.fixture
def rows():
    return [
        ["0", '1, 2\n"three"', "x"],
        ["1", " é\t\r\n", ""],
        ["2", "", "y"],
        ["3", "z" * 200_000, "日本"],
    ]


@pytest.mark.parametrize("delimiter, name", [(",", "x.csv"), ("\t", "x.tsv")])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_table_in_text_gives_what_pyarrow_reads(
    tmp_path, rows, delimiter, name, newline, monkeypatch
):
    from pyarrow import csv

    monkeypatch.setattr(tables, "CSV_BLOCK", 50)
    quoted = [["id", "text", "more"], *rows]
    text = newline.join(
        delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in quoted
    )
    path = write(tmp_path / name, text.encode())
    found = csv.read_csv(
        path,
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types={"text": pyarrow.string()}),
    )["text"].to_pylist()
    texts = [
        text
        for piece in read_pieces(path, 10, "text")
        for text in read_documents(piece, "text", skip_bad=False).texts
    ]
    assert texts == found == [row[1] for row in rows]


@pytest.mark.parametrize(
    "bad, message",
    [
        (b"2,x,\n", r"row 2: 3 fields, but the first line names 2. Fix: quotes"),
        (b"2\n", r"row 2: 1 fields, but the first line names 2"),
        (b"2,\xe4\n", r"row 2: not UTF-8 \(byte 0xe4 at character 0\). Fix"),
        (b'2,"a"b\n', r"row 2: not a row \(.*\). Fix"),
    ],
)
def test_rows_of_a_table_in_text_that_are_none_are_named_or_left_out(tmp_path, bad, message):
    path = write(tmp_path / "x.csv", b"id,text\n1,1\n" + bad + b"\n3,3\n")
    with pytest.raises(ValueError, match=f"x.csv, {message}"):
        null(tmp_path, path)
    documents, summary = null(tmp_path, path, skip_bad_lines=True)
    assert documents == [[1], [3]] and summary.bad == 1, (documents, summary.bad)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'text\n1\n"2\n3\n4\n', "x.csv: ends inside a quoted field .*Fix"),
        (b"body,id\n1,2\n", r"x.csv: no column 'text' \(found: body, id\). Fix: --json-keys"),
        (b"text,text\n1,2\n", "x.csv: more than one column 'text'"),
        (b"\xff\xfet\0e\0\n", "x.csv: no column 'text'"),
    ],
)
def test_a_broken_table_in_text_is_refused_as_a_whole(tmp_path, content, message):
    """A quote that stays open swallows the rest of the file: too much to leave out."""
    with pytest.raises(ValueError, match=message):
        null(tmp_path, write(tmp_path / "x.csv", content), skip_bad_lines=True)


def test_a_parquet_file_with_two_columns_of_the_name_is_refused(tmp_path):
    columns = [pyarrow.array(["1"]), pyarrow.array(["2"])]
    table = pyarrow.Table.from_arrays(columns, names=["text", "text"])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet: more than one column 'text' .*Fix: --json"):
        null(tmp_path, tmp_path / "x.parquet")


def test_a_corpus_of_one_token_documents_is_called_what_it_is(tmp_path, capsys):
    from tools.inspect_data import main as inspect_data
    from tools.preprocess_data import main

    path = write(tmp_path / "x.jsonl", lines(*["7"] * 30))
    documents, summary = null(tmp_path, path)
    assert len(documents) == summary.single == 30
    command = [
        "--input",
        str(path),
        "--output-prefix",
        str(tmp_path / "one"),
        "--tokenizer-type",
        "NullTokenizer",
    ]
    command += ["--vocab-size", "9"]
    warning = (
        "warning: every document has one token, so that none has a target with document masking"
    )
    assert main(command) == 0
    assert warning in capsys.readouterr().out
    assert inspect_data(["--data-path", str(tmp_path / "one")]) == 0
    assert warning in capsys.readouterr().out
    assert main([*command, "--append-eod", "--overwrite"]) == 0
    assert "one token" not in capsys.readouterr().out


def test_some_documents_of_one_token_are_counted(tmp_path, capsys):
    from tools.inspect_data import main as inspect_data

    path = write(tmp_path / "x.jsonl", lines("1", "2 3", "", "4"))
    settings = {"tokenizer_type": "NullTokenizer", "vocab_size": 9}
    summary = preprocess(
        Arguments(input=[str(path)], output_prefix=str(tmp_path / "c"), **settings)
    )
    assert summary.single == 2
    assert inspect_data(["--data-path", str(tmp_path / "c")]) == 0
    assert (
        "2 documents have one token, and no target with document masking" in capsys.readouterr().out
    )
