"""A kill at any point of an export or an import leaves nothing that loads, and nothing in the way.

In every run a process kills itself at drawn file operations; with --all kills come at drawn moments
from outside, into conversions of some hundred megabytes.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.manifest import verify_files
from tests.huggingface.model_folders import write_folder
from tools.export_hf import Arguments as ExportArguments
from tools.export_hf import export
from tools.import_hf import Arguments as ImportArguments
from tools.import_hf import import_folder

LAST = 4
"""File operations at the end, where things are renamed: each is a point to kill at."""
Convert = Callable[[], object]


def in_child(act: Convert, kill_at: int | None = None) -> int:
    """Run `act` in a fork, which kills itself at file operation `kill_at` -> operations it made.

    0 where it was killed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        seen = 0

        def note(event: str, _) -> None:
            nonlocal seen
            if event.startswith(("open", "os.", "shutil.")):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(note)
        try:
            act()
            os.write(writing, str(seen).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        count = int(pipe.read() or 0)
    os.waitpid(child, 0)
    return count


def draw_points(count: int, kills: int) -> list[int]:
    """Draw the operations at which to kill, and those at the end; all, where there are fewer."""
    others = range(1, count - LAST)
    drawn = random.Random(count).sample(others, min(kills - LAST, len(others)))
    return [*drawn, *range(count - LAST, count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("kills") / "hf", "llama")


@pytest.fixture(scope="module")
def imported(folder) -> Path:
    root = folder.parent / "imported"
    import_folder(ImportArguments(hf=str(folder), save=str(root), verify=False))
    return root


def assert_whole_or_absent(output: Path, names: set[str]) -> None:
    """An export is there with all its files, each of which loads, or it is not there."""
    if output.exists():
        assert {path.name for path in output.iterdir()} == names
        assert all(load_file(path) for path in output.glob("*.safetensors"))


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.long)])
def test_a_killed_export_leaves_no_folder_and_the_next_one_succeeds(
    imported, tmp_path, capfd, kills
):
    output = tmp_path / "out"
    settings = dict(load=str(imported), output=str(output), max_shard_bytes=9000)
    count = in_child(lambda: export(ExportArguments(**settings)))
    names = {path.name for path in output.iterdir()}
    assert "model.safetensors.index.json" in names and count > 40
    shutil.rmtree(output)
    again = ExportArguments(**settings, overwrite=True)
    # Each one finds what those before it left.
    for point in draw_points(count, kills):
        assert in_child(lambda: export(again), point) == 0, point
        assert_whole_or_absent(output, names)
    export(again)
    assert_whole_or_absent(output, names)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.long)])
def test_a_killed_import_publishes_nothing_and_the_next_one_succeeds(
    folder, tmp_path, capfd, kills
):
    settings = dict(hf=str(folder), verify=False)
    whole = ImportArguments(**settings, save=str(tmp_path / "whole"))
    count = in_child(lambda: import_folder(whole))
    assert count > 40
    save = tmp_path / "save"
    arguments = ImportArguments(**settings, save=str(save))
    for point in draw_points(count, kills):
        assert in_child(lambda: import_folder(arguments), point) == 0, point
        found = find_published(save)
        if found is not None:
            assert verify_files(found) == [], point
            shutil.rmtree(save)  # an import into a folder with a checkpoint is refused
    # Whole, and killed before a file named it: it is replaced.
    assert verify_files(import_folder(arguments)) == []
    (save / "latest_checkpointed_iteration.txt").unlink()
    assert verify_files(import_folder(arguments)) == []
    assert len(list(save.iterdir())) == 2


# ---------------------------------------------------------------- from outside


def kill_at_moments(words: list[str], kills: int, check: Callable[[], None]) -> None:
    """Run a command once to its end, then kill it at drawn moments of that time."""
    command = [sys.executable, "-m", *words]
    begin = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.monotonic() - begin
    check()
    draw = random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.2, 1) * seconds)
        process.kill()
        process.wait()
        check()


@pytest.mark.long
def test_kills_at_any_moment_of_large_conversions(tmp_path):
    sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=32_000)
    folder = write_folder(tmp_path / "hf", "llama", **sizes, head_dim=128)
    save = tmp_path / "save"
    output = tmp_path / "out"

    def check_import() -> None:
        found = find_published(save)
        assert found is None or verify_files(found) == []
        if found is not None:
            shutil.rmtree(save)

    words = ["tools.import_hf", "--hf", str(folder), "--save", str(save), "--no-verify"]
    kill_at_moments(words, 20, check_import)
    shutil.rmtree(save, ignore_errors=True)
    import_folder(ImportArguments(hf=str(folder), save=str(save), verify=False))

    words = ["tools.export_hf", "--load", str(save), "--output", str(output), "--overwrite"]
    words += ["--max-shard-bytes", "30000000"]
    export(ExportArguments(load=str(save), output=str(output), max_shard_bytes=30_000_000))
    names = {path.name for path in output.iterdir()}
    kill_at_moments(words, 20, lambda: assert_whole_or_absent(output, names))
