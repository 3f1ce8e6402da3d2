"""Outputs never take the place of what a tool did not make, and appear whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from tools.outputs.files import Input, check_file, relation
from tools.outputs.folder import MARKER, NewFolder

MAKER = "tools.test"


def tree(root) -> dict[str, str]:
    """Every path below `root` -> its kind and content."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = path.read_text()
    return found


def write(output, text="new", inputs=(), overwrite=False, maker=MAKER):
    with NewFolder("output", output, maker, inputs=inputs, overwrite=overwrite) as new:
        (new.path / "inside").mkdir()
        (new.path / "inside" / "weights").write_text(text)
        new.publish()


def refuse(root, output, message, inputs=(), overwrite=True):
    before = tree(root)
    with pytest.raises(ValueError, match=message) as error:
        write(output, inputs=inputs, overwrite=overwrite)
    assert "\n" not in str(error.value)
    assert "Fix: " in str(error.value)
    assert tree(root) == before


def test_a_folder_appears_whole_with_a_list_of_its_files(tmp_path):
    write(tmp_path / "a" / "b" / "out")
    assert tree(tmp_path / "a" / "b") == {
        "out": "folder",
        "out/inside": "folder",
        "out/inside/weights": "new",
        f"out/{MARKER}": (tmp_path / "a" / "b" / "out" / MARKER).read_text(),
    }
    marker = json.loads((tmp_path / "a" / "b" / "out" / MARKER).read_text())
    checksum = xxhash.xxh3_128_hexdigest(b"new")
    assert marker == {
        "made_by": MAKER,
        "files": {"inside/weights": 3},
        "checksums": {"inside/weights": checksum},
    }


def test_a_failure_leaves_nothing_not_even_parents(tmp_path):
    with (
        pytest.raises(RuntimeError, match="interrupted"),
        NewFolder("output", tmp_path / "a" / "b" / "out", MAKER, inputs=[], overwrite=False) as new,
    ):
        (new.path / "weights").write_text("half")
        raise RuntimeError("interrupted")
    assert tree(tmp_path) == {}


def test_only_an_own_folder_is_replaced_and_only_when_asked(tmp_path):
    output = tmp_path / "out"
    write(output, "old")
    refuse(tmp_path, output, "exists already", overwrite=False)
    write(output, "new", overwrite=True)
    assert (output / "inside" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_another_maker_stays(tmp_path):
    write(tmp_path / "out", maker="tools.other")
    refuse(tmp_path, tmp_path / "out", "was not made by tools.test")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    refuse(tmp_path, tmp_path / "foreign", "was not made by tools.test")


@pytest.mark.parametrize(
    "name, kind",
    [
        ("notes.txt", "file"),
        ("inside/notes.txt", "file"),
        ("evals", "folder"),
        ("inside/link", "link"),
        ("inside/weights", "changed"),
        ("inside/weights", "same size"),
    ],
)
def test_an_own_folder_with_something_else_in_it_stays(tmp_path, name, kind):
    write(tmp_path / "out")
    path = tmp_path / "out" / name
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path)
    else:
        path.write_text("own" if kind == "same size" else "mine")
    refuse(tmp_path, tmp_path / "out", f"holds {name}, which")


def test_an_empty_folder_is_taken_only_when_asked(tmp_path):
    (tmp_path / "out").mkdir()
    refuse(tmp_path, tmp_path / "out", "exists already", overwrite=False)
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "inside" / "weights").read_text() == "new"


def test_files_links_and_places_that_cannot_hold_a_folder_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "link": "is a link",
        "link/": "is a link",
        "broken": "is a link",
        "loop": "is a link",
        "file/out": "is not a folder",
        "file/a/out": "is not a folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            write(tmp_path / name, overwrite=True)
    for name in ("file", "pipe"):
        with pytest.raises(ValueError, match="is not a folder"):
            write(tmp_path / name, overwrite=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"file", "folder", "link", "broken", "loop", "pipe"}
    assert (tmp_path / "file").read_text() == "mine"


def test_the_current_folder_and_those_around_it_are_refused(tmp_path, monkeypatch):
    write(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out" / "inside")
    for name in ("out", "out/inside/..", "x/../out"):
        refuse(tmp_path, tmp_path / name, "is the current folder, or holds it")
    for name in (".", "..", "/"):
        with pytest.raises(ValueError, match="current folder"):
            write(Path(name), overwrite=True)


def test_a_mount_point_is_refused():
    with pytest.raises(ValueError, match="is a mount point"):
        write(Path("/proc"), overwrite=True)


def test_relations_of_paths(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "file").write_text("read")
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "text").symlink_to(tmp_path / "in" / "file")
    source = tmp_path / "in"
    for output, expected in {
        "in": "is",
        "link": "is",
        "in/": "is",
        "in/sub/..": "is",
        "x/../in": "is",
        "link/sub/..": "is",
        "in/sub": "lies in",
        "link/new/deep": "lies in",
        "link/sub": "lies in",
        ".": "contains",
        "in/..": "contains",
        "link/..": "contains",
        "input": None,
        "i": None,
        "out": None,
        "in/../other": None,
    }.items():
        assert relation(tmp_path / output, source) == expected, output
    assert relation(tmp_path / "in", tmp_path / "in" / "file") == "contains"
    assert relation(tmp_path / "in" / "sub", tmp_path / "in" / "sub" / "..") == "lies in"
    # The link itself lies in the folder, though what it names does not.
    assert relation(tmp_path / "out", tmp_path / "out" / "text") == "contains"


def test_inputs_are_refused_by_the_name_that_the_user_knows(tmp_path):
    write(tmp_path / "run" / "hf")
    text = tmp_path / "run" / "text"
    text.write_text("read")
    inputs = [Input("--load", tmp_path / "run" / "hf")]
    refuse(tmp_path, tmp_path / "run" / "hf", "is --load", inputs)
    refuse(tmp_path, tmp_path / "run" / "hf" / "inside", "lies in --load", inputs)
    refuse(tmp_path, tmp_path / "run", "contains --load", inputs)
    refuse(tmp_path, tmp_path / "run", "contains --text", [Input("--text", text)])


def test_what_an_interruption_left_is_taken_up(tmp_path, capsys):
    output = tmp_path / "out"
    code = (
        "import os, sys; from pathlib import Path; from tools.outputs.folder import NewFolder\n"
        f"new = NewFolder('output', Path({str(output)!r}), {MAKER!r}, inputs=[], overwrite=False)\n"
        "new.__enter__(); (new.path / 'weights').write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    assert (tmp_path / ".out.partial" / "weights").exists()
    write(output)
    assert "which an interrupted tools.test had left" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replacement_cut_between_its_renames_is_undone(tmp_path):
    output = tmp_path / "out"
    write(output, "old")
    os.rename(output, tmp_path / ".out.replaced")
    with pytest.raises(ValueError, match="exists already"):
        write(output, "new")
    assert (output / "inside" / "weights").read_text() == "old"
    os.rename(output, tmp_path / ".out.replaced")
    write(output, "new", overwrite=True)
    assert (output / "inside" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def write_until(number: int, output) -> int:
    """Replace `output` in a process that ends before its change `number` -> its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [number]

    def counted(change):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return change(*arguments, **options)

        return call

    for name in ("mkdir", "rename", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    try:
        write(output, "new", overwrite=True)
    finally:
        os._exit(0)


def test_a_kill_before_any_change_leaves_the_old_or_the_new_folder(tmp_path, capsys):
    output = tmp_path / "out"
    write(output, "old")
    kills = 0
    while write_until(kills + 1, output) == 9:
        kills += 1
        place = output if output.exists() else tmp_path / ".out.replaced"
        assert (place / "inside" / "weights").read_text() in ("old", "new"), kills
        write(output, "old", overwrite=True)
        assert (output / "inside" / "weights").read_text() == "old", kills
        assert [path.name for path in tmp_path.iterdir()] == ["out"], kills
    assert kills >= 6, kills
    assert (output / "inside" / "weights").read_text() == "new"


@pytest.mark.parametrize("name", [".out.partial", ".out.replaced"])
def test_a_foreign_folder_under_a_hidden_name_stays(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("mine")
    refuse(tmp_path, tmp_path / "out", f"{name} is in the way, and was not made by tools.test")


def test_a_second_writer_of_the_same_folder_is_refused(tmp_path):
    output = tmp_path / "out"
    with NewFolder("output", output, MAKER, inputs=[], overwrite=False) as first:
        (first.path / "weights").write_text("first")
        with pytest.raises(ValueError, match="another tools.test is writing it now"):
            write(output)
        assert (first.path / "weights").read_text() == "first"
        first.publish()
    assert (output / "weights").read_text() == "first"


def test_what_came_meanwhile_stays(tmp_path):
    output = tmp_path / "out"
    for overwrite in (False, True):
        with (
            pytest.raises(ValueError, match="output = "),
            NewFolder("output", output, MAKER, inputs=[], overwrite=overwrite) as new,
        ):
            output.mkdir()
            (output / "mine").write_text("mine")
            new.publish()
        assert tree(tmp_path) == {"out": "folder", "out/mine": "mine"}
        (output / "mine").unlink()
        output.rmdir()


def test_files_are_written_over_only_where_they_are_the_tools_own(tmp_path):
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "ours.html").write_text("ours")
    (tmp_path / "link.html").symlink_to("ours.html")
    (tmp_path / "broken.html").symlink_to("nowhere")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "same.html").hardlink_to(tmp_path / "ours.html")
    inputs = [Input("--input", tmp_path / "ours.html")]

    def is_ours(path):
        return path.read_text() == "ours"

    check_file("output", tmp_path / "ours.html", MAKER, is_ours)
    check_file("output", tmp_path / "new" / "page.html", MAKER, is_ours)
    check_file("output", tmp_path / "page.html", MAKER, is_ours, [Input("--load", tmp_path)])
    for name, message in {
        "mine.html": "exists, and was not made by tools.test",
        "link.html": "is a link",
        "broken.html": "is a link",
        "folder.html": "is not a file",
        "ours.html": "is --input",
        "same.html": "is --input",
        "mine.html/page.html": "is not a folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_file("output", tmp_path / name, MAKER, is_ours, inputs)


def test_a_plot_of_lengths_is_written_over_only_a_picture_of_ours(tmp_path):
    import numpy as np

    from tools.inspection.length_plot import plot_lengths

    path = tmp_path / "lengths.png"
    for _ in range(2):
        plot_lengths({"web": np.array([5, 70, 3000])}, str(path))
    path.write_bytes(b"\x89PNG of somebody else")
    with pytest.raises(ValueError, match="plot = .*exists, and was not made by tools.inspect_data"):
        plot_lengths({"web": np.array([5, 70, 3000])}, str(path))
    assert path.read_bytes() == b"\x89PNG of somebody else"
