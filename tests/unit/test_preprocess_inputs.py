"""tools.preprocess_data: compressed and Parquet files, token ids as input, stopped runs, full
disks."""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from data.writers import indexed_writer
from data.writers.indexed_writer import IndexedWriter
from data.writers.resumable_writer import ResumableWriter
from tests.unit.test_preprocess import ROOT, lines, null, write
from tools import preprocess_data
from tools.preprocessing import streams, tables, tasks
from tools.preprocessing.find_files import find_files
from tools.preprocessing.read_ahead import Producer, read_ahead

ENDS = ("bin", "idx", "json")


def outputs(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def zstd(data):
    return zstandard.compress(data)


@pytest.fixture
def small_tasks(monkeypatch):
    monkeypatch.setattr(tasks, "TASK_BYTES", 3000)
    monkeypatch.setattr(streams, "COMPRESSED_BLOCK", 100)
    monkeypatch.setattr(tables, "PARQUET_ROWS", 20)


@pytest.fixture
def texts():
    return [" ".join(str(j % 90) for j in range(i * 7 % 61)) for i in range(900)]


@pytest.mark.parametrize("workers", [1, 2])
def test_compressed_files_give_what_plain_ones_give(tmp_path, small_tasks, texts, workers):
    data = lines(*texts).encode()
    null(tmp_path, write(tmp_path / "x.jsonl", data))
    plain = outputs(tmp_path / "out")
    half = (
        data.index(b"\n", len(data) // 2) - 5
    )  # members of gzip and frames of zstd end inside a line
    table = pyarrow.table({"other": range(len(texts)), "text": texts})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=100)
    for path in (
        write(
            tmp_path / "x.jsonl.gz",
            gzip.compress(data[:half]) + gzip.compress(data[half:]) + b"\0" * 9,
        ),
        write(tmp_path / "x.JSONL.zst", zstd(data[:half]) + zstd(data[half:])),
        tmp_path / "x.parquet",
    ):
        _, summary = null(tmp_path, path, workers=workers)
        assert outputs(tmp_path / "out") == plain and summary.bytes == path.stat().st_size


def test_text_inside_compressed_files_is_one_document(tmp_path):
    write(tmp_path / "in" / "a.txt.gz", gzip.compress(b"1 2\n3"))
    write(tmp_path / "in" / "b.md.zst", zstd(b"4\n5"))
    write(tmp_path / "in" / "c.bin.gz", b"not taken")
    assert null(tmp_path, tmp_path / "in")[0] == [[1, 2, 3], [4, 5]]
    write(tmp_path / "in" / "a.txt", "1 2\n3")
    with pytest.raises(ValueError, match=r"a.txt.gz: a.txt stands beside it.*Fix"):
        find_files([str(tmp_path / "in")], [".txt"])


def broken(data):
    return data[: len(data) // 2] + b"\xff" * 20 + data[len(data) // 2 + 20 :]


@pytest.mark.parametrize(
    "name, change",
    [
        ("x.jsonl.gz", lambda data: gzip.compress(data)[:-9]),
        ("x.jsonl.gz", lambda data: broken(gzip.compress(data))),
        ("x.jsonl.gz", lambda data: data),
        ("x.txt.gz", lambda data: gzip.compress(data)[:-1]),
        ("x.jsonl.zst", lambda data: zstd(data)[:-9]),
        ("x.jsonl.zst", lambda data: broken(zstd(data))),
        ("x.txt.zst", lambda data: data),
        ("x.parquet", lambda data: data),
    ],
)
def test_damaged_files_are_named(tmp_path, texts, name, change):
    path = write(tmp_path / name, change(lines(*texts).encode()))
    with pytest.raises(
        ValueError, match=rf"{name}: (damaged, or not whole|damaged, or not Parquet) .*\). Fix"
    ):
        null(tmp_path, path, skip_bad_lines=True, workers=2 if name == "x.txt.gz" else 1)
    assert list((tmp_path / "out").iterdir()) == []


def test_errors_in_compressed_and_parquet_files_name_the_place(tmp_path, small_tasks, texts):
    bad = lines(*texts) + lines("1 x")
    for name, data in (
        ("x.jsonl.gz", gzip.compress(bad.encode())),
        ("x.jsonl.zst", zstd(bad.encode())),
    ):
        with pytest.raises(ValueError, match=f"{name}:{len(texts) + 1}: NullTokenizer"):
            null(tmp_path, write(tmp_path / name, data))
    parquet.write_table(pyarrow.table({"text": [*texts, None, "5"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=f"x.parquet:{len(texts) + 1}: null, not text. Fix"):
        null(tmp_path, tmp_path / "x.parquet")
    assert null(tmp_path, tmp_path / "x.parquet", skip_bad_lines=True)[1].bad == 1
    with pytest.raises(
        ValueError, match=r"x.parquet: no column 'body' \(found: text\). Fix: --json-keys"
    ):
        null(tmp_path, tmp_path / "x.parquet", json_keys=["body"])
    parquet.write_table(pyarrow.table({"text": [1.5]}), tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match="'text' holds double: must be text, or lists of integers. Fix"
    ):
        null(tmp_path, tmp_path / "x.parquet")


@pytest.mark.parametrize("append_eod", [False, True])
def test_ids_of_all_kinds_of_files(tmp_path, small_tasks, append_eod):
    documents = [[(i * j) % 99 for j in range(i * 13 % 50)] for i in range(700)]
    expected = [ids + [99] * append_eod for ids in documents if ids]
    plain = "".join(
        f"{' '.join(map(str, ids))}\n" if i % 2 else f"[{', '.join(map(str, ids))}]\r\n"
        for i, ids in enumerate(documents)
    ).rstrip("\n")
    parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "x.parquet")
    for path in (
        write(tmp_path / "x.ids", plain),
        write(tmp_path / "x.ids.gz", gzip.compress(plain.encode())),
        write(tmp_path / "x.jsonl", "".join(json.dumps({"text": ids}) + "\n" for ids in documents)),
        tmp_path / "x.parquet",
    ):
        assert null(tmp_path, path, append_eod=append_eod)[0] == expected


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "x.ids",
            "1 2\n\n3 100\n",
            r"x.ids:3: token id 100: must be in \[0, vocab_size = 100\). Fix",
        ),
        ("x.ids", "1\n[4, -2]\n", "x.ids:2: token id -2: must be in"),
        ("x.ids", "1\n2.5\n", "x.ids:2: NullTokenizer: text must be whitespace-separated integers"),
        ("x.ids", "1\n99999999999999999999999 1", "x.ids:2: token id 99999999999999999999999"),
        ("x.ids", "1\n4-2\n", "x.ids:2: NullTokenizer"),
        ("x.jsonl", '{"text": [1]}\n{"text": [1, 100]}', "x.jsonl:2: token id 100: must be in"),
        (
            "x.jsonl",
            '{"text": [1]}\n{"text": [1.5]}',
            "x.jsonl:2: must be .*holds a number that is no 64-bit integer",
        ),
        (
            "x.jsonl",
            '{"text": [1]}\n{"text": [[1], [2]]}',
            "x.jsonl:2: must be a list of integers, and holds a list. Fix",
        ),
        (
            "x.jsonl",
            '{"text": [1]}\n{"text": [[1], 2]}',
            "x.jsonl:2: must be a list of integers, and holds a list. Fix",
        ),
        (
            "x.jsonl",
            '{"text": [1]}\n{"text": ["a"]}',
            "x.jsonl:2: must be a list of integers, and holds a text. Fix",
        ),
        (
            "x.jsonl",
            '{"text": [1]}\n{"text": [1, true]}',
            "x.jsonl:2: must be a list of integers, and holds true or false",
        ),
        (
            "x.jsonl",
            '{"text": [1]}\n{"text": [1, null]}',
            "x.jsonl:2: must be a list of integers, and holds null. Fix",
        ),
        (
            "x.jsonl",
            '{"text": [1]}\n{"text": [100000000000000000000]}',
            "x.jsonl:2: must be a list of integers",
        ),
        (
            "x.jsonl",
            '{"text": [1]}\n{"text": [18446744073709551615]}',
            "x.jsonl:2: token id 18446744073709551615: is no",
        ),
        ("x.ids", "1\n[[1, 2], [3]]\n", "x.ids:2: must be a list of integers, not of lists. Fix"),
        ("x.ids", "1\n[[1]]\n", "x.ids:2: must be a list of integers, not of lists. Fix"),
        ("x.ids", "1\n1 [2] 3\n", "x.ids:2: must be a list of integers, not of lists. Fix"),
        ("x.ids", "1\n[1] 2\n", "x.ids:2: must be a list of integers, not of lists. Fix"),
        (
            "x.ids",
            "1\n[1, 2\n",
            "x.ids:2: must be integers between spaces or single commas, in one pair of brackets",
        ),
        (
            "x.ids",
            "1\n1, 2]\n",
            "x.ids:2: must be integers between spaces or single commas, in one pair of brackets",
        ),
        ("x.ids", "1\n1,, 2\n", "x.ids:2: must be integers between spaces or single commas"),
        ("x.ids", "1\n1, 2,\n", "x.ids:2: must be integers between spaces or single commas"),
        ("x.ids", "1\n, 2\n", "x.ids:2: must be integers between spaces or single commas"),
    ],
)
def test_wrong_ids_are_named_or_left_out(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        null(tmp_path, path)
    documents, summary = null(tmp_path, path, skip_bad_lines=True)
    assert documents[0][0] == 1 and len(documents) == summary.bad == 1


def test_ids_want_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="tokenizer_model = None"):
        null(tmp_path, write(tmp_path / "x.ids", "1"), tokenizer_type="HuggingFaceTokenizer")


class Stop(Exception):
    """Ends a run where the test wants it."""


def stop_after(monkeypatch, saves):
    """Runs end at the n-th save, right after it."""
    real = ResumableWriter.save
    seen = []

    def save(self, note):
        real(self, note)
        seen.append(note)
        if len(seen) == saves:
            raise Stop

    monkeypatch.setattr(ResumableWriter, "save", save)


@pytest.mark.parametrize("saves", [1, 2, 4, 6])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    tmp_path, small_tasks, texts, monkeypatch, capsys, saves, kind
):
    monkeypatch.setattr(preprocess_data, "SAVE_BYTES", 4000)
    for i in range(2):
        data = lines(*texts[i::2], "").encode()
        if kind == "parquet":
            parquet.write_table(
                pyarrow.table({"text": texts[i::2] + [""]}), tmp_path / f"{i}.parquet"
            )
        else:
            write(tmp_path / f"{i}.{kind}", data if kind == "jsonl" else gzip.compress(data))
    files = [tmp_path / f"{i}.{kind}" for i in range(2)]
    _, undisturbed = null(tmp_path, *files)
    expected = outputs(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "expected")
    with monkeypatch.context() as patch:
        stop_after(patch, saves)
        with pytest.raises(Stop):
            null(tmp_path, *files)
    assert (
        not list((tmp_path / "out").glob("c.*x"))
        and (tmp_path / "out" / "c.progress.json").exists()
    )
    with open(tmp_path / "out" / "c.bin.partial", "ab") as file:  # written after the save
        file.write(b"rest" * 100_000)
    _, summary = null(
        tmp_path, *files, workers=2 if saves == 2 else 1
    )  # processes take seconds to start
    assert "goes on after" in capsys.readouterr().out and outputs(tmp_path / "out") == expected
    assert {name: getattr(summary, name) for name in ("documents", "tokens", "empty", "bytes")} == {
        name: getattr(undisturbed, name) for name in ("documents", "tokens", "empty", "bytes")
    }


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda path: {"vocab_size": 98}, "tokenizer.vocab_size was 100, now 98"),
        (lambda path: {"append_eod": True}, "append_eod was False, now True"),
        (
            lambda path: os.utime(path, ns=(1, 1)) or {},
            "an input file has another name, size or time",
        ),
        (lambda path: write(path, path.read_bytes() + b"\n") and {}, "input_bytes was"),
        (lambda path: {"skip_bad_lines": False}, "skip_bad_lines was True, now False"),
    ],
)
def test_a_changed_run_begins_anew_and_says_why(
    tmp_path, small_tasks, texts, monkeypatch, capsys, change, reason
):
    monkeypatch.setattr(preprocess_data, "SAVE_BYTES", 4000)
    path = write(tmp_path / "x.jsonl", '{"body": 1}\n' * ("skip_bad" in reason) + lines(*texts))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stop):
            null(tmp_path, path, skip_bad_lines=True)
    settings = change(path)
    if "skip_bad" in reason:
        with pytest.raises(ValueError, match="no key 'text'"):
            null(tmp_path, path, **settings)
        assert f"begins again, since {reason}" in capsys.readouterr().out
        return
    null(tmp_path, path, **settings)
    assert f"begins again, since {reason}" in capsys.readouterr().out
    found = outputs(tmp_path / "out")
    null(tmp_path, path, **settings)
    assert outputs(tmp_path / "out") == found and len(found) == 3


KILLER = """
import os, signal, sys
from data.writers import indexed_writer, resumable_writer
from tools import preprocess_data
from tools.preprocessing import tasks
tasks.TASK_BYTES, preprocess_data.SAVE_BYTES = 3000, 9000
sys.argv, (owner, name, count) = ["p", *sys.argv[4:]], sys.argv[1:4]
owner, left = {"os": os, "writer": resumable_writer.ResumableWriter}[owner], int(count)
real = getattr(owner, name)
def last(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
setattr(owner, name, last)
sys.exit(preprocess_data.main())
"""


@pytest.mark.long
def test_killed_processes_leave_what_the_next_goes_on_from(tmp_path, texts):
    """SIGKILL between documents, inside a save and while publishing; the workers end too."""
    path = write(tmp_path / "x.jsonl", lines(*texts) * 3)

    def run(folder, owner, name, count, *flags):
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                KILLER,
                owner,
                name,
                str(count),
                "--input",
                str(path),
                "--output-prefix",
                str(tmp_path / folder / "c"),
                "--tokenizer-type",
                "NullTokenizer",
                "--vocab-size",
                "100",
                *flags,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said, _ = process.communicate(
            timeout=120
        )  # ends when the workers, which hold its stdout too, have ended
        return process.returncode, said

    assert run("whole", "os", "fsync", -1)[0] == 0
    for i, point in enumerate(
        [
            ("writer", "add_documents", 40),
            ("os", "fsync", 2, "--workers", "2"),
            ("os", "fsync", 7),
            ("writer", "_replace_progress", 3),
            ("writer", "_publish", 1),
        ]
    ):
        code, said = run("out", *point)
        assert code == -signal.SIGKILL and ("goes on after" in said) == (i > 0), said
    code, said = run("out", "os", "fsync", -1)
    assert (
        code == 0
        and "goes on after" in said
        and outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    ), said
    # All is published, and what a stopped run keeps is left beside it.
    assert run("out", "writer", "_remove_state", 1, "--overwrite")[0] == -signal.SIGKILL
    code, said = run("out", "os", "fsync", -1)
    assert code == 2 and "c.bin exists (" in said, said
    assert run("out", "os", "fsync", -1, "--overwrite")[0] == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_one_run_at_a_time_writes_a_prefix(tmp_path):
    with (
        ResumableWriter(str(tmp_path / "c"), np.uint16),
        pytest.raises(ValueError, match="another run is writing"),
    ):
        ResumableWriter(str(tmp_path / "c"), np.uint16)
    assert list(tmp_path.iterdir()) == []


def limited(prefix, limit, *arguments):
    """Run the tool with files of at most `limit` bytes, which fails as a full disk does -> (code,
    stderr)."""
    program = (
        "import resource, sys; from tools import preprocess_data as p\n"
        "from tools.preprocessing import tasks\n"
        "sys.argv[0], tasks.TASK_BYTES, p.SAVE_BYTES = 'p', 3000, 20000\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY)); "
        "sys.exit(p.main())"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            "--output-prefix",
            str(prefix),
            "--tokenizer-type",
            "NullTokenizer",
            "--vocab-size",
            "100",
            "--overwrite",
            *map(str, arguments),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "limit, end, kept", [(10_000, "bin", False), (30_000, "bin", True), (80_000, "idx", True)]
)
def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path, texts, small_tasks, limit, end, kept):
    old = write(tmp_path / "old.txt", "7 8")
    path = write(tmp_path / "x.jsonl", lines(*texts) + lines("1") * 4000)
    null(tmp_path, path)
    expected = outputs(tmp_path / "out")
    assert len(expected["c.bin"]) < 80_000 < len(expected["c.idx"])
    null(tmp_path, old)
    before = outputs(tmp_path / "out")
    code, said = limited(tmp_path / "out" / "c", limit, "--input", path)
    assert (
        code == 2
        and f"c.{end}.partial: cannot write it: File too large; about " in said
        and "Fix: free" in said
    )
    assert ("the same command goes on" in said) == kept and len(said.strip().splitlines()) == 1
    after = outputs(tmp_path / "out")
    assert {name: after[name] for name in before} == before and (len(after) > 3) == kept
    code, said = limited(tmp_path / "out" / "c", 10**6, "--input", path)
    assert code == 0 and outputs(tmp_path / "out") == expected, said


def test_writer_says_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with IndexedWriter(str(tmp_path / "c"), np.uint16) as writer:
        writer.add_document([1])
        writer.finish()
    before = outputs(tmp_path)
    monkeypatch.setattr(indexed_writer, "sync_file", full)
    with pytest.raises(
        ValueError,
        match=r"No space left on device; about .* bytes more are needed, .* are free. The "
        "temporary files are removed; what stood at .* is as it was. Fix",
    ):
        with IndexedWriter(str(tmp_path / "c"), np.uint16) as writer:
            writer.add_document([2])
            writer.finish()
    assert outputs(tmp_path) == before


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_reading_ahead_keeps_the_order_and_ends_its_threads(readers):
    def give(number):
        yield from (f"{number}.{i}" for i in range(number * 3))
        if number == 5:
            raise ValueError("five")

    before = threading.active_count()

    def producers(in_thread):
        return (Producer(i, partial(give, i), in_thread(i)) for i in range(9))

    taken = []
    with pytest.raises(ValueError, match="five"):
        for item in read_ahead(producers(lambda i: i % 2 == 1), readers):
            taken.append(item)
    assert taken == [(i, f"{i}.{j}") for i in range(6) for j in range(i * 3)]
    left = read_ahead(producers(lambda i: True), readers)
    assert next(left) == (1, "1.0")
    left.close()
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.05)
    assert threading.active_count() == before


def test_training_a_tokenizer_reads_compressed_files_from_their_beginning(tmp_path, texts):
    from tools.train_tokenizer import sample_texts

    data = lines(*texts).encode()
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    for path, most in (
        (write(tmp_path / "x.jsonl.gz", gzip.compress(data)), 10**6),
        (tmp_path / "x.parquet", 10**6),
        (write(tmp_path / "x.jsonl.zst", zstd(data)), 1000),
    ):
        found = list(sample_texts([path], most, 1, "text"))
        assert found == texts[: len(found)] and (
            len(found) == len(texts) or sum(map(len, found)) >= 1000
        )
    assert list(
        sample_texts([write(tmp_path / "x.txt.gz", gzip.compress(b"abcdef"))], 3, 1, "text")
    ) == ["abc"]


def test_files_without_documents(tmp_path):
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "x.parquet"
    )
    for path in (
        tmp_path / "x.parquet",
        write(tmp_path / "x.jsonl.gz", gzip.compress(b"")),
        write(tmp_path / "x.jsonl.zst", b""),
        write(tmp_path / "x.ids", "\n[]\n"),
    ):
        with pytest.raises(ValueError, match="no document has a token.*Fix"):
            null(tmp_path, path)
    assert list((tmp_path / "out").iterdir()) == []
