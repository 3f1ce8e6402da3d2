"""The benchmark of saves and loads, at toy size: what it reports, and that it judges."""

import pytest

from tools.bench.checkpoint import Timed, describe


def report(*, stall: float = 0.01, hiding: float = 2.0, written: float = 1.0, read: float = 1.0):
    ours = Timed([stall, 0.01, 0.01], [hiding] * 3, [5.0] * 3)
    theirs = Timed([1.0] * 3, [3.0] * 3, [6.0] * 3)
    return describe(
        "a machine",
        2 * 10**9,
        [2.0, 2.0, 9.0],
        ours,
        theirs,
        {"bare": [1.0] * 3, "ours": [written] * 3, "DCP": [2.0] * 3},
        {"bare": [1.0] * 3, "ours": [read] * 3},
    )


def test_all_four_bars_are_reached_by_a_good_run():
    assert report().count(": reached") == 4


@pytest.mark.parametrize(
    "change, bar",
    [
        (dict(stall=0.051), "longest stall of a save, s, the first included: 0.051, bar 0.05"),
        (dict(hiding=2.3), "step that hides the copy / step without: 1.150"),
        (dict(written=1.2), "rate of writing / bare: 0.833"),
        (dict(read=1.2), "rate of reading / bare and checksum: 0.833"),
    ],
)
def test_each_bar_can_be_missed(change, bar):
    text = report(**change)
    missed = [line for line in text.splitlines() if "NOT reached" in line]
    assert len(missed) == 1 and missed[0].startswith(f"- {bar}"), text


@pytest.mark.long
def test_the_benchmark_runs_at_toy_size(tmp_path):
    import subprocess
    import sys

    words = "--state-gb 0.004 --hidden 64 --tokens 64 --rounds 1 --folder".split()
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench", "checkpoint", *words, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| DCP's async_save |" in done.stdout, done.stdout
    assert done.stdout.count("reached") == 4, done.stdout
    assert not list(tmp_path.iterdir()), "it cleans up"
