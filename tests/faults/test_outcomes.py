"""Faults of a disk and of the data on one node, and how the run must end."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.training import base_arguments, write_corpus
from tools.faults.launched_run import LaunchedRun
from tools.faults.traces import published_step

SECONDS = 300
STEPS = 12
SETTINGS = dict(train_iters=STEPS, save_interval=2, global_batch_size=2, eval_iters=0)
TOO_SMALL = "700k"
"""Bytes of a disk that holds a checkpoint or two, and not all that are kept."""
LARGE_ENOUGH = "64m"

PYTHON = r"""#!/usr/bin/env bash
exec {python} "${{@/#pretrain.train/tests.faults.hooked_trainer}}"
"""


def arguments(folder: Path, **overrides) -> list[str]:
    corpus = write_corpus(folder / "corpus", documents=60)
    return base_arguments(corpus, **SETTINGS | overrides)


def launch(folder: Path, save: Path, hook: str = "", **overrides) -> LaunchedRun:
    """Start a run on one process, or with a hook one on two whose trainer has a fault."""
    environment = {"MAX_RESTARTS": "3"}
    if hook:
        python = folder / "python"
        python.write_text(PYTHON.format(python=sys.executable))
        python.chmod(0o755)
        environment |= {"ITHACA_PYTHON": str(python), "HOOK": hook, "HERE": str(folder)}
    processes = 2 if hook else 1
    return LaunchedRun(arguments(folder, **overrides), save, processes, environment=environment)


def finish(run: LaunchedRun) -> tuple[int, str]:
    """Wait for the end -> the exit code, and all that was said."""
    try:
        return run.wait(SECONDS)
    finally:
        run.end()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own that is soon full."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={TOO_SMALL}", "tmpfs", str(place)]
    if subprocess.run(words, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.long
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(tmp_path, small_disk):
    save = small_disk / "save"
    code, said = finish(launch(tmp_path, save))
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert "it needs" in line and "were free" in line and "Fix: free space" in line, line
    assert "Traceback" not in said
    assert "restart 1 of" not in said, "another try would fill it, too"
    assert not list(save.glob(".iter_*.partial")), "a half-written checkpoint stays"
    step = published_step(save)
    assert step, "the checkpoint before it is untouched"
    grow = ["mount", "-o", f"remount,size={LARGE_ENOUGH}", str(small_disk)]
    subprocess.run(grow, check=True)
    code, said = finish(launch(tmp_path, save))
    assert code == 0, said
    assert f"iter_{step:07d}" in said.split("start: ")[1].splitlines()[0]
    assert published_step(save) == STEPS


@pytest.mark.long
def test_a_reader_that_always_fails_ends_the_run_with_its_error(tmp_path):
    save = tmp_path / "save"
    code, said = finish(launch(tmp_path, save, hook="fail in the reader"))
    assert code == 1, said
    assert "the same error twice at the same step" in said
    assert "the corpus is a pear" in said.splitlines()[-1]
    assert published_step(save) == 4


@pytest.mark.long
def test_a_reader_that_fails_once_costs_a_restart(tmp_path):
    save = tmp_path / "save"
    code, said = finish(launch(tmp_path, save, hook="fail once in the reader"))
    assert code == 0, said
    assert "rank 1 (local rank 1, process " in said
    assert "back at step 5" in said
    assert published_step(save) == STEPS
