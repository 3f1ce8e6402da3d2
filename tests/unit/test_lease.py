"""A lease's driver and table: deadlines, failures, what is skipped, and what the lines become."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from tools.bench.gpu import lease
from tools.bench.gpu.items import ITEMS, LEASE, Bar, Item
from tools.bench.gpu.lines import Line, Report, read_lines
from tools.bench.gpu.table import choose_run, describe, describe_probe

HERE = "tests.unit.test_lease"


# ---- items that the driver's processes run ----


def good(card, scale, report, *, value):
    report.add("answer", value, "s")


def raising(card, scale, report):
    report.add("before", 1.0, "s")
    raise RuntimeError("no memory\nand a second line")


def sleeping(card, scale, report, *, mark):
    report.add("before", 2.0, "s")
    subprocess.Popen(
        [sys.executable, "-c", f"import time; open({mark!r}, 'w').close(); time.sleep(60)", mark]
    )
    time.sleep(60)


def dying(card, scale, report, *, mark):
    """Leave a process behind, as one that crashes does."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", mark])
    os.kill(os.getpid(), signal.SIGKILL)


def item(name: str, function: str, *, seconds: int = 1, deadline: int = 60, **options) -> Item:
    return Item(
        name=name,
        title=f"title {name}",
        function=f"{HERE}:{function}",
        options=options,
        seconds=seconds,
        deadline=deadline,
    )


def make_lease(folder: Path, *, seconds: float = 300) -> lease.Lease:
    arguments = lease.Arguments(device="cpu", scale="toy", seconds=seconds)
    made = lease.Lease(folder, arguments)
    made.environment["OMP_NUM_THREADS"] = "1"
    return made


def lines_of(folder: Path, name: str) -> list[Line]:
    return [line for line in read_lines(folder / lease.LINES) if line.item == name]


def is_running(mark: str) -> bool:
    """Is there a process with this word on its command line?"""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in words:
            return True
    return False


class Impatient(subprocess.Popen):
    """A process whose deadline is over as soon as it has left a file, however slow the machine
    is."""

    is_over = False

    def wait(self, timeout=None):
        task = json.loads(self.args[-1])
        mark = task["options"].get("mark")
        if task["item"] != "hangs" or self.is_over:
            return super().wait(timeout)
        while not Path(mark).exists() and self.poll() is None:
            time.sleep(0.05)
        self.is_over = True
        raise subprocess.TimeoutExpired(self.args, timeout)


def test_one_item_s_failure_hang_or_death_costs_only_itself(tmp_path, monkeypatch):
    mark = str(tmp_path / "started")
    monkeypatch.setattr(lease.subprocess, "Popen", Impatient)
    made = make_lease(tmp_path)
    for one in (
        item("raises", "raising"),
        item("hangs", "sleeping", deadline=60, mark=mark),
        item("dies", "dying", mark=str(tmp_path / "orphan")),
        item("good", "good", value=3.0),
    ):
        made.run_item(one)

    before, failed = lines_of(tmp_path, "raises")
    assert (before.value, failed.kind, failed.note) == (1.0, "failed", "RuntimeError: no memory")
    before, failed = lines_of(tmp_path, "hangs")
    assert (before.value, failed.note) == (2.0, "ended at its deadline of 60 s")
    assert Path(mark).exists() and not is_running(mark), (
        "the process that the item started is left behind"
    )
    (failed,) = lines_of(tmp_path, "dies")
    assert failed.note == "its process ended with code -9"
    assert not is_running(str(tmp_path / "orphan")), "what a dead item started is left behind"
    (found,) = lines_of(tmp_path, "good")
    assert (found.value, found.unit, found.kind, found.card, found.scale) == (
        3.0,
        "s",
        "measured",
        "CPU",
        "toy",
    )
    assert found.torch and found.date and found.seconds >= 0
    assert "RuntimeError: no memory" in (tmp_path / lease.LOG).read_text()


def test_an_item_that_cannot_be_killed_does_not_hold_the_others_up(monkeypatch):
    """A process that waits inside the GPU's driver goes on after SIGKILL."""
    waits = []

    class Unkillable:
        pid = 0

        def wait(self, timeout):
            waits.append(timeout)
            raise subprocess.TimeoutExpired("item", timeout)

    monkeypatch.setattr(lease.os, "killpg", lambda *_: None)
    lease.end_group(Unkillable())
    assert waits == [lease.KILL_SECONDS]


def answer(_: lease.Lease, item: Item, report: Report, deadline: float) -> int:
    """Do what the process of `good` does, without a start of Python."""
    report.add("answer", item.options["value"], "s")
    return 0


@pytest.fixture(scope="module")
def two_items(tmp_path_factory):
    """(the folder in which two items leave their lines, the table after each); the lease knows its
    card's name before the second, which is a process."""
    folder = tmp_path_factory.mktemp("two")
    made = make_lease(folder)
    first, second = (
        replace(ITEMS["product"], function=f"{HERE}:good", options={"value": value}, deadline=120)
        for value in (1.0, 2.0)
    )
    # The date tells two runs of an item apart: it counts seconds.
    earlier = mock.patch.object(lease, "now", lambda: "2026-01-01 00:00:00")
    with mock.patch.object(lease.Lease, "run_process", answer), earlier:
        made.run_item(first)
    tables = [(folder / lease.TABLE).read_text()]
    made.card = "a card"
    made.run_item(second)
    tables.append((folder / lease.TABLE).read_text())
    return folder, tables


def test_only_the_probe_asks_for_the_card_s_name(two_items):
    """Asking makes a context on the card, which some items leave to processes of their own; an item
    that is not told the name asks (the test of failures above)."""
    folder, _ = two_items
    assert [found.card for found in read_lines(folder / lease.LINES)] == ["", "a card"]


def test_the_table_is_there_after_each_item(two_items):
    _, (first, second) = two_items
    assert "| 8192^3 bf16 product |  | answer 1 s |" in first
    assert "| 8192^3 bf16 product |  | answer 2 s |" in second


def test_the_table_is_printed_from_the_lines(two_items, capsys):
    folder, (_, table) = two_items
    assert lease.run(lease.Arguments(table=str(folder / lease.LINES))) == 0
    assert capsys.readouterr().out == table


def test_an_item_that_needs_more_than_is_left_is_skipped_and_a_shorter_one_runs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(lease.Lease, "run_process", answer)
    made = make_lease(tmp_path, seconds=60)
    made.run_item(item("long", "good", seconds=100, value=1.0))
    made.run_item(item("short", "good", seconds=5, value=2.0))
    (skipped,) = lines_of(tmp_path, "long")
    assert skipped.kind == "skipped"
    assert re.fullmatch(r"needs 100 s, and 5\d s were left", skipped.note), skipped.note
    assert [line.value for line in lines_of(tmp_path, "short")] == [2.0]


def test_the_deadline_is_never_past_the_end_of_the_lease(tmp_path, monkeypatch):
    deadlines = []
    monkeypatch.setattr(
        lease.Lease, "run_process", lambda self, item, report, deadline: deadlines.append(deadline)
    )
    make_lease(tmp_path, seconds=50).run_item(
        item("a", "good", seconds=10, deadline=300, value=1.0)
    )
    assert 40 < deadlines[0] <= 45


def test_a_machine_without_growing_segments_is_probed_again(tmp_path, monkeypatch):
    """Some drivers refuse them; the items then run without."""
    tried = []

    def run_item(self, one):
        tried.append((one.name, self.environment[lease.ALLOCATOR]))
        line = Report(self.lines, one.name, "toy", date="now", card="a card")
        if one.name == "probe" and "True" in self.environment[lease.ALLOCATOR]:
            line.fail("no cuDeviceGet")
        else:
            line.add("memory", 80.0, "GiB")
        return read_lines(self.lines)[-1:]

    monkeypatch.delenv(lease.ALLOCATOR, raising=False)
    monkeypatch.setattr(lease.Lease, "run_item", run_item)
    made = lease.Lease(tmp_path, lease.Arguments(device="cpu", scale="toy"))
    assert made.run([item("good", "good", value=1.0)])
    assert tried == [
        ("probe", "expandable_segments:True"),
        ("probe", "expandable_segments:False"),
        ("good", "expandable_segments:False"),
    ]
    assert made.card == "a card"


@pytest.mark.long  # two starts of Python more; the tests above have each part
def test_a_whole_lease_writes_lines_log_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.getsignal(signal.SIGTERM)
    code = lease.run(lease.Arguments(device="cpu", scale="toy", only=("product",)))
    signal.signal(signal.SIGTERM, before)
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "lines.jsonl",
        "log.txt",
        "table.md",
    ]
    for text in (tmp_path / "out" / "lines.jsonl").read_text().splitlines():
        known = {
            "item",
            "case",
            "figure",
            "unit",
            "value",
            "kind",
            "card",
            "torch",
            "seconds",
            "note",
            "scale",
            "date",
        }
        assert set(json.loads(text)) == known
    capsys.readouterr()
    assert lease.run(lease.Arguments(table=str(tmp_path / "out" / "lines.jsonl"))) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "table.md").read_text()
    assert printed.startswith("## On one CPU\n") and "toy scale" in printed
    assert "| 8192^3 bf16 product |  | rate" in printed
    assert "| tests/gpu |  | not run |  |  |" in printed


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(only=("nothing",)), "--only nothing: no such item"),
        (dict(device="cpu"), "--device cpu --scale full: would take days"),
        (dict(seconds=3.0), "--seconds 3: must be at least 20"),
        (
            dict(table="missing.jsonl"),
            "--table missing.jsonl: No such file or directory. Fix: give",
        ),
        (dict(table="/dev/null"), "--table /dev/null: it is empty. Fix: give the lines.jsonl"),
        (dict(output="/dev/null/x"), "--output /dev/null/x: Not a directory. Fix: a folder"),
    ],
)
def test_bad_input_is_one_line(capsys, changes, expected):
    assert lease.run(lease.Arguments(**changes)) == 2
    text = capsys.readouterr().err
    assert expected in text and text.count("\n") == 1


def test_the_order_is_that_of_value():
    assert [one.name for one in LEASE] == [
        "tests",
        "tests-compiled",
        "product",
        "attention",
        "documents",
        "3b-8k",
        "1b-8k",
        "norm",
        "frontier",
    ]
    assert [one.name for one in lease.chosen_items(())] == [one.name for one in LEASE]
    assert [one.name for one in lease.chosen_items(("8b-offload", "product"))] == [
        "8b-offload",
        "product",
    ]


# ---- the table ----

LINE = Line(
    item="", seconds=1.0, card="NVIDIA H100", torch="2.11", scale="full", date="2026-01-02 03:04:05"
)


def line(name: str, figure: str = "", value=None, **changes) -> Line:
    return replace(LINE, item=name, figure=figure, value=value, **changes)


def row(text: str, start: str) -> str:
    (found,) = [one for one in text.splitlines() if one.startswith(f"| {start} |")]
    return found


def test_the_table_marks_how_figures_came_about_and_judges_them():
    lines = [
        line("qwen3-8b-rank", "seconds", 20.0, unit="s", case="2 layers"),
        line("qwen3-8b-rank", "seconds", 240.123, unit="s", case="36 layers", kind="scaled"),
        line("qwen3-8b-rank", "peak", 37.0, unit="GB", case="36 layers", kind="scaled"),
        line(
            "qwen3-8b-rank",
            "wire seconds",
            3.0,
            unit="s",
            case="2 layers",
            kind="calculated",
            note="at 350 GB/s",
        ),
        line("documents", note="needs 22 s, and 3 s were left", kind="skipped"),
        line("frontier", note="OutOfMemoryError: too much", kind="failed", case="65,536 tokens"),
    ]
    text = describe(lines, ITEMS)
    assert text.startswith("## On one NVIDIA H100\n")
    title = ITEMS["qwen3-8b-rank"].title
    assert row(text, f"{title} | 2 layers") == (
        f"| {title} | 2 layers | seconds 20 s; wire seconds 3 s, calculated (at 350 GB/s) |  |  |"
    )
    assert row(text, f"{title} | 36 layers") == (
        f"| {title} | 36 layers | seconds 240.1 s, scaled; peak 37 GB, scaled "
        "| seconds at most 250; peak at most 36 "
        "| reached; NOT reached |"
    )
    assert "not run (needs 22 s, and 3 s were left)" in row(text, ITEMS["documents"].title + " | ")
    assert "failed (OutOfMemoryError: too much)" in row(
        text, ITEMS["frontier"].title + " | 65,536 tokens"
    )
    assert row(text, "tests/gpu | ") == "| tests/gpu |  | not run |  |  |"
    assert "8B, longest sample" not in text  # by hand, and was not run


def test_a_scaled_figure_below_zero_reaches_nothing():
    lines = [line("qwen3-8b-rank", "seconds", -41.9, case="36 layers", kind="scaled")]
    assert row(describe(lines, ITEMS), ITEMS["qwen3-8b-rank"].title + " | 36 layers").endswith(
        "| seconds at most 250 | no figure |"
    )


def test_failed_tests_are_named_and_many_are_counted():
    lines = [
        line("tests", "test", f"test_{n}", case="test_a.py", kind="failed", note="why")
        for n in range(10)
    ]
    lines.append(line("tests", "failed", 10, unit="tests", case="test_a.py"))
    found = row(describe(lines, ITEMS), "tests/gpu | test_a.py")
    assert (
        "failed: test_0; " in found
        and "failed: test_7; failed 10 tests; and 2 more failed" in found
    )
    assert "test_8" not in found and found.endswith("| failed at most 0 | NOT reached |")


def test_the_last_run_that_found_anything_counts():
    first = [line("a", "x", 1.0), line("a", kind="failed", note="then it broke")]
    second = [line("a", "x", 2.0)]
    third = [line("a", kind="skipped", note="no time")]
    assert choose_run([first, second, third]) == second
    assert choose_run([third]) == third


def test_the_peer_s_rate_is_compared_unless_the_losses_differ():
    lines = [
        line("1b-8k", "tokens", 100.0, case="ours, sdpa"),
        line("1b-8k", "tokens", 120.0, case="ours, varlen"),
        line("1b-8k", "loss", 9.0, case="ours, varlen"),
        line("1b-8k-peer", "tokens", 100.0, case="theirs"),
        line("1b-8k-peer", "loss", 9.001, case="theirs"),
    ]
    text = describe(lines, ITEMS).splitlines()[-1]
    assert text == (
        "- 1b-8k: ours, varlen / theirs: 1.200 times its tokens/s (calculated), "
        "bar at least 1: reached"
    )
    lines[-1] = line("1b-8k-peer", "loss", 9.1, case="theirs")
    assert describe(lines, ITEMS).endswith(
        "but the losses are 9.00000 and 9.10000: the times say nothing"
    )


def test_the_probe_is_the_paragraph_above_the_table():
    lines = [
        line("probe", "memory", 79.1, unit="GiB"),
        line("probe", "versions", "torch 2.11, numpy 2.4.6"),
        line("probe", case="orjson", kind="failed", note="not installed"),
    ]
    assert describe_probe(lines, lines) == (
        "2026-01-02 03:04:05 UTC; memory 79.1 GiB; torch 2.11, numpy 2.4.6; orjson: not installed"
    )
    assert describe([], ITEMS).startswith("## On one GPU\n\nNo GPU was at hand.")


def test_bars_hold_in_both_directions():
    assert Bar(2).reached(2) and not Bar(2).reached(2.1)
    assert Bar(2, at_least=True).reached(2) and not Bar(2, at_least=True).reached(1.9)


def test_a_line_that_was_cut_off_is_left_out_wherever_it_is(tmp_path):
    path = tmp_path / "lines.jsonl"
    report = Report(path, "a", "toy", date="now")
    report.add("x", 1.0, "s")
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"item": "a", "fig')
    assert [line.value for line in read_lines(path)] == [1.0]
    report.add("x", 2.0, "s")  # the next run
    assert [line.value for line in read_lines(path)] == [1.0, 2.0]


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"other": 1}\n{"other": 2}\n', "line 1 is not one of a lease"),
        ("a table\nof words\n", "none of its 2 lines is one of a lease"),
    ],
)
def test_another_file_is_refused_before_anything_runs(tmp_path, capsys, text, expected):
    path = tmp_path / "lines.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected):
        read_lines(path)
    assert lease.run(lease.Arguments(device="cpu", scale="toy", output=str(tmp_path))) == 2
    said = capsys.readouterr().err
    assert "its lines.jsonl cannot be continued: " + expected in said and said.count("\n") == 1
    assert path.read_text() == text


# ---- lease.sh ----

STUB = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
if [[ $* == *" pip "* && -n ${OTHER_PYTHON:-} ]]; then
  echo "ERROR: not a supported wheel" >&2
  exit 1
fi
[[ $1 != --version ]] || echo "Python 3.10.1"
if [[ $1 == -c ]]; then
  [[ -z ${REFUSES:-} ]] || { echo "Traceback"; echo "ImportError: numpy 2.4 or less"; exit 1; } >&2
fi
"""


def run_script(folder: Path, wheels: list[str], **environment: str) -> tuple[int, list[str], str]:
    """(exit code, what its Python was called with, stderr) of lease.sh with a stub for Python."""
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    (folder / "wheels").mkdir()
    for name in wheels:
        (folder / "wheels" / name).touch()
    calls = folder / "calls"
    calls.touch()
    given = {"PYTHON": stub, "WHEELS": folder / "wheels", "SITE": folder / "site", "CALLS": calls}
    done = subprocess.run(
        ["bash", "tools/bench/lease.sh", "--seconds", "9"],
        cwd=lease.ROOT,
        env=os.environ | {name: str(value) for name, value in given.items()} | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, calls.read_text().splitlines(), done.stderr


WHEELS = ["tyro-1-py3-none-any.whl", "numpy-2.4.6-cp312.whl"]


def test_the_script_installs_the_wheels_and_leaves_a_numpy_that_numba_takes(tmp_path):
    code, calls, _ = run_script(tmp_path, WHEELS)
    assert code == 0
    assert len(calls) == 3, calls
    assert "pip install" in calls[0] and "--no-index --no-deps" in calls[0]
    assert "tyro-1" in calls[0] and "numpy" not in calls[0]
    assert calls[1:] == ["-c import numba", "-m tools.bench lease --seconds 9"]


def test_the_script_brings_its_numpy_where_numba_refuses_and_says_so(tmp_path):
    code, calls, text = run_script(tmp_path, WHEELS, REFUSES="yes")
    assert code == 0
    assert "numpy-2.4.6" in calls[2] and calls[3] == "-m tools.bench lease --seconds 9"
    assert "numba refuses (ImportError: numpy 2.4 or less): numpy-2.4.6-cp312.whl" in text


def test_wheels_for_another_python_are_said_to_be_so(tmp_path):
    code, _, text = run_script(tmp_path, WHEELS, OTHER_PYTHON="yes")
    assert code == 2
    assert "could not install the wheels" in text and "into Python 3.10.1. Fix: " in text, text
    assert "numba" not in text


@pytest.mark.parametrize(
    "wheels, refuses, expected", [([], "", "no wheels there"), (WHEELS[:1], "yes", "has no numpy")]
)
def test_the_script_says_in_one_line_what_is_missing(tmp_path, wheels, refuses, expected):
    code, _, text = run_script(tmp_path, wheels, REFUSES=refuses)
    assert code == 2
    assert expected in text and text.count("\n") == 1
