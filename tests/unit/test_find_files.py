"""Which files the inputs name: everything that is left out is named with its reason."""

import bz2
import gzip
import json
import lzma
import os

import pytest
import zstandard

from tests.unit.test_preprocess import ROOT, lines, null, write
from tools.preprocess_data import main as preprocess_data
from tools.preprocessing.find_files import find_files
from tools.preprocessing.input_kinds import EXTENSIONS
from tools.train_tokenizer import Arguments as TrainArguments
from tools.train_tokenizer import train_tokenizer

PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
}


def find(*inputs, extensions=EXTENSIONS, **settings):
    return find_files([str(path) for path in inputs], extensions, **settings)


def names(paths, folder):
    return [str(path).removeprefix(f"{folder}/") for path in paths]


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".jsonlines", ".json", ".JSONL"])
def test_json_lines_are_read_under_each_of_their_endings(tmp_path, ending):
    write(tmp_path / "in" / f"x{ending}", lines("1 2", "3"))
    assert null(tmp_path, tmp_path / "in")[0] == [[1, 2], [3]]


@pytest.mark.parametrize("compression", PACKERS)
@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("x.jsonl", lines("1 2", "3"), [[1, 2], [3]]),
        ("x.json", json.dumps([{"text": "1 2"}, {"text": "3"}]), [[1, 2], [3]]),
        ("x.ids", "1 2\n3\n", [[1, 2], [3]]),
        ("x.csv", 'id,text\n7,"1\n2"\n8,3\n', [[1, 2], [3]]),
        ("x.txt", "1 2\n3", [[1, 2, 3]]),
    ],
)
def test_every_compression_of_every_kind_is_read(tmp_path, compression, name, content, expected):
    half = len(content) // 2
    pack = PACKERS[compression]
    # Two members, as `cat a.gz b.gz` makes them.
    data = pack(content[:half].encode()) + pack(content[half:].encode())
    write(tmp_path / "in" / f"{name}{compression}", data)
    assert null(tmp_path, tmp_path / "in")[0] == expected


@pytest.mark.parametrize("compression", [".bz2", ".xz", ".zstd"])
def test_damaged_compressed_files_are_named(tmp_path, compression):
    data = PACKERS[compression](lines(*map(str, range(99))).encode())
    for damaged in (data[:-5], b"no " + data, data[:20] + b"\xff" * 20 + data[40:]):
        path = write(tmp_path / f"x.jsonl{compression}", damaged)
        with pytest.raises(
            ValueError, match=f"x.jsonl{compression}: damaged, or not whole .*Fix: copy"
        ):
            null(tmp_path, path, skip_bad_lines=True)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": "1 2"}, {"text": "3"}]),
        json.dumps([{"text": "1 2"}, {"text": "3"}], indent=2),
        "\ufeff" + json.dumps([{"text": "1 2", "n": float("nan")}, {"text": "3"}]),
        lines("1 2", "3"),
        json.dumps({"text": "1 2"}) + "\n\n" + json.dumps({"text": "3"}),
    ],
)
def test_a_json_file_may_be_lines_or_one_array(tmp_path, content):
    assert null(tmp_path, write(tmp_path / "x.json", content))[0] == [[1, 2], [3]]


def test_a_json_file_may_be_one_object_over_several_lines(tmp_path):
    assert null(tmp_path, write(tmp_path / "x.json", json.dumps({"text": "1 2"}, indent=1)))[0] == [
        [1, 2]
    ]


def test_elements_of_a_json_array_that_are_no_documents_are_named(tmp_path):
    elements = [
        {"text": "1"},
        {"text": 5},
        {"text": None},
        7,
        {"body": "2"},
        {"text": "\ud800"},
        {"text": "3"},
    ]
    path = write(tmp_path / "x.json", json.dumps(elements, indent=1))
    with pytest.raises(ValueError, match="x.json, element 2: key 'text' is a number, not text"):
        null(tmp_path, path)
    documents, summary = null(tmp_path, path, skip_bad_lines=True)
    assert documents == [[1], [3]] and summary.bad == 5, (documents, summary.bad)


@pytest.mark.parametrize("content", ["[1, 2", "[{'text': '1'}]", "[1]\n[2]\n"])
def test_a_json_array_that_is_none_is_refused(tmp_path, content):
    with pytest.raises(
        ValueError, match="x.json: begins as one JSON array or object, and is not JSON .*Fix"
    ):
        null(tmp_path, write(tmp_path / "x.json", content), skip_bad_lines=True)


def test_a_walk_names_all_that_it_leaves_out(tmp_path):
    folder = tmp_path / "in"
    for name in ("a.txt", "b.md", "c.ndjson"):
        write(folder / name, "{}")
    for name in ("part-00000", "x.docx", "y.html", "z.tar.gz", "w", "part-00001.gz"):
        write(folder / name, "?")
    write(folder / ".hidden.txt", "?")
    write(folder / ".git" / "x.txt", "?")
    write(folder / "p.parquet.gz", "?")
    (folder / "nowhere.txt").symlink_to("missing")
    (folder / "circle.txt").symlink_to("circle.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "same.txt").symlink_to("a.txt")
    found = find(folder, extensions=[ending for ending in EXTENSIONS if ending != ".md"])
    assert names(found.files, folder) == ["a.txt", "c.ndjson"]
    left_out = {reason: sorted(names(paths, folder)) for reason, paths in found.left_out.items()}
    assert left_out == {
        "unknown ending (--plain-text reads it as text)": [
            "part-00000",
            "part-00001.gz",
            "w",
            "x.docx",
            "y.html",
            "z.tar.gz",
        ],
        "hidden (name begins with a dot)": [".git", ".hidden.txt"],
        "not among --extensions": ["b.md"],
        "Parquet in another compression (unpack it)": ["p.parquet.gz"],
        "link that leads nowhere": ["circle.txt", "nowhere.txt"],
        "not a regular file": ["pipe.txt"],
        "read already under another name": [f"same.txt = {folder}/a.txt"],
    }


def test_plain_text_reads_unknown_endings(tmp_path):
    write(tmp_path / "in" / "part-00000", "1")
    write(tmp_path / "in" / "b.log.gz", gzip.compress(b"2 3"))
    write(tmp_path / "in" / "c.txt", "4")
    assert null(tmp_path, tmp_path / "in")[0] == [[4]]
    assert null(tmp_path, tmp_path / "in", plain_text=True)[0] == [[2, 3], [4], [1]]
    assert null(tmp_path, tmp_path / "in", extensions=["log", ".txt"])[0] == [[2, 3], [4]]


@pytest.mark.parametrize("name", ["part-00000", "x.docx", "x.tar.gz", "x.bin", "x.unknown.zst"])
def test_an_unknown_ending_that_is_named_is_refused(tmp_path, name):
    path = write(tmp_path / name, "1")
    with pytest.raises(
        ValueError, match=f"{name}: the ending does not say what it holds .*Fix: --plain-text"
    ):
        find(path)
    assert find(path, plain_text=True).files == [path]


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="x.jsonl: not a regular file.*Fix: write it to a file"):
        find(tmp_path / "x.jsonl")


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    folder = tmp_path / "in"
    write(folder / "sub" / "b.txt", "2")
    write(tmp_path / "elsewhere" / "deep" / "c.txt", "3")
    (folder / "a-linked").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder / "sub")
    (folder / "sub" / "up").symlink_to(folder)
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "elsewhere")
    found = find(folder)
    assert names(found.files, folder) == ["a-linked/deep/c.txt", "sub/b.txt"]
    assert names(found.left_out["read already under another name"], folder) == [
        f"again = {folder}/sub",
        f"sub/up = {folder}",
        f"a-linked/deep/back = {folder}/a-linked",
    ]


def test_a_file_of_two_names_is_read_once_and_said(tmp_path):
    path = write(tmp_path / "in" / "b.txt", "1")
    os.link(path, tmp_path / "in" / "c.txt")
    (tmp_path / "in" / "a.txt").symlink_to(path)
    found = find(tmp_path / "in", path, tmp_path / "in")
    assert names(found.files, tmp_path / "in") == ["b.txt"]
    assert len(found.left_out["read already under another name"]) == 4, found.left_out


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "in" / "a.txt", "1")

    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="in: cannot be listed .Permission denied.. Fix"):
        find(tmp_path / "in")


def test_no_file_at_all_names_what_lay_there(tmp_path):
    for name in ("part-00000", "part-00001", "part-00002", "part-00003", ".x"):
        write(tmp_path / "in" / name, "1")
    message = (
        "there is: 1 hidden .*: .*/.x; "
        "4 unknown ending .*: .*part-00000, .*00001, .*00002 and 1 more. Fix"
    )
    with pytest.raises(ValueError, match=message):
        find(tmp_path / "in")


@pytest.mark.parametrize("compression", PACKERS)
def test_a_file_beside_its_compressed_copy_is_refused(tmp_path, compression):
    write(tmp_path / "in" / "a.jsonl", lines("1"))
    write(tmp_path / "in" / f"a.jsonl{compression}", PACKERS[compression](lines("1").encode()))
    with pytest.raises(ValueError, match=f"a.jsonl{compression}: a.jsonl stands beside it.*Fix"):
        find(tmp_path / "in")


def test_own_token_files_in_a_folder_are_no_corpus(tmp_path):
    write(tmp_path / "out" / "a.jsonl", lines("1 2"))
    assert null(tmp_path, tmp_path / "out" / "a.jsonl")[0] == [[1, 2]]
    state = {"bytes": 0, "sequences": 0, "documents": 0, "note": {}}
    write(tmp_path / "out" / "c.progress.json", json.dumps(state))
    write(tmp_path / "out" / "c.lengths.partial", "")
    assert null(tmp_path, tmp_path / "out")[0] == [[1, 2]]


def test_the_table_says_what_was_read_and_what_was_not(tmp_path):
    write(tmp_path / "in" / "a.jsonl", lines("1 2", "", "3") + "{\n")
    write(tmp_path / "in" / "b.txt", "4")
    for number in range(5):
        write(tmp_path / "in" / f"part-{number}", "?")
    _, summary = null(tmp_path, tmp_path / "in", skip_bad_lines=True)
    rows = [line.split("  ") for line in summary.inputs]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    shown = ", ".join(f"{tmp_path}/in/part-{number}" for number in range(3)) + " and 2 more"
    assert cells == [
        ["inputs", "files", "documents"],
        ["read", "2", "3"],
        ["JSON", "1"],
        ["text", "1"],
        ["left out"],
        ["empty documents", "1"],
        ["bad lines, rows or texts (--skip-bad-lines)", "1"],
        ["unknown ending (--plain-text reads it as text)", "5", shown],
    ]


def test_the_commands_print_what_they_leave_out(tmp_path, capsys):
    write(tmp_path / "in" / "a.py", (ROOT / "data" / "indexed.py").read_bytes())
    write(tmp_path / "in" / "part-0", "?")
    inputs = [str(tmp_path / "in")]
    train_tokenizer(TrainArguments(input=inputs, output_prefix=str(tmp_path / "t"), vocab_size=400))
    assert "left out: 1 unknown ending (--plain-text" in capsys.readouterr().out
    command = ["--input", *inputs, "--output-prefix", str(tmp_path / "c"), "--tokenizer-model"]
    assert preprocess_data([*command, str(tmp_path / "t.model")]) == 0
    assert "unknown ending (--plain-text reads it as text)" in capsys.readouterr().out


def test_files_of_a_system_without_numbers_are_told_apart_by_path(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        write(tmp_path / "in" / name, "1")
        os.utime(tmp_path / "in" / name, ns=(1, 1))
    (tmp_path / "in" / "c.txt").symlink_to("a.txt")
    real = type(tmp_path).stat

    def stat(path, **settings):
        status = list(real(path, **settings))
        status[1] = 0
        return os.stat_result(status)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "stat", stat)
        found = find(tmp_path / "in")
    assert names(found.files, tmp_path / "in") == ["a.txt", "b.txt"]
