"""Start rules, publication and the restricted unpickler."""

import io
import json
import os
import pickle
import shutil
from enum import Enum

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from data.files import write_atomically
from parallel.layout import single_process_layout
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.damage import find_restart
from pretrain.checkpointing.folder_lock import FolderLock
from pretrain.checkpointing.folders import (
    CARRIED,
    LATEST,
    MANIFEST,
    clear_unfinished,
    find_published,
    is_checkpoint_folder,
    iteration_folder,
)
from pretrain.checkpointing.manifest import verify_files
from pretrain.checkpointing.model_files import contents_of, read_carried
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.start import find_start
from pretrain.checkpointing.stored_tensors import SafeReader, read_whole_tensors
from pretrain.config.config_yaml import dump_yaml
from pretrain.config.load import load_config


def publish(root, step=5):
    """A folder that looks like a published checkpoint of the tiny model."""
    config = load_config(["--model", "tiny", "--vocab-size", "100"])
    folder = iteration_folder(root, step)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(config))
    (folder / MANIFEST).write_text(json.dumps({"files": {}}))
    write_atomically(root / LATEST, str(step))
    return folder


def start(**settings):
    argv = ["--model", "tiny", "--vocab-size", "100"]
    for name, value in settings.items():
        argv += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return find_start(load_config(argv).checkpoint)


def test_a_published_checkpoint_in_save_wins(tmp_path):
    mine = publish(tmp_path / "save")
    other = publish(tmp_path / "load")
    assert start(save=tmp_path / "save", load=tmp_path / "load").folder == mine
    assert (
        start(save=tmp_path / "save", load=tmp_path / "load", finetune=True).weights_only is False
    )
    assert start(save=tmp_path / "empty", load=tmp_path / "load").folder == other


def test_a_published_checkpoint_is_found_through_a_folder_that_is_not_there(tmp_path):
    mine = publish(tmp_path / "save")
    assert start(save=tmp_path / "save" / "x" / "..").folder == mine
    assert find_published(tmp_path / "x" / ".." / "save") == mine


def test_weights_only_sources(tmp_path):
    folder = publish(tmp_path / "load")
    for settings in (
        dict(load=tmp_path / "load", finetune=True),
        dict(pretrained_checkpoint=tmp_path / "load"),
    ):
        found = start(save=tmp_path / "save", **settings)
        assert found.folder == folder and found.weights_only


def test_load_equal_to_an_empty_save_is_a_fresh_start(tmp_path):
    assert start(save=tmp_path / "run", load=str(tmp_path / "x" / ".." / "run")).folder is None
    assert start().folder is None


def test_missing_sources_are_fatal(tmp_path):
    with pytest.raises(ValueError, match="load = .*no checkpoint is published there"):
        start(save=tmp_path / "save", load=tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match="pretrained_checkpoint = .*no checkpoint is published there"
    ):
        start(pretrained_checkpoint=tmp_path / "nowhere")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    for settings in (dict(load=tmp_path), dict(pretrained_checkpoint=tmp_path)):
        with pytest.raises(
            ValueError, match=f"bash launch/ithaca.sh import --hf {tmp_path} --save DIR, then"
        ):
            start(save=tmp_path / "save", **settings)
    publish(tmp_path / "load")
    with pytest.raises(ValueError, match="iter_0000009: missing or not complete"):
        start(load=tmp_path / "load", ckpt_step=9)


def test_an_unfinished_folder_is_never_chosen(tmp_path):
    publish(tmp_path, step=5)
    (tmp_path / "iter_0000010").mkdir()  # no manifest: something else made it
    assert start(save=tmp_path).folder.name == "iter_0000005"
    (tmp_path / LATEST).write_text("10")
    with pytest.raises(ValueError, match="iter_0000010: missing or not complete"):
        start(load=tmp_path)
    (tmp_path / LATEST).write_text("ten")
    with pytest.raises(ValueError, match="must hold an iteration number. Fix: write 5 into it"):
        start(load=tmp_path)
    (tmp_path / LATEST).unlink()
    with pytest.raises(ValueError, match=r"no checkpoint is published there .* --ckpt-step 5"):
        start(load=tmp_path)
    with pytest.raises(ValueError, match=rf"Fix: --load {tmp_path} --ckpt-step 5"):
        start(load=tmp_path / "iter_0000005")


class Harmful:
    def __reduce__(self):
        import os

        return os.mkdir, ("/tmp/ithaca-unpickled-code-ran",)


def test_metadata_that_would_run_code_is_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match="names posix.mkdir"):
        SafeReader(tmp_path).read_metadata()


def test_atomic_write_leaves_no_temporary_file(tmp_path):
    write_atomically(tmp_path / "a.txt", "1")
    write_atomically(tmp_path / "a.txt", "2")
    assert (tmp_path / "a.txt").read_text() == "2" and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- what a save removes


def save(root, step=1, value=1.0, tokenizer=None, **options):
    world = single_process_layout(torch.device("cpu")).world
    tensors = {"model.weight": torch.full((3,), value)}
    progress = Progress(
        step=step, clock=0, phase={}, longest_seq_length=0, data=None, tokenizer=None
    )
    return checkpoint.save(root, step, tensors, progress, "", tokenizer or {}, world, **options)


def read(folder):
    return read_whole_tensors(folder, ["model.weight"])["model.weight"].tolist()


def test_a_save_replaces_its_own_folders_and_leaves_no_other(tmp_path):
    folder = save(tmp_path)
    assert is_checkpoint_folder(folder)
    shutil.copytree(folder, tmp_path / ".iter_0000001.partial")
    (tmp_path / ".iter_0000001.partial" / MANIFEST).unlink()
    shutil.copytree(folder, tmp_path / ".iter_0000001.replaced")
    assert read(save(tmp_path, value=2.0)) == [2.0] * 3
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"iter_0000001", LATEST}


def test_a_kill_while_a_step_is_published_again_loses_no_checkpoint(tmp_path, monkeypatch):
    folder = save(tmp_path)
    rename = os.rename

    def die_before_the_new_one_has_the_name(source, target):
        if str(source).endswith(".partial"):
            raise KeyboardInterrupt  # like a kill: nothing is cleaned up
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", die_before_the_new_one_has_the_name)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, value=2.0)
    assert not folder.exists()
    found = find_restart(tmp_path)
    assert found.folder == folder and not found.is_pointer_wrong, found
    assert read(folder) == [1.0] * 3
    clear_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"iter_0000001", LATEST}


def test_a_start_removes_what_a_killed_save_had_replaced(tmp_path):
    folder = save(tmp_path)
    shutil.copytree(folder, tmp_path / ".iter_0000001.replaced")
    shutil.copytree(folder, tmp_path / ".iter_0000002.replaced")
    clear_unfinished(tmp_path)
    # That of step 2 is the only one of its step.
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"iter_0000001", ".iter_0000002.replaced", LATEST}


class OfPython3112(pickle.Pickler):
    """Writes members of enums as Python 3.11.0 to 3.11.3 do: as attributes of their class."""

    def reducer_override(self, item):
        if isinstance(item, Enum):
            return getattr, (type(item), item.name)
        return NotImplemented


def test_metadata_of_an_earlier_python_is_read(tmp_path):
    folder = save(tmp_path)
    expected = SafeReader(folder).read_metadata()
    buffer = io.BytesIO()
    OfPython3112(buffer).dump(expected)
    assert b"getattr" in buffer.getvalue()
    (folder / ".metadata").write_bytes(buffer.getvalue())
    found = SafeReader(folder).read_metadata()
    assert found.state_dict_metadata == expected.state_dict_metadata


class Attribute:
    """Is pickled as an attribute of something that a table of tensors may name."""

    def __init__(self, owner, name):
        self.arguments = (owner, name)

    def __reduce__(self):
        return getattr, self.arguments


@pytest.mark.parametrize("attribute", [(torch.Size, "numel"), (_MEM_FORMAT_ENCODING, "mro")])
def test_metadata_with_any_other_attribute_is_refused(tmp_path, attribute):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attribute(*attribute)))
    with pytest.raises(ValueError, match=f"names attribute '{attribute[1]}' of .* harmful"):
        SafeReader(tmp_path).read_metadata()


def test_every_byte_of_a_checkpoint_is_synced(tmp_path, monkeypatch):
    tokenizer = tmp_path / "tok.model"
    tokenizer.write_bytes(b"words")
    synced = {}
    sync = os.fsync

    def note(descriptor):
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    root = tmp_path / "run"
    folder = save(
        root, tokenizer=contents_of([str(tokenizer)]), carried={"templates/a.jinja": b"{{ x }}"}
    )
    for path in [*folder.rglob("*"), folder, root]:
        assert path.stat().st_ino in synced, path
        assert path.is_dir() or synced[path.stat().st_ino] == path.stat().st_size, path


@pytest.mark.parametrize(
    "name", ["iter_0000001", ".iter_0000001.partial", ".iter_0000001.replaced"]
)
@pytest.mark.parametrize("kind", ["folder", "file", "link", "checkpoint with notes"])
def test_a_save_keeps_what_no_save_wrote(tmp_path, name, kind, capsys):
    root = tmp_path / "run"
    root.mkdir()
    path = root / name
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "notes").write_text("mine")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        if kind == "checkpoint with notes":
            os.rename(save(tmp_path / "other"), path)
        path.mkdir(exist_ok=True)
        (path / "notes").write_text("mine")
    assert read(save(root, value=2.0)) == [2.0] * 3
    (kept,) = root.glob("*.kept1")
    assert (kept if kind == "file" else kept / "notes").read_text() == "mine"
    assert f"kept as {kept}" in capsys.readouterr().err


def test_a_checkpoint_with_a_linked_folder_in_it_is_not_only_a_saves(tmp_path):
    folder = save(tmp_path / "run")
    (tmp_path / "notes").mkdir()
    (folder / "notes").symlink_to(tmp_path / "notes")
    assert not is_checkpoint_folder(folder)


@pytest.mark.parametrize("content", [b"", b"process 7 on node", b"package lock", b"\xff\x00"])
def test_a_lock_file_of_another_program_keeps_its_content(tmp_path, content, monkeypatch):
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda *args, **kwargs: None)
    (tmp_path / ".lock").write_bytes(content)
    world = single_process_layout(torch.device("cpu")).world
    FolderLock(tmp_path, world).release()
    is_ours = content in (b"", b"process 7 on node")
    found = (tmp_path / ".lock").read_bytes()
    assert found.startswith(b"process ") if is_ours else found == content, found


def test_carried_files_lie_in_the_checkpoint_under_its_checksums(tmp_path):
    carried = {"generation_config.json": b"{}", "additional_chat_templates/tool.jinja": b"{{ x }}"}
    folder = save(tmp_path, carried=carried)
    assert read_carried(folder) == carried
    assert verify_files(folder) == []
    (folder / CARRIED / "generation_config.json").write_text("[]")
    assert "differs from its checksum" in verify_files(folder)[0]


def test_a_failed_atomic_write_leaves_no_temporary_file(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "a.txt", "1")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
