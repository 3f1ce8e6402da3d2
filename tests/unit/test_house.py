"""The order of the house: which folder may import which, that no files import each other in a
circle, where the heavy packages may be named, what lies where, and that the pages point at what
exists."""

import ast
import fnmatch
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# folder -> the folders of this repository that it may import besides itself
MAY_IMPORT = {
    "parallel": set(),
    "data": set(),
    "model": {"parallel"},
    "pretrain": {"model", "parallel", "data"},
    "tools": {"launch", "pretrain", "model", "parallel", "data"},
    "launch": set(),
    "tests": {"launch", "tools", "pretrain", "model", "parallel", "data"},
}
TOP_LEVEL_FOLDERS = {*MAY_IMPORT, ".ci"}
KERNEL_PACKAGES = {"transformer_engine", "flash_attn", "apex"}


@dataclass(frozen=True)
class Import:
    """An import in a file; a relative `module` starts with "."."""

    module: str
    line: int
    in_function: bool
    names: tuple[str, ...] = ()
    """What `from module import ...` names: attributes of the module, or modules themselves."""


def is_import_call(node: ast.Call) -> bool:
    """Whether a call is `import_module("...")` or `__import__("...")` with a constant name."""
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
    return name in ("import_module", "__import__") and constant


def imports(path: Path) -> list[Import]:
    """List all imports of a file, those inside functions and under TYPE_CHECKING too."""
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = tuple(alias.name for alias in node.names)
            found.append(Import(module, node.lineno, in_function, names))
        elif isinstance(node, ast.Call) and is_import_call(node):
            found.append(Import(str(node.args[0].value), node.lineno, in_function))
        functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        in_function = in_function or isinstance(node, functions)
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), False)
    return found


# -- arrows between folders


def violation(file: str, found: Import) -> str | None:
    """Say which rule an import of `file` breaks, if any."""
    folder, *inner = file.split("/")
    module = found.module
    package = module.split(".")[0]
    if module.startswith("."):
        dots = len(module) - len(module.lstrip("."))
        leaves = dots > len(inner)
        return f"{module} leaves {folder}/: import other folders by their names" if leaves else None
    if package in MAY_IMPORT and package not in MAY_IMPORT[folder] | {folder}:
        return f"{folder} may not import {module}"
    if package == "megatron":
        allowed = file == "parallel/layout.py" or file.startswith(("tests/", "tools/bench/"))
        rule = "only parallel/layout.py, tests/ and tools/bench/ import megatron"
        return None if allowed else rule
    if package in KERNEL_PACKAGES:
        home = "model/attention_backends/"
        allowed = file.startswith(home) and found.in_function
        rule = f"{package} is optional: import it inside its backend's function in {home}"
        return None if allowed else rule
    return None


def violations(root: Path) -> list[str]:
    """List every import under `root` that breaks a rule, as "file:line: what is wrong"."""
    problems = []
    for folder in MAY_IMPORT:
        for path in sorted((root / folder).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            for found in imports(path):
                if problem := violation(file, found):
                    problems.append(f"{file}:{found.line}: {problem}")
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
    unknown = sorted(folders - TOP_LEVEL_FOLDERS)
    assert not unknown, f"not in the plan of the house: {unknown}"


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_each_folder_explains_itself(folder):
    assert (ROOT / folder / "README.md").is_file()


LATER_IMPORT = "def f():\n    from pretrain.state import TrainState"
IMPORT_BY_NAME = "import importlib\nimportlib.import_module('data.stream')"
LATER_KERNEL = "def f():\n    import transformer_engine.pytorch"
EAGER_KERNEL = "model/attention_backends/flash.py"


@pytest.mark.parametrize(
    "file, code, expected",
    [
        ("data/a.py", "import parallel.layout", "data may not import parallel.layout"),
        ("parallel/a.py", "from data import stream", "parallel may not import data"),
        ("model/a.py", LATER_IMPORT, "model may not import pretrain.state"),
        ("model/a.py", IMPORT_BY_NAME, "model may not import data.stream"),
        ("pretrain/a.py", "import tools.plan", "pretrain may not import tools.plan"),
        ("tools/a.py", "import tests", "tools may not import tests"),
        ("launch/a.py", "import pretrain", "launch may not import pretrain"),
        ("data/a.py", "from ..parallel import layout", "leaves data/"),
        ("model/a.py", "import megatron.core", "import megatron"),
        ("tools/a.py", "from megatron.core import parallel_state", "import megatron"),
        (EAGER_KERNEL, "import flash_attn", "flash_attn is optional"),
        ("model/gpt.py", LATER_KERNEL, "transformer_engine is optional"),
    ],
)
def test_the_checker_sees_a_violation(tmp_path, file, code, expected):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    problems = violations(tmp_path)
    assert len(problems) == 1
    last_line = code.count("\n") + 1
    assert problems[0].startswith(f"{file}:{last_line}: ") and expected in problems[0]


OWN_FOLDERS = "from parallel.layout import Axis\nimport torch.distributed\nfrom . import gpt"


@pytest.mark.parametrize(
    "file, code",
    [
        ("model/a.py", OWN_FOLDERS),
        ("parallel/layout.py", "from megatron.core import parallel_state"),
        ("tools/bench/peer.py", "import megatron.core\nfrom pretrain import train"),
        ("model/attention_backends/flash.py", "def f():\n    import flash_attn"),
        ("tests/unit/test_a.py", "import tools.report, data.stream"),
        ("pretrain/a.py", "import data.stream, model.gpt, parallel.layout\nimport database"),
    ],
)
def test_the_checker_lets_good_code_pass(tmp_path, file, code):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert violations(tmp_path) == []


# -- circles of files


def file_of(root: Path, module: str) -> str | None:
    """Name the file of a module of this repository, "a.b" -> "a/b.py", if it is one."""
    base = root / module.replace(".", "/")
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path.relative_to(root).as_posix()
    return None


def absolute_module(file: str, module: str) -> str:
    """Write a module that `file` imports without leading dots."""
    name = module.lstrip(".")
    dots = len(module) - len(name)
    if not dots:
        return module
    package = Path(file).parts[:-dots]
    return ".".join([*package, *([name] if name else [])])


def import_graph(root: Path) -> dict[str, set[str]]:
    """Map each file under `root` to the files of `root` that it imports, anywhere in it."""
    graph = {}
    for folder in MAY_IMPORT:
        for path in sorted((root / folder).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            wanted = graph.setdefault(file, set())
            for found in imports(path):
                module = absolute_module(file, found.module)
                # `from package import name` may name a module of the package, or something in it.
                modules = [f"{module}.{name}" for name in found.names]
                files = [file_of(root, name) or file_of(root, module) for name in modules]
                wanted.update(files or [file_of(root, module)])
            wanted -= {None, file}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Find the sets of files that all reach each other (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(file: str) -> None:
        # The lowest number that is reached from a file names the circle that it belongs to.
        number[file] = lowest[file] = len(number)
        stack.append(file)
        for other in sorted(graph.get(file, ())):
            if other not in number:
                visit(other)
            if other in stack:
                lowest[file] = min(lowest[file], lowest[other])
        if lowest[file] == number[file]:
            # Nothing below reaches further up: what lies above it on the stack is its circle.
            at = stack.index(file)
            members = set(stack[at:])
            del stack[at:]
            if len(members) > 1:
                found.append(members)

    for file in sorted(graph):
        if file not in number:
            visit(file)
    return found


def test_no_files_import_each_other_in_a_circle():
    found = circles(import_graph(ROOT))
    assert not found, "\n".join(" <-> ".join(sorted(members)) for members in found)


def test_a_circle_is_found_however_it_is_closed(tmp_path):
    files = {
        "data/a.py": "from data import b",
        "data/b.py": "from .rooms.c import x",
        "data/rooms/__init__.py": "",
        "data/rooms/c.py": "def f():\n    import data.a",
        "data/d.py": "from . import a",
    }
    for file, code in files.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    assert circles(import_graph(tmp_path)) == [{"data/a.py", "data/b.py", "data/rooms/c.py"}]


def test_files_that_only_share_a_third_are_no_circle():
    assert circles({"a": {"c"}, "b": {"a", "c"}, "c": set()}) == []


# -- pointers of the pages

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?<![\w./*{<-])((?:\.\./)*[\w-][\w./-]*\.(?:py|sh))(?:: ?([A-Za-z_][\w.]*))?")
MODULE = re.compile(r"-m ((?:" + "|".join(MAY_IMPORT) + r")(?:\.\w+)*)")


def names_in(path: Path) -> set[str]:
    """List what a file defines: `function`, `CONSTANT`, `Class`, `Class.member` and `member`."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".sh":
        return set(re.findall(r"^([\w-]+)\(\)", text, re.MULTILINE))
    names = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                defined = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                defined = [target.id for target in targets if isinstance(target, ast.Name)]
            else:
                continue
            names.update(defined, (prefix + name for name in defined))
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(text).body, "")
    return names


def heading_anchors(page: Path) -> set[str]:
    """List the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def wrong_link(page: Path, target: str) -> bool:
    if "://" in target or target.startswith("mailto:"):
        return False
    file, _, anchor = target.partition("#")
    path = (page.parent / file) if file else page
    if not path.exists():
        return True
    return bool(anchor) and path.suffix == ".md" and anchor not in heading_anchors(path)


def wrong_pointers(root: Path, page: Path) -> list[str]:
    """List the pointers of a page that lead nowhere: links, `path/file.py`, `file.py: Name` and
    `-m package.module`. A path starts at the page's folder or at `root`."""
    text = page.read_text(encoding="utf-8")
    prose = FENCE.sub("", text)
    wrong = [target for target in LINK.findall(prose) if wrong_link(page, target)]
    wrong += [name for name in MODULE.findall(text) if not module_exists(root, name)]
    for code in CODE.findall(prose) + FENCE.findall(text):
        for file, name in FILE.findall(code):
            folders = [page.parent, root]
            if file.endswith(".sh"):
                folders.append(root / "launch")  # its scripts are known by their bare names
            places = [folder / file for folder in folders]
            path = next((path for path in places if path.is_file()), None)
            if path is None:
                wrong.append(file)
            # In a block, what stands behind a script's name and a colon is what it says.
            elif name and "\n" not in code and name not in names_in(path):
                wrong.append(f"{file}: {name}")
    return wrong


def module_exists(root: Path, module: str) -> bool:
    folder = root / module.replace(".", "/")
    return file_of(root, module) is not None or (folder / "__main__.py").is_file()


def pages() -> list[str]:
    inner = [path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.md")]
    inner = [path for path in inner if path.name not in ("FLAGS.md", "SETTINGS.md", "RESULTS.md")]
    own = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.is_file()]
    return [path.relative_to(ROOT).as_posix() for path in own + sorted(inner)]


@pytest.mark.parametrize("page", pages())
def test_every_pointer_of_a_page_leads_somewhere(page):
    wrong = wrong_pointers(ROOT, ROOT / page)
    assert not wrong, f"{page} points at what does not exist: {wrong}"


PAGE = """
# A page
[good](room/b.py), [a heading](#a-page), [elsewhere](https://example.org/none.py),
[gone](none.md), [no heading](#b-page); `room/b.py`, `data/room/b.py`, `b.py`,
`room/b.py: Box.width`, `room/b.py: LIMIT`, `room/b.py: find`, `room/b.py: Box.depth`;
`python -m data.room.b`, `python -m data.c`
```bash
bash room/none.sh --config run.yaml
```
"""


def test_a_pointer_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "data/room").mkdir(parents=True)
    code = "LIMIT = 3\n\n\nclass Box:\n    width: int = 1\n\n\ndef find(): ...\n"
    (tmp_path / "data/room/b.py").write_text(code)
    page = tmp_path / "data/README.md"
    page.write_text(PAGE)
    expected = ["none.md", "#b-page", "data.c", "b.py", "room/b.py: Box.depth", "room/none.sh"]
    assert wrong_pointers(tmp_path, page) == expected


# -- folders of tests


def test_no_folder_of_tests_is_left_out(pytestconfig):
    """pytest skips folders by name (`dist` and `build` by default), silently."""
    patterns = [
        name for name in pytestconfig.getini("norecursedirs") if name not in ("__pycache__",)
    ]
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert {"dist", "unit"} <= folders
    for folder in folders:
        hidden = [pattern for pattern in patterns if fnmatch.fnmatch(folder, pattern)]
        assert not hidden, f"{folder} is skipped by {hidden}"
