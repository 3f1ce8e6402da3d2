"""tools.preprocess_data: the same bytes for any number of workers; errors in one line, before any
output."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.idx_format import read_side_file
from data.indexed import IndexedReader
from tools.preprocess_data import Arguments, main, preprocess
from tools.preprocessing import tasks
from tools.preprocessing.find_files import find_files
from tools.preprocessing.input_kinds import EXTENSIONS
from tools.preprocessing.text_files import cut_into_pieces, read_documents

ROOT = Path(__file__).parents[2]


def null(tmp_path, *inputs, **settings):
    """Tokenize with NullTokenizer, over what an earlier call wrote -> (documents, summary)."""
    prefix = str(tmp_path / "out" / "c")
    summary = preprocess(
        Arguments(
            **{
                "input": [str(path) for path in inputs],
                "output_prefix": prefix,
                "tokenizer_type": "NullTokenizer",
                "vocab_size": 100,
                "overwrite": True,
            }
            | settings
        )
    )
    reader = IndexedReader(prefix)
    return [
        reader.read(i, 0, int(n)).tolist() for i, n in enumerate(reader.document_lengths)
    ], summary


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_inputs_of_all_kinds_in_order(tmp_path):
    write(tmp_path / "in" / "b.txt", "1 2\n3")
    write(
        tmp_path / "in" / "a" / "z.jsonl", lines("4", "", "5 6") + "\n" + json.dumps({"text": "7"})
    )
    write(tmp_path / "in" / "a" / "code.py", "8")
    write(tmp_path / "in" / "skipped.bin", "99")
    write(tmp_path / "in" / ".hidden.txt", "99"), write(tmp_path / "in" / ".git" / "x.txt", "99")
    write(tmp_path / "in" / "empty.txt", "")
    write(tmp_path / "x.text.txt", "9 10")
    documents, summary = null(
        tmp_path, tmp_path / "x.text.txt", tmp_path / "in", tmp_path / "in" / "b.txt"
    )
    assert documents == [[9, 10], [8], [4], [5, 6], [7], [1, 2, 3]]
    assert (summary.documents, summary.tokens, summary.empty, summary.files) == (
        6,
        10,
        2,
        5,
    )
    side = read_side_file(str(tmp_path / "out" / "c"))
    assert side["max_token_id"] == 10 and side["tokenizer"]["type"] == "NullTokenizer"
    documents, _ = null(tmp_path, tmp_path / "in", extensions=["txt"], append_eod=True)
    assert documents == [[1, 2, 3, 99]]
    documents, _ = null(
        tmp_path, write(tmp_path / "k.json", '{"body": "3", "text": "4"}'), json_keys=["body"]
    )
    assert documents == [[3]]


def test_pieces_of_a_file_hold_each_line_once(tmp_path):
    texts = [" ".join(str(j % 100) for j in range(i % 37)) + "é" for i in range(200)]
    path = write(tmp_path / "x.jsonl", lines(*texts))
    for size in (1, 7, 50, 1000, 10**6):
        pieces = cut_into_pieces(path, size)
        assert [
            text for piece in pieces for text in read_documents(piece, "text", skip_bad=False).texts
        ] == texts
    assert (
        len(cut_into_pieces(path, 1000)) > 3
        and len(cut_into_pieces(write(tmp_path / "x.txt", "1" * 9), 2)) == 1
    )


def test_result_does_not_depend_on_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASK_BYTES", 2000)  # many tasks for few lines
    path = write(
        tmp_path / "x.jsonl", lines(*(" ".join(str(j) for j in range(i % 90)) for i in range(400)))
    )
    for i in range(5):
        write(tmp_path / "texts" / f"{i}.txt", f"{i} " * 1000)
    for workers in (1, 2):
        null(tmp_path, path, tmp_path / "texts", workers=workers, append_eod=True)
        (tmp_path / "out").rename(tmp_path / f"workers{workers}")
    for end in ("bin", "idx", "json"):
        assert (tmp_path / f"workers1/c.{end}").read_bytes() == (
            tmp_path / f"workers2/c.{end}"
        ).read_bytes()


GOOD = lines("1 2")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", GOOD * 3 + "{oops\n" + GOOD, r"x.jsonl:4: not JSON .*--skip-bad-lines"),
        (
            "x.jsonl",
            GOOD + '{"body": "1"}\n',
            r"x.jsonl:2: no key 'text' \(found: body\). Fix: --json-keys",
        ),
        ("x.jsonl", GOOD + '{"text": 5}\n', r"x.jsonl:2: key 'text' is a number, not text.*Fix"),
        ("x.jsonl", GOOD + '{"text": 0.5}\n', r"x.jsonl:2: key 'text' is a number, not text.*Fix"),
        (
            "x.jsonl",
            GOOD + '{"text": true}\n',
            r"x.jsonl:2: key 'text' is true or false, not text.*Fix",
        ),
        ("x.jsonl", GOOD + '{"text": null}\n', r"x.jsonl:2: key 'text' is null, not text.*Fix"),
        (
            "x.jsonl",
            GOOD + '{"text": {"a": "1"}}\n',
            r"x.jsonl:2: key 'text' is an object, not text.*Fix",
        ),
        ("x.jsonl", GOOD + "[1]\n", r"x.jsonl:2: is a list, not an object with a key 'text'. Fix"),
        ("x.jsonl", GOOD + '"1"\n', r"x.jsonl:2: is a text, not an object with a key 'text'. Fix"),
        ("x.jsonl", GOOD + '{"text": "\\ud800"}\n', r"x.jsonl:2: half a surrogate pair.*Fix"),
        ("x.jsonl", GOOD.encode() + b'{"text": "\xff"}\n', r"x.jsonl:2: not UTF-8 .*Fix"),
        ("x.txt", b"1 \xff", r"x.txt: not UTF-8 \(invalid start byte at byte 2\). Fix"),
    ],
)
def test_bad_input_stops_or_is_counted(tmp_path, name, content, message):
    good = write(tmp_path / "good.txt", "3")
    bad = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        null(tmp_path, good, bad)
    assert list((tmp_path / "out").iterdir()) == []
    documents, summary = null(tmp_path, good, bad, skip_bad_lines=True)
    assert documents == [[3]] + [[1, 2]] * content.count(
        GOOD if isinstance(content, str) else GOOD.encode()
    )
    assert summary.bad == 1


@pytest.mark.parametrize(
    "content, settings, message",
    [
        ("", {}, "no document has a token.*Fix"),
        (" \n ", {"append_eod": True}, "no document has a token.*Fix"),
        ("1 100", {}, r"x.txt: token id 100: must be in \[0, vocab_size = 100\). Fix"),
        ("-3", {}, r"x.txt: token id -3"),
        ("1 a", {}, "x.txt: NullTokenizer: text must be whitespace-separated integers.*Fix"),
        ("1", {"vocab_size": None}, "NullTokenizer needs at least 2. Fix"),
        ("1", {"workers": 0}, "workers = 0: must be at least 1. Fix"),
        ("1", {"json_keys": ["a", "b"]}, "json_keys = a b: must be one key.*Fix"),
        (
            "1",
            {"input": ["missing1", "missing2"]},
            "input = missing1, missing2: no such file or folder. Fix",
        ),
        (
            "1",
            {"tokenizer_type": "SentencePieceTokenizer"},
            "tokenizer_model = None: must be given.*Fix",
        ),
    ],
)
def test_refuses_and_keeps_the_earlier_output(tmp_path, content, settings, message):
    path = write(tmp_path / "x.txt", "7")
    null(tmp_path, path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    write(path, content)
    with pytest.raises(ValueError, match=message):
        null(tmp_path, path, **settings)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


def test_folder_without_files(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(
        ValueError, match=r"no file to read that ends in \.txt, .*; there is: nothing at all. Fix"
    ):
        find_files([str(tmp_path / "in")], EXTENSIONS)


def test_text_comes_back_byte_for_byte(tmp_path):
    from data.tokenizers.tokenizer import SentencePiece
    from tools.train_tokenizer import Arguments as TrainArguments
    from tools.train_tokenizer import train_tokenizer

    write(tmp_path / "in" / "a.py", "def f():\r\n\tpass  \n\n\n")
    write(tmp_path / "in" / "b.txt", "  日本 \ufeff 😀 12 \n")
    write(tmp_path / "in" / "c.py", (ROOT / "data" / "indexed.py").read_bytes())
    model = train_tokenizer(
        TrainArguments(
            input=[str(tmp_path / "in")], output_prefix=str(tmp_path / "t"), vocab_size=512
        )
    )
    prefix = str(tmp_path / "c")
    preprocess(
        Arguments(
            input=[str(tmp_path / "in")],
            output_prefix=prefix,
            tokenizer_model=model,
            append_eod=True,
        )
    )
    reader = IndexedReader(prefix)
    tokenizer = SentencePiece(model)
    for i, name in enumerate(("a.py", "b.txt", "c.py")):
        ids = reader.read(i, 0, int(reader.document_lengths[i])).tolist()
        assert (
            ids[-1] == tokenizer.eod
            and tokenizer.decode(ids[:-1]).encode() == (tmp_path / "in" / name).read_bytes()
        )
    assert read_side_file(prefix)["tokenizer"] == tokenizer.describe()


def test_command_line(tmp_path, capfd):
    x = write(tmp_path / "x.jsonl", GOOD * 10)
    bad = write(tmp_path / "bad.jsonl", GOOD + "{\n")
    flags = ["--tokenizer_type", "NullTokenizer", "--vocab-size", "10", "--workers", "2"]
    words = [*flags, "--input", str(x), "--output_prefix", str(tmp_path / "c"), "--append-eod"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.preprocess_data", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "10 documents, 30 tokens" in done.stdout and "c.idx" in done.stdout and done.stderr == ""
    # The same function as the process calls.
    prefix = ["--output-prefix", str(tmp_path / "d")]
    assert main([*flags, "--input", str(bad), *prefix]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "bad.jsonl:2: not JSON" in line
    assert not list(tmp_path.glob("d.*"))
    assert main([*flags, *prefix]) == 2
