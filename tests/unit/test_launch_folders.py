"""The scripts of launch/ empty or fill no folder that they did not make."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(script: Path, *arguments: Path | str, **environment) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name != "ITHACA_PYTHON"}
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


@pytest.mark.parametrize(
    "script, variable", [("quickstart", "QUICKSTART_DIR"), ("extend", "EXTEND_DIR")]
)
def test_a_folder_of_somebody_else_is_not_used(tmp_path, script, variable):
    folder = tmp_path / "mine"
    for name in ("data/corpus.txt", "tokenizer/spm.model", "huggingface/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before = contents(folder)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("{}")
    arguments = (model, corpus) if script == "extend" else ()
    done = run(ROOT / "launch" / f"{script}.sh", *arguments, **{variable: str(folder)})
    assert done.returncode == 2, done.stderr
    assert "is not empty, and this script did not make it" in done.stderr
    assert contents(folder) == before


def test_help_makes_no_folder(tmp_path):
    folder = tmp_path / "new"
    done = run(ROOT / "launch" / "quickstart.sh", "--help", QUICKSTART_DIR=str(folder))
    assert "From nothing to a trained model" in done.stdout
    assert not folder.exists()


def test_an_environment_of_somebody_else_is_not_emptied(tmp_path):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "setup.sh", tmp_path / "launch")
    (tmp_path / "requirements.txt").write_text("")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "notes").write_text("mine")
    for _ in range(2):
        done = run(tmp_path / "launch" / "setup.sh")
        assert done.returncode == 1
        assert ".venv has no usable Python, and this script did not make it" in done.stderr
        assert (tmp_path / ".venv" / "bin" / "notes").read_text() == "mine"
