"""Every command on every page is run in small, planned where it trains, or listed with a reason."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest

from tests.page_commands import (
    BATCH,
    FENCED,
    NOT_RUN,
    ROOT,
    STEPS,
    PageCommand,
    blocks,
    commands_of,
    reason_not_to_run,
    shorten,
)
from tests.unit.test_readme import FOLDERS, PAGES, make_words, write_documents

WRITERS = ("train-tokenizer", "preprocess", "import", "export")
"""Commands whose output others read: made once, in the order of the README."""
SMALL = {
    "watch": ["--once"],
    "inspect": [],
    "plan": ["--device-memory-gib", "80"],
}
"""What is added to a command, so that it ends, or fits a plan for other machines than this one."""


def module_of(name: str) -> str:
    """Return the module behind a command of the front door."""
    table = (ROOT / "launch" / "ithaca.sh").read_text(encoding="utf-8")
    (runner,) = re.findall(rf"^{name} +\| ([\w.]+)", table, re.MULTILINE)
    return "tools.plan" if runner == "plan" else runner


def run_here(command: PageCommand, *added: str) -> int:
    """Run a command of the front door in this process."""
    return importlib.import_module(module_of(command.name)).main([*command.arguments, *added])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the README's commands were run in small: text to Hugging Face and back."""
    folder = tmp_path_factory.mktemp("pages")
    for name in FOLDERS:
        (folder / name).symlink_to(ROOT / name)
    words = make_words(3_000)
    write_documents(folder / "web" / "a.jsonl", words, [200] * 400)
    write_documents(folder / "books" / "a.jsonl", words, [5_000] * 8)
    (run_file,) = blocks("README.md", "yaml")
    (folder / "run.yaml").write_text(shorten(run_file, one_process=True))
    script = """
    set -e
    bash launch/ithaca.sh train-tokenizer --input web/ books/ --vocab-size 600 \\
      --output-prefix out/spm
    for name in web books; do
      bash launch/ithaca.sh preprocess --input $name/*.jsonl --output-prefix out/$name \\
        --append-eod \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model out/spm.model --workers 1
    done
    NPROC_PER_NODE=1 bash launch/ithaca.sh train --config run.yaml --save out/checkpoints
    bash launch/ithaca.sh export --load out/checkpoints --output out/hf --verify
    bash launch/ithaca.sh import --hf out/hf --save out/imported
    """
    unset = {"RANK", "WORLD_SIZE", "NNODES", "NODE_RANK", "MASTER_ADDR", "NPROC_PER_NODE", "PYTHON"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=kept | {"ITHACA_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(folder / "out" / "hf", folder / "path" / "to" / "model")
    # From here on as the page has it: on layouts of 8 processes, which go on from one process.
    # There the last phase goes on.
    longer = shorten(run_file, one_process=False)
    longer = f"train_tokens: {10 * BATCH}".join(longer.rsplit(f"train_tokens: {STEPS * BATCH}", 1))
    for name in ("run.yaml", "longer.yaml"):
        (folder / name).write_text(longer)
    return folder


def all_commands() -> list[PageCommand]:
    return [command for page in sorted(PAGES) for command in commands_of(page)]


def runnable() -> list[PageCommand]:
    """List each command once, that a test here must run."""
    found = [command for command in all_commands() if reason_not_to_run(command) is None]
    return list({command.text: command for command in found}.values())


@pytest.mark.long
@pytest.mark.parametrize("command", runnable(), ids=lambda command: command.text[:90])
def test_a_command_of_a_page_works(command, place, monkeypatch, tmp_path, capsys):
    assert command.name, f"{command.page}: {command.text}: run it here, or say in NOT_RUN why not"
    monkeypatch.chdir(place)
    for name, value in command.variables:
        monkeypatch.setenv(name, value)
    if command.name == "train":
        planned = PageCommand(command.page, (), ("bash", "launch/ithaca.sh", "plan"))
        arguments = [word.replace("/shared", str(tmp_path)) for word in command.arguments]
        code = importlib.import_module(module_of(planned.name)).main(
            [*arguments, "--world-size", str(command.world_size), "--hardware", "h100"]
        )
    elif command.name in WRITERS:
        moved = [
            f"{tmp_path}/{word}" if before in OUTPUTS else word for before, word in pairs(command)
        ]
        # As a shell would.
        words = [name for word in moved for name in sorted(glob(word)) or [word]]
        code = importlib.import_module(module_of(command.name)).main(words)
    else:
        added = SMALL.get(command.name, [])
        if command.name == "plan" and "--world-size" not in command.arguments:
            added = [*added, "--world-size", str(command.world_size)]
        code = run_here(command, *added)
    said = capsys.readouterr()
    assert code == 0, said.out[-2000:] + said.err


OUTPUTS = ("--output-prefix", "--output", "--save")
"""Flags whose value a test moves, so that what was made before stays."""


def pairs(command: PageCommand) -> list[tuple[str, str]]:
    """List each word with the word before it."""
    return list(zip(["", *command.arguments], command.arguments, strict=False))


def test_each_reason_not_to_run_something_is_needed():
    texts = [command.text for command in all_commands()]
    unused = [start for start in NOT_RUN if not any(text.startswith(start) for text in texts)]
    assert unused == []


@pytest.mark.parametrize("page", sorted(PAGES))
def test_each_block_of_a_page_names_its_language_or_is_no_command(page):
    """A command in a block without a language would be run by no test."""
    found = FENCED.findall((ROOT / page).read_text(encoding="utf-8"))
    hidden = [text for language, text in found if language not in ("bash", "yaml")]
    commands = [
        text for text in hidden if re.search(r"^(?:\$ |bash |sbatch |[A-Z_]+=)", text, re.M)
    ]
    assert commands == []


@pytest.mark.parametrize("page", sorted(PAGES))
def test_each_block_of_commands_is_bash(page):
    for block in blocks(page, "bash"):
        done = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True)
        assert done.returncode == 0, f"{page}: {done.stderr}"


def test_the_page_of_each_way_is_named_in_the_readme():
    named = set(re.findall(r"\]\(([\w/]+\.md)\)", (ROOT / "README.md").read_text()))
    others = ("README.md", "RESULTS.md")
    own = {page for page in PAGES if Path(page).stem.isupper() and Path(page).name not in others}
    assert own - named == set()
