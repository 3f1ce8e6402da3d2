"""launch/ithaca.sh: every command from any folder, with only this repository's packages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ITHACA_SH = ROOT / "launch" / "ithaca.sh"
COMMANDS = (
    "train plan train-tokenizer preprocess inspect inspect-checkpoint merge split audit import "
    "export generate evaluate coordinate-check report watch bench"
).split()
UNSET = {"PYTHONPATH", "PYTHONSAFEPATH", "NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR"}

# Says what it was asked, an argument a line, and fails as it was told.
STAND_IN = r"""#!/usr/bin/env bash
[[ $1 == -m ]] || exec {python} "$@"
echo "world ${{WORLD_SIZE-}}"
echo "in $PWD"
printf '<%s>\n' "$@"
exit 7
"""


def run(*arguments: str, cwd: Path, script: Path = ITHACA_SH, **environment: str):
    inherited = {name: value for name, value in os.environ.items() if name not in UNSET}
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env=inherited | {"ITHACA_PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def stand_in(tmp_path):
    """A program in the place of Python that says what it was asked."""
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    return str(python)


def test_without_a_command_it_lists_all_of_them(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    assert re.findall(r"^  (\S+)  ", done.stdout, re.MULTILINE) == COMMANDS
    asked = run("--help", cwd=tmp_path)
    assert (asked.returncode, asked.stdout) == (0, done.stdout)


@pytest.mark.parametrize(
    "written, meant", [("exprot", "export"), ("preprocess_data", "preprocess"), ("xyzzy", None)]
)
def test_an_unknown_command_is_refused_with_the_nearest_one(tmp_path, written, meant):
    done = run(written, cwd=tmp_path)
    assert done.returncode == 2
    start = f"ithaca.sh: error: {written}: no such command. Fix: "
    assert done.stderr == start + (f"{meant}, or " if meant else "") + (
        f"one of {' '.join(COMMANDS)}\n"
    )


def test_arguments_pass_unchanged_and_the_exit_code_comes_back(tmp_path, stand_in):
    given = ["--input", "a b", "", "*", "$HOME", "--", "-x"]
    done = run("merge", *given, cwd=tmp_path, ITHACA_PYTHON=stand_in)
    assert done.returncode == 7
    wanted = ["-m", "tools.merge_datasets", *given]
    assert done.stdout.splitlines()[1:] == [f"in {tmp_path}", *(f"<{text}>" for text in wanted)]


def test_it_works_through_a_link(tmp_path, stand_in):
    link = tmp_path / "ithaca"
    link.symlink_to(ITHACA_SH)
    done = run("report", cwd=tmp_path, script=link, ITHACA_PYTHON=stand_in)
    assert "<tools.report>" in done.stdout, done.stderr


def test_a_plan_gets_its_arguments_as_they_are(tmp_path, stand_in):
    given = ["--config", "run.yaml", "--world-size", "1024"]
    done = run("plan", *given, cwd=tmp_path, ITHACA_PYTHON=stand_in)
    wanted = ["-m", "tools.plan", *given]
    assert done.stdout.splitlines()[2:] == [f"<{text}>" for text in wanted], done.stderr


def test_a_plan_counts_the_processes_of_all_nodes(tmp_path, stand_in):
    counts = {"NNODES": "4", "NPROC_PER_NODE": "8"}
    done = run("plan", "--config", "run.yaml", cwd=tmp_path, ITHACA_PYTHON=stand_in, **counts)
    assert done.stdout.splitlines()[0] == "world 32", done.stderr


@pytest.mark.parametrize("name", ["NNODES", "NPROC_PER_NODE"])
def test_a_number_of_processes_that_is_none_is_named(tmp_path, name):
    done = run("plan", "--config", "run.yaml", cwd=tmp_path, **{name: "many"})
    assert done.returncode == 2
    assert f"{name} = many" in done.stderr and "must be whole numbers" in done.stderr


def test_nothing_of_the_callers_folder_is_imported(tmp_path):
    (tmp_path / "data.py").write_text("raise SystemExit('the data.py of the caller')")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "__init__.py").write_text("raise SystemExit('the model of the caller')")
    shadowed = subprocess.run(
        [sys.executable, "-m", "tools.merge_datasets", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "the data.py of the caller" in shadowed.stderr, "the trap is one"
    done = run("merge", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--output-prefix" in done.stdout


def test_every_command_has_its_module():
    table = ITHACA_SH.read_text().split("TABLE")[1]
    modules = re.findall(r"\| (tools\.\w+) ", table)
    assert len(modules) == len(COMMANDS) - 2, "train is a script, and plan counts processes first"
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
