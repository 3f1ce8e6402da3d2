"""Whatever output path a tool is given, what it did not make stays byte for byte as it was."""

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.tokenizers.tokenizer import NullTokenizer
from data.writers.indexed_writer import IndexedWriter
from tests.huggingface import chat_folders as folders
from tests.run_folders import write_run
from tools import export_hf, import_hf, merge_datasets, report, split_dataset, train_tokenizer

PLACES = (
    "run",
    "run/iter_0000000",
    "run/iter_0000000/tokenizer",
    "hf",
    "hf/config.json",
    "metrics",
    "metrics/metrics.jsonl",
    "corpus",
    "corpus/web",
    "corpus/code",
    "corpus/web_0",
    "texts",
    "texts/a.txt",
    "foreign",
    "foreign/config.json",
    "empty",
    "link_to_run",
    "link_to_hf",
    "link_to_foreign",
    "link_to_file",
    "broken",
    "own/export",
    "own/link_to_export",
    "own/report",
    "own/spm",
    "own/foreign",
    "own",
    "work",
    "new",
    ".",
    "..",
)
"""Names in the folder that `world` makes, and some that are not there."""
ENDINGS = ("", "/", "/.", "/..", "/x/..", "/new", "/new/deep", "/../new", ".html", ".png", ".model")


@dataclass(frozen=True)
class Tool:
    """A tool's main function, its arguments but for the output, and what it may replace."""

    main: Callable[[], int]
    arguments: tuple[str, ...]
    output: str
    can_overwrite: bool
    own: tuple[str, ...]
    """What stands in the world that the tool itself made: it may be written over."""
    new: str
    """An output that works."""

    @property
    def module(self) -> str:
        return self.main.__module__


TOOLS = {
    "export": Tool(
        export_hf.main, ("--load", "../run"), "--output", True, ("own/export",), "fresh/out"
    ),
    "import": Tool(import_hf.main, ("--hf", "../hf"), "--save", False, (), "fresh/run"),
    "report": Tool(
        report.main, ("--load", "../metrics"), "--output", False, ("own/report",), "fresh/a.png"
    ),
    "train_tokenizer": Tool(
        train_tokenizer.main,
        ("--input", "../texts", "--vocab-size", "300"),
        "--output-prefix",
        True,
        ("own/spm.model",),
        "fresh/spm",
    ),
    "merge": Tool(
        merge_datasets.main,
        ("--input", "../corpus/web", "../corpus/code"),
        "--output-prefix",
        False,
        (),
        "fresh/all",
    ),
    "split": Tool(
        split_dataset.main,
        ("--input", "../corpus/web", "--parts", "2"),
        "--output-prefix",
        False,
        (),
        "fresh/part",
    ),
}


def call(tool: Tool, output: str, *, overwrite: bool) -> tuple[int, str]:
    """Run the tool's main function here -> (exit code, what it says on standard error)."""
    words = [tool.module, *tool.arguments, tool.output, output]
    if overwrite and tool.can_overwrite:
        words.append("--overwrite")
    said = io.StringIO()
    before = sys.argv
    sys.argv = words
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = tool.main()
    finally:
        sys.argv = before
    return code, said.getvalue()


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A folder with inputs of every tool, an earlier output of each, and what is somebody's own."""
    root = tmp_path_factory.mktemp("template") / "world"
    for name in ("work", "texts", "foreign", "empty", "corpus", "own/foreign"):
        (root / name).mkdir(parents=True)
    for name in ("foreign/config.json", "foreign/notes.txt", "own/foreign/model.safetensors"):
        (root / name).write_text("mine")
    (root / "texts" / "a.txt").write_text("\n".join(folders.TEXT))
    folders.write_generation(folders.write_tokenizer(folders.write_model(root / "hf")))
    write_run(root / "metrics")
    for name in ("web", "code", "web_0"):
        with IndexedWriter(str(root / "corpus" / name), np.uint16) as writer:
            for length in (5, 7, 3, 9):
                writer.add_document(np.arange(length))
            writer.finish(NullTokenizer(97).describe())
    with contextlib.chdir(root / "work"):
        for tool, output in (
            ("import", "../run"),
            ("export", "../own/export"),
            ("report", "../own/report.html"),
            ("report", "../own/report.png"),
            ("train_tokenizer", "../own/spm"),
        ):
            code, said = call(TOOLS[tool], output, overwrite=False)
            assert code == 0, (tool, said)
    for name, target in {
        "link_to_run": "run",
        "link_to_hf": "hf",
        "link_to_foreign": "foreign",
        "link_to_file": "texts/a.txt",
        "broken": "nowhere",
        "own/link_to_export": "export",
    }.items():
        (root / name).symlink_to(target)
    return root


def snapshot(root: Path) -> dict[str, object]:
    """Every path below `root` -> what it is; of a file also its content and when it was written."""
    found: dict[str, object] = {}
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = "folder"
        else:
            status = path.stat()
            found[name] = ("file", path.read_bytes(), status.st_ino, status.st_mtime_ns)
    return found


def check(template: Path, parent: Path, tool: Tool, output: str, *, overwrite: bool) -> int:
    """Call a tool in a copy of the world and compare the world before and after -> exit code."""
    # Folders around the world, as an output may lie above it.
    root = parent / "around"
    world = root / "a" / "b" / "world"
    shutil.copytree(template, world, symlinks=True)
    try:
        before = snapshot(root)
        with contextlib.chdir(world / "work"):
            code, said = call(tool, output, overwrite=overwrite)
            # Of a prefix the files lie beside what stands under that very name, a link perhaps.
            ending = ".x" if tool.output == "--output-prefix" else ""
            written = os.path.realpath(f"{output}{ending}").removesuffix(ending)
            place = os.path.relpath(written, root.resolve())
        after = snapshot(root)
    finally:
        shutil.rmtree(root)
    lost = [name for name, what in before.items() if after.get(name) != what]
    made = [name for name in after if name not in before]
    # An empty folder is nothing lost: to make x/../out or out/. some tools make x or out.
    files = [name for name in made if after[name] != "folder"]
    hint = f"{tool.module} {output} overwrite={overwrite}: exit {code}, lost {lost}, new {made}"
    assert code in (0, 2), hint
    if code == 2:
        errors = re.findall(r"^error: .*Fix: .*$", said, flags=re.MULTILINE)
        assert len(errors) == 1, (hint, said)
        assert "Traceback" not in said, hint
        assert lost == [], hint
        assert (files if tool.output == "--output-prefix" else made) == [], hint
    else:
        own = tuple(f"a/b/world/{name}" for name in tool.own)
        assert [name for name in lost if not own or not name.startswith(own)] == [], hint
        assert [name for name in files if not is_part(name, place)] == [], hint
        assert [name for name in made if ".partial" in name or ".replaced" in name] == [], hint
    assert list(parent.iterdir()) == [], hint
    return code


def is_part(name: str, place: str) -> bool:
    """Whether a path is an output at `place`, in it or around it."""
    return (
        place == "."
        or name.startswith(place)
        or place.startswith(f"{name}/")
        or (
            # The charts of a page are named after it.
            name.startswith(place.removesuffix(".html"))
        )
    )


@pytest.mark.parametrize("name", TOOLS)
def test_each_tool_writes_to_a_new_place(template, tmp_path, name):
    for spelled in (TOOLS[name].new, f"../{TOOLS[name].new}", str(tmp_path / "around" / "x")):
        output = spelled if "." in spelled or name != "report" else f"{spelled}.png"
        output = f"{output}.png" if name == "report" and not output.endswith(".png") else output
        assert check(template, tmp_path, TOOLS[name], output, overwrite=False) == 0, output


@pytest.mark.parametrize("name", ["export", "train_tokenizer"])
def test_an_own_output_is_replaced_only_when_asked(template, tmp_path, name):
    output = f"../{TOOLS[name].own[0].removesuffix('.model')}"
    assert check(template, tmp_path, TOOLS[name], output, overwrite=False) == 2
    assert check(template, tmp_path, TOOLS[name], output, overwrite=True) == 0


OUTPUTS = st.builds(
    lambda prefix, place, ending: f"{prefix}{place}{ending}",
    st.sampled_from(("../", "../run/../", "../link_to_foreign/../", "")),
    st.sampled_from(PLACES),
    st.sampled_from(ENDINGS),
)
QUIET = dict(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@settings(max_examples=40, derandomize=True, **QUIET)
@given(name=st.sampled_from(sorted(TOOLS)), output=OUTPUTS, overwrite=st.booleans())
def test_no_output_path_changes_what_the_tool_did_not_make(
    template, tmp_path, name, output, overwrite
):
    check(template, tmp_path, TOOLS[name], output, overwrite=overwrite)


@pytest.mark.long
@settings(max_examples=600, **QUIET)
@given(name=st.sampled_from(sorted(TOOLS)), output=OUTPUTS, overwrite=st.booleans())
def test_no_output_path_changes_what_the_tool_did_not_make_in_many_more(
    template, tmp_path, name, output, overwrite
):
    check(template, tmp_path, TOOLS[name], output, overwrite=overwrite)


@pytest.mark.parametrize("ending", ["", "/", "/..", "/x/..", "/new"])
@pytest.mark.parametrize("place", ["run", "run/iter_0000000", "link_to_run"])
def test_an_export_over_its_inputs_or_links_is_refused(template, tmp_path, place, ending):
    output = f"../{place}{ending}"
    assert check(template, tmp_path, TOOLS["export"], output, overwrite=True) == 2
