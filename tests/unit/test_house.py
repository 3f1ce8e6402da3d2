"""The order of the house: which folder may import which, where the heavy packages may be named,
what lies where."""

import ast
import fnmatch
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# folder -> the folders of this repository that it may import besides itself
MAY_IMPORT = {
    "parallel": set(),
    "data": set(),
    "model": {"parallel"},
    "pretrain": {"model", "parallel", "data"},
    "tools": {"pretrain", "model", "parallel", "data"},
    "launch": set(),
    "tests": {"launch", "tools", "pretrain", "model", "parallel", "data"},
}
TOP_LEVEL_FOLDERS = {*MAY_IMPORT, ".ci"}
KERNEL_PACKAGES = {"transformer_engine", "flash_attn", "apex"}


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """All modules that a file imports -> (dotted name, line, is inside a function); relative names
    start with "."."""
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), node.lineno, in_function))
        elif isinstance(node, ast.Call):
            name = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", None)
            )
            if (
                name in ("import_module", "__import__")
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                found.append((str(node.args[0].value), node.lineno, in_function))
        in_function = in_function or isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        )
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), False)
    return found


def violations(root: Path) -> list[str]:
    """Every import under `root` that breaks a rule, as "file:line: what is wrong"."""
    problems = []
    for folder, allowed in MAY_IMPORT.items():
        for path in sorted((root / folder).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            depth = len(path.relative_to(root).parts) - 1  # packages around the file
            for name, line, in_function in imports(path):
                package = name.split(".")[0]
                problem = None
                if name.startswith("."):
                    if len(name) - len(name.lstrip(".")) > depth:
                        problem = f"{name} leaves {folder}/: import other folders by their names"
                elif package in MAY_IMPORT and package not in allowed | {folder}:
                    problem = f"{folder} may not import {name}"
                elif package == "megatron" and not (
                    file == "parallel/layout.py"
                    or folder == "tests"
                    or file.startswith("tools/bench/")
                ):
                    problem = "only parallel/layout.py, tests/ and tools/bench/ import megatron"
                elif package in KERNEL_PACKAGES and not (
                    file == "model/attention_backends/choice.py" and in_function
                ):
                    problem = f"{package} is optional: import it inside its backend's function in model/attention_backends/choice.py"
                if problem:
                    problems.append(f"{file}:{line}: {problem}")
    return problems


def tracked_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.split("\0") if name]


def test_imports_follow_the_arrows():
    assert not (problems := violations(ROOT)), "\n".join(problems)


def test_no_other_top_level_folder():
    folders = {name.split("/")[0] for name in tracked_files() if "/" in name}
    assert folders <= TOP_LEVEL_FOLDERS, (
        f"not in the plan of the house: {sorted(folders - TOP_LEVEL_FOLDERS)}"
    )


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_each_folder_explains_itself(folder):
    assert (ROOT / folder / "README.md").is_file()


@pytest.mark.parametrize(
    "file, code, expected",
    [
        ("data/a.py", "import parallel.layout", "data may not import parallel.layout"),
        ("parallel/a.py", "from data import stream", "parallel may not import data"),
        (
            "model/a.py",
            "def f():\n    from pretrain.state import TrainState",
            "model may not import pretrain.state",
        ),
        (
            "model/a.py",
            "import importlib\nimportlib.import_module('data.stream')",
            "model may not import data.stream",
        ),
        ("pretrain/a.py", "import tools.plan", "pretrain may not import tools.plan"),
        ("tools/a.py", "import tests", "tools may not import tests"),
        ("launch/a.py", "import pretrain", "launch may not import pretrain"),
        ("data/a.py", "from ..parallel import layout", "leaves data/"),
        ("model/a.py", "import megatron.core", "import megatron"),
        ("tools/a.py", "from megatron.core import parallel_state", "import megatron"),
        ("model/attention_backends/choice.py", "import flash_attn", "flash_attn is optional"),
        (
            "model/gpt.py",
            "def f():\n    import transformer_engine.pytorch",
            "transformer_engine is optional",
        ),
    ],
)
def test_the_checker_sees_a_violation(tmp_path, file, code, expected):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    problems = violations(tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith(f"{file}:{code.count(chr(10)) + 1}: ") and expected in problems[0]


@pytest.mark.parametrize(
    "file, code",
    [
        (
            "model/a.py",
            "from parallel.layout import Axis\nimport torch.distributed\nfrom . import gpt",
        ),
        ("parallel/layout.py", "from megatron.core import parallel_state"),
        ("tools/bench/peer.py", "import megatron.core\nfrom pretrain import train"),
        ("model/attention_backends/choice.py", "def f():\n    import flash_attn"),
        ("tests/unit/test_a.py", "import tools.report, data.stream"),
        ("pretrain/a.py", "import data.stream, model.gpt, parallel.layout\nimport database"),
    ],
)
def test_the_checker_lets_good_code_pass(tmp_path, file, code):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert violations(tmp_path) == []


def test_no_folder_of_tests_is_left_out(pytestconfig):
    """pytest skips folders by name (`dist` and `build` by default), silently."""
    skipped = pytestconfig.getini("norecursedirs")
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert "dist" in folders and "unit" in folders
    for folder in folders:
        assert not any(
            fnmatch.fnmatch(folder, pattern) for pattern in skipped if pattern != "__pycache__"
        ), folder
