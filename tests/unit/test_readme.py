"""The commands and run files of README.md work as they stand, on stand-in data."""

import json
import os
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FOLDERS = ("data", "launch", "model", "parallel", "pretrain", "tests", "tools")
PAGES = tuple(
    page.relative_to(ROOT).as_posix()
    for page in (*ROOT.glob("*.md"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.md")))
)
GPU_GIB = "80"
"""What README names beside the run file."""


def blocks(file: str, language: str) -> list[str]:
    found = FENCED.findall((ROOT / file).read_text(encoding="utf-8"))
    return [text for name, text in found if name == language]


def write_documents(path: Path, words: list[str], lengths: list[int]) -> None:
    chance = random.Random(1)
    path.parent.mkdir()
    with path.open("w") as file:
        for length in lengths:
            text = " ".join(chance.choices(words, k=length))
            file.write(json.dumps({"text": text}) + "\n")


def make_words(count: int) -> list[str]:
    chance = random.Random(2)
    sizes = [chance.randint(2, 9) for _ in range(count)]
    return ["".join(chance.choices(string.ascii_lowercase, k=size)) for size in sizes]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like the repository's root, with the text that README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    for name in FOLDERS:
        (folder / name).symlink_to(ROOT / name)
    words = make_words(60_000)  # enough for 32,000 ids
    write_documents(folder / "web" / "a.jsonl", words, [200] * 1_500)
    write_documents(folder / "books" / "a.jsonl", words, [50_000] * 2)
    (run_file,) = blocks("README.md", "yaml")
    (folder / "run.yaml").write_text(run_file)
    return folder


def run(place: Path, script: str, **environment: str) -> str:
    """Run a script as a reader pastes it, but each start of a run only checks it -> all it said."""
    script = script.replace("ithaca.sh train ", f"ithaca.sh plan --device-memory-gib {GPU_GIB} ")
    unset = {"RANK", "WORLD_SIZE", "NNODES", "NODE_RANK", "MASTER_ADDR", "NPROC_PER_NODE", "PYTHON"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    found = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=place,
        env=kept | {"ITHACA_PYTHON": sys.executable} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout
    return found.stdout


@pytest.fixture(scope="module")
def said(place):
    """What the page's commands say, from text to a run that is checked."""
    (script,) = [text for text in blocks("README.md", "bash") if "ithaca.sh preprocess" in text]
    return run(place, script)


def test_the_commands_to_train_your_own_run_in_order(place, said):
    assert "NPROC_PER_NODE=8" in blocks("README.md", "bash")[1], "the run file is for 8 processes"
    for name in ("spm.model", "web.idx", "books.idx"):
        assert (place / "out" / name).exists(), name
    assert "phase long\n" in said and "effective training time" in said, said


@pytest.mark.long  # the same run file, and a whole start of Python more
def test_the_command_for_several_nodes_takes_the_same_run_file(place, said):
    (script,) = [text for text in blocks("launch/MANY_MACHINES.md", "bash") if "NNODES=4" in text]
    (first, *_) = script.splitlines()
    assert re.search("^long +128Ki ", run(place, first, NPROC_PER_NODE="8"), re.MULTILINE)


@pytest.mark.long  # a whole start of Python more, too
def test_the_run_file_is_refused_for_another_number_of_processes(place, said):
    """The check above can fail: it is for the number of processes that the page names."""
    command = (
        "! NPROC_PER_NODE=6 bash launch/ithaca.sh train --config run.yaml --save out/checkpoints"
    )
    assert "6 processes" in run(place, command)


@pytest.mark.parametrize("file", ["README.md", "launch/FIRST_RUN.md", "launch/MANY_MACHINES.md"])
def test_every_script_that_is_named_exists(file):
    named = set(re.findall(r"(?:bash|source) ([\w/]+\.sh)", "\n".join(blocks(file, "bash"))))
    assert named, "a page without a command"
    for script in named:
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_is_named_exists(page):
    table = (ROOT / "launch" / "ithaca.sh").read_text(encoding="utf-8").split("TABLE")[1]
    commands = set(re.findall(r"^([a-z-]+) +\|", table, re.MULTILINE)) | {"COMMAND"}
    text = (ROOT / page).read_text(encoding="utf-8")
    assert set(re.findall(r"launch/ithaca\.sh ([\w-]+)", text)) <= commands


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"{name}/README.md" for name in FOLDERS)]
)
def test_pages_name_commands_by_the_front_door(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    beside = re.findall(r"python -m tools\.\w+|bash launch/train\.sh", text)
    assert not beside, "`bash launch/ithaca.sh COMMAND` works from any folder"
