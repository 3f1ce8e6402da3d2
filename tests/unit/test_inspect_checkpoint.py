"""inspect-checkpoint lists, verifies and compares; its exit code tells damage and differences."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.files import checksum
from pretrain.checkpointing.folders import LATEST, MANIFEST
from pretrain.checkpointing.manifest import read_manifest, to_text
from pretrain.checkpointing.stored_tensors import StoredTensors
from tests.damaged import NAMES, flip, save
from tools.inspect_checkpoint import main
from tools.inspection.checkpoint_compare import _describe_difference, flatten

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path) -> Path:
    root = tmp_path / "run"
    for step in (1, 2):
        save(root, step, 1.5)
    return root


def look(capsys, *words: object) -> tuple[int, list[str], str]:
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err


def reseal(folder: Path, name: str) -> None:
    """Let the manifest vouch for a file that was changed."""
    checksums = read_manifest(folder).files | {name: checksum(folder / name)}
    (folder / MANIFEST).write_text(to_text(checksums))


def test_a_line_for_each_checkpoint_and_the_latest(run, capsys):
    (run / "iter_0000003").mkdir()
    (run / "iter_0000001").rename(run / "iter_0000001.damaged")
    code, lines, _ = look(capsys, "--load", run)
    assert code == 0 and lines[0] == f"{run}: 3 checkpoints" and lines[-1] == "latest: 2"
    assert lines[2].split()[0] == "iter_0000001.damaged" and "kept aside" in lines[2]
    step, tokens, *_, state = lines[3].split(maxsplit=6)
    assert (step, tokens, state) == ("2", "128", "small files verified")
    assert lines[4].endswith("not complete (no manifest.json)")


def test_only_verify_reads_the_tensors(run, capsys):
    shard = run / "iter_0000002" / "__0_0.distcp"
    flip(shard, 4 * shard.stat().st_size)
    assert look(capsys, "--load", run)[0] == 0
    code, lines, _ = look(capsys, "--load", run, "--verify")
    assert code == 1
    assert (
        f"  {shard} differs from its checksum in {MANIFEST} (one or more is damaged of: "
        in "\n".join(lines)
    )
    assert look(capsys, "--load", run, "--ckpt-step", "1", "--verify")[0] == 0
    assert look(capsys, "--load", run / "iter_0000001", "--verify")[0] == 0


@pytest.mark.parametrize("content", ["", "7", None])
def test_a_wrong_pointer_is_damage(run, capsys, content):
    (run / LATEST).unlink()
    if content is not None:
        (run / LATEST).write_text(content)
    assert look(capsys, "--load", run)[0] == 1


def test_equal_checkpoints_are_equal(run, capsys):
    code, lines, _ = look(capsys, "--compare", run / "iter_0000002", run)
    assert code == 0
    assert lines[-1] == f"tensors: {len(NAMES)} equal bit for bit, 0 differ"


def test_each_kind_of_difference_is_named(run, tmp_path, capsys):
    other = save(tmp_path / "other", 2, 1.5)
    # One tensor in one element, a setting, a count and a file of the tokenizer.
    shard = other / "__0_0.distcp"
    content = shard.read_bytes()
    at = content.index(torch.full((40,), 1.5).numpy().tobytes())
    changed = torch.full((40,), 1.5)
    changed[7] = 1.0
    shard.write_bytes(content[:at] + changed.numpy().tobytes() + content[at + 160 :])
    for name, old, new in (
        ("config.yaml", "vocab_size: 100", "vocab_size: 101"),
        ("progress.json", '"real_tokens": 0', '"real_tokens": 9'),
        ("tokenizer/tok.model", "A", "B"),
    ):
        text = (other / name).read_bytes().replace(old.encode(), new.encode(), 1)
        (other / name).write_bytes(text)
        reseal(other, name)
    reseal(other, shard.name)
    code, lines, _ = look(capsys, "--load", run, "--compare", "2", other)
    assert code == 1
    assert "  vocab_size: 100 | 101" in lines and "  real_tokens: 0 | 9" in lines
    assert any(line.startswith("  tokenizer/tok.model: ") for line in lines)
    assert lines[-1] == f"tensors: {len(NAMES) - 1} equal bit for bit, 1 differ"
    (named,) = [line for line in lines if line.startswith("  model.")]
    assert named.endswith(": 1 of 40 elements differ, by up to 0.5 (largest of A: 1.5)"), named


def test_damaged_checkpoints_are_not_compared(run, capsys):
    shard = run / "iter_0000002" / "__0_0.distcp"
    flip(shard, 4 * shard.stat().st_size)
    code, lines, _ = look(capsys, "--load", run, "--compare", "1", "2")
    assert code == 1 and len(lines) == 3 and "damaged" in lines[2]


def test_nan_and_minus_zero_count_by_their_bits():
    a = torch.tensor([0.0, float("nan"), 1.0])
    same = _describe_difference(a, torch.tensor([-0.0, float("nan"), 1.0]))
    assert same.startswith("1 of 3 elements differ, by up to nan")


def test_nested_values_get_dotted_names():
    assert flatten({"a": {"b": [1, {"c": None}]}, "d": []}) == {
        "a.b.0": "1",
        "a.b.1.c": "None",
        "d": "[]",
    }


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "load, compare: none given"),
        (["--compare", "x"], "compare = x: must be two checkpoints"),
        (["--load", "{run}", "--ckpt-step", "9"], "iter_0000009: missing or not complete"),
        (["--load", "{run}/nowhere"], "no checkpoint is there"),
        (["--compare", "{run}", "{run}/nowhere"], "no checkpoint is published there"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_line(run, capsys, words, said):
    code, lines, error = look(capsys, *[word.format(run=run) for word in words])
    assert (code, lines) == (2, []) and said in error and len(error.splitlines()) == 1


def test_a_reader_that_leaves_changes_no_exit_code(run):
    flip(run / "iter_0000002" / "config.yaml", 9)
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.inspect_checkpoint", "--load", str(run)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=120)) == (b"", 1)
    process.stderr.close()


def test_a_tensor_is_read_by_itself_and_the_table_once(run, monkeypatch):
    stored = StoredTensors(run / "iter_0000001")
    (run / "iter_0000001" / ".metadata").unlink()
    assert stored.read(NAMES[0]).tolist() == [[1.5] * 5] * 8
