"""A restart takes the newest checkpoint that is not damaged, and keeps those that are."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from parallel.layout import Axis
from pretrain import plan
from pretrain.checkpointing import checkpoint, manifest
from pretrain.checkpointing.damage import find_restart
from pretrain.checkpointing.folders import LATEST, MANIFEST, find_published, read_pointer
from pretrain.checkpointing.manifest import DamagedCheckpoint, read_manifest, verify_files
from pretrain.checkpointing.set_aside import mend_save_folder
from pretrain.checkpointing.start import Start, find_start
from pretrain.config.load import load_config
from tests.damaged import NAMES, flip, save

RANK_0 = Axis("world", 0, 1, (0,), None)


def start(**settings) -> Start:
    argv = ["--model", "tiny", "--vocab-size", "100"]
    for name, value in settings.items():
        argv += ["--" + name.replace("_", "-"), str(value)]
    return find_start(load_config(argv).checkpoint)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Checkpoints of steps 1, 2 and 3."""
    root = tmp_path_factory.mktemp("three") / "run"
    for step in (1, 2, 3):
        save(root, step, float(step))
    return root


@pytest.fixture
def run(three, tmp_path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "run"))


SMALL_FILES = ["config.yaml", "progress.json", MANIFEST, "tokenizer/tok.model"]


@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_restart_passes_over_a_checkpoint_with_a_damaged_small_file(run, name):
    flip(run / "iter_0000003" / name, 40)
    found = start(save=run)
    assert found.folder == run / "iter_0000002" and found.is_restart and found.needs_mending
    (note,) = found.notes
    assert f"{run / 'iter_0000003' / name} " in note and f"taken: {found.folder}" in note


def test_a_checkpoint_that_goes_while_it_is_read_tells_of_another_run(run, monkeypatch):
    """Plans are made before the folder is locked: the run that holds it deletes old ones."""

    def find_and_lose(settings):
        found = find_start(settings)
        shutil.rmtree(found.folder)
        return found

    monkeypatch.setattr(plan, "find_start", find_and_lose)
    argv = ["--model", "tiny", "--mock-data", "--vocab-size", "100", "--seq-length", "64"]
    argv += ["--global-batch-size", "4", "--train-iters", "5", "--lr", "1e-3", "--save", str(run)]
    with pytest.raises(ValueError, match="iter_0000003 was deleted .* another run trains into"):
        plan.make_plan(load_config(argv), 1)


@pytest.mark.parametrize("name", ["config.yaml", MANIFEST])
def test_a_file_that_the_disk_has_lost_is_damage(run, monkeypatch, name):
    lost = run / "iter_0000003" / name

    def read(self, *args, **more):
        if Path(self) == lost:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return original(self, *args, **more)

    place, attribute = (Path, "read_bytes") if name == MANIFEST else (manifest, "checksum")
    original = getattr(place, attribute)
    monkeypatch.setattr(place, attribute, read)
    found = start(save=run)
    assert found.folder == run / "iter_0000002"
    assert f"{lost} cannot be read (Input/output error)" in found.notes[0], found.notes


def test_other_errors_of_the_file_system_are_no_damage(run, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(manifest, "checksum", refuse)
    with pytest.raises(PermissionError):
        start(save=run)


def test_several_damaged_ones_in_a_row_are_passed_over(run):
    flip(run / "iter_0000003" / "config.yaml", 5)
    (run / "iter_0000002" / "progress.json").unlink()
    found = start(save=run)
    assert found.folder == run / "iter_0000001"
    assert [damage.folder.name for damage in found.damaged] == ["iter_0000003", "iter_0000002"]
    assert "progress.json is missing" in found.notes[1]


def test_where_none_is_left_the_refusal_names_them_all(run):
    for step in (1, 2, 3):
        flip(run / f"iter_000000{step}" / "config.yaml", 5)
    with pytest.raises(ValueError, match="holds no checkpoint that can be used") as refusal:
        start(save=run)
    for step in (1, 2, 3):
        assert f"iter_000000{step}/config.yaml differs" in str(refusal.value)
    assert "Fix: put a good copy" in str(refusal.value)


def test_only_checkpoints_kept_aside_are_no_fresh_start(run):
    for step in (1, 2, 3):
        (run / f"iter_000000{step}").rename(run / f"iter_000000{step}.damaged")
    (run / LATEST).unlink()
    with pytest.raises(ValueError, match=r"iter_0000003.damaged was found damaged before"):
        start(save=run)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "must hold an iteration number"),
        (b"\xff\xfe", "must hold an iteration number"),
        (b"9", "names iter_0000009, which is missing or not complete"),
        (b"2" + b"\n" + b" " * 32 + b"\n", "= 2: does not fit the checksum in its second line"),
        (None, "is missing"),
    ],
)
def test_a_wrong_pointer_leads_to_the_newest_complete_checkpoint(run, content, said):
    (run / LATEST).unlink()
    if content is not None:
        (run / LATEST).write_bytes(content)
    found = start(save=run)
    assert found.folder == run / "iter_0000003" and found.needs_mending
    assert said in found.notes[0] and "newest complete checkpoint is taken" in found.notes[0]
    mend_save_folder(found, RANK_0)
    assert read_pointer(run) == 3 and not start(save=run).notes


def test_a_person_can_go_back_by_writing_the_number(run):
    (run / LATEST).write_text("2\n")
    found = start(save=run)
    assert found.folder == run / "iter_0000002" and not found.needs_mending and not found.notes


def test_a_pointer_to_nothing_in_an_empty_folder_is_refused(tmp_path):
    (tmp_path / LATEST).write_text("5")
    with pytest.raises(ValueError, match="names iter_0000005, which is missing"):
        start(save=tmp_path)


def test_a_chosen_checkpoint_that_is_damaged_is_refused_with_the_one_before_it(run, tmp_path):
    flip(run / "iter_0000003" / "config.yaml", 5)
    for chosen in (dict(load=run), dict(load=run, ckpt_step=3), dict(pretrained_checkpoint=run)):
        with pytest.raises(DamagedCheckpoint, match="config.yaml differs .* --ckpt-step 2, the"):
            start(save=tmp_path / "new", **chosen)
    assert start(load=run, ckpt_step=2).folder == run / "iter_0000002"


def test_damaged_ones_are_kept_aside_with_an_event_and_a_new_save_takes_the_name(run):
    (run / "events.jsonl").write_text('{"event": "start", "step": 0}\n{"event": "sa')
    for _ in range(2):
        flip(run / "iter_0000003" / "config.yaml", 5)
        mend_save_folder(start(save=run), RANK_0)
        assert find_published(run) == run / "iter_0000002"
        assert not (run / "iter_0000003").exists()
        save(run, 3)
        assert start(save=run).folder == run / "iter_0000003"
    assert {path.name for path in run.glob("*.damaged*")} == {
        "iter_0000003.damaged",
        "iter_0000003.damaged2",
    }
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "damaged", "damaged"]
    assert events[1]["step"] == 2 and events[1]["tokens"] == 128
    assert "Kept as iter_0000003.damaged; the run goes on from" in events[1]["text"]


# ---------------------------------------------------------------- what is found in the files


def test_a_missing_shard_is_found_before_anything_is_planned(run):
    (run / "iter_0000003" / "__0_0.distcp").unlink()
    found = start(save=run)
    assert found.folder == run / "iter_0000002"
    assert "__0_0.distcp is missing (damaged: model.embedding.weight" in found.notes[0]


def test_a_truncated_shard_names_the_tensors_at_its_end(run):
    shard = run / "iter_0000003" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    (problem,) = verify_files(run / "iter_0000003")
    last = "optimizer.output.weight.exp_avg"
    assert problem.endswith(
        f"__0_0.distcp differs from its checksum in {MANIFEST} (damaged: {last})"
    )


def test_files_that_no_save_wrote_are_noted_where_they_are_not_read(run):
    (run / "iter_0000003" / "notes.txt").write_text("mine")
    found = start(save=run)
    assert found.folder == run / "iter_0000003" and not found.damaged
    assert found.notes[0].endswith("holds what no save wrote, and what is not read: notes.txt")


@pytest.mark.parametrize("folder", ["tokenizer", "huggingface"])
def test_files_that_no_save_wrote_are_damage_where_they_would_be_read(run, folder):
    (run / "iter_0000003" / folder / "added.json").write_text("{}")
    found = start(save=run)
    assert found.folder == run / "iter_0000002"
    assert f"{folder}/added.json is not in {MANIFEST}" in found.notes[0]


def test_a_checkpoint_of_an_older_version_is_loaded_with_a_line(run):
    manifest = run / "iter_0000003" / MANIFEST
    files = read_manifest(manifest.parent).files
    manifest.write_text(json.dumps({"algorithm": "xxh3_128", "files": files}, indent=1))
    (run / LATEST).write_text("3")
    found = find_restart(run)
    assert found.folder == manifest.parent and not found.damaged
    assert "an older version saved it" in found.notes[0] and len(found.notes) == 1


def test_a_flipped_bit_names_the_tensor_where_the_file_tells_it(run, monkeypatch):
    folder = run / "iter_0000003"
    shard = folder / "__0_0.distcp"
    flip(shard, 8 * shard.read_bytes().index(torch.full((40,), 3.0).numpy().tobytes()))
    (problem,) = verify_files(folder)
    # torch's own checksums are not written: one of all that are there.
    assert problem.endswith(f"(one or more is damaged of: {', '.join(NAMES)})")
    # Older versions wrote them.
    monkeypatch.setattr("pretrain.checkpointing.hashing_writer.set_crc32_options", lambda _: None)
    folder = save(run, 4, 3.0)
    shard = folder / "__0_0.distcp"
    flip(shard, 8 * shard.read_bytes().index(torch.full((40,), 3.0).numpy().tobytes()))
    (problem,) = verify_files(folder)
    assert problem.endswith(f"(damaged: {NAMES[0]})")


# ---------------------------------------------------------------- tensors that do not fit


def load_refusal(folder: Path, **shapes: tuple[int, ...]) -> str:
    """Ask a checkpoint for tensors of these shapes -> its refusal, or nothing."""
    tensors = {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}
    try:
        checkpoint.load(folder, tensors, RANK_0)
    except ValueError as error:
        return str(error)
    return ""


MODEL = {"model__embedding__weight": (8, 5), "model__output__weight": (8, 5)}
MOMENT = {"optimizer__output__weight__exp_avg": (8, 5)}


def test_tensors_that_a_checkpoint_lacks_or_has_over_are_refused(three):
    folder = three / "iter_0000003"
    assert load_refusal(folder, **MODEL, **MOMENT) == ""
    lacks = load_refusal(folder, **MODEL, **MOMENT, model__more__weight=(1,))
    assert "does not fit this run: model.more.weight is not in it. Fix" in lacks
    over = load_refusal(folder, model__embedding__weight=(8, 5))
    assert "model.output.weight is in it, and not in this model. Fix" in over
    shape = load_refusal(folder, **(MODEL | {"model__output__weight": (8, 6)}))
    assert "model.output.weight has shape (8, 5), this model needs (8, 6)" in shape


def test_weights_alone_are_taken_without_the_optimizers_tensors(three):
    assert load_refusal(three / "iter_0000003", **MODEL) == ""


def test_a_damaged_checkpoint_changes_no_tensor_before_it_is_refused(run):
    folder = run / "iter_0000003"
    path = folder / "__0_0.distcp"
    flip(path, 8 * path.stat().st_size - 1)
    tensors = {name: torch.full((8, 5), 7.0) for name in NAMES}
    with pytest.raises(DamagedCheckpoint, match="__0_0.distcp differs from its checksum"):
        checkpoint.load(folder, tensors, RANK_0)
    assert all((tensor == 7.0).all() for tensor in tensors.values())


def test_each_file_is_compared_by_one_rank_and_a_shard_by_that_of_its_number():
    shards = [f"__{rank}_{part}.distcp" for rank in range(5) for part in range(2)]
    names = sorted([".metadata", "config.yaml", "progress.json", "tokenizer/tok.model", *shards])
    for size in (1, 2, 3, 5, 8):
        shares = [manifest.share_of_rank(names, rank, size) for rank in range(size)]
        assert sorted(name for share in shares for name in share) == names, size
        for rank in range(5):
            assert f"__{rank}_1.distcp" in shares[rank % size], (size, shares)
