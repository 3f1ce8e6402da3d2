"""Start rules, publication and the restricted unpickler."""

import json
import pickle

import pytest

from pretrain import checkpoint
from pretrain.load_config import dump_yaml, load_config
from pretrain.start import find_start


def publish(root, step=5):
    """A folder that looks like a published checkpoint of the tiny model."""
    config = load_config(["--model", "tiny", "--vocab-size", "100"])
    folder = checkpoint.iteration_folder(root, step)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(config))
    (folder / checkpoint.MANIFEST).write_text(json.dumps({"files": {}}))
    checkpoint.write_atomically(root / checkpoint.LATEST, str(step))
    return folder


def start(**settings):
    argv = ["--model", "tiny", "--vocab-size", "100"]
    for name, value in settings.items():
        argv += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return find_start(load_config(argv).checkpoint)


def test_a_published_checkpoint_in_save_wins(tmp_path):
    mine, other = publish(tmp_path / "save"), publish(tmp_path / "load")
    assert start(save=tmp_path / "save", load=tmp_path / "load").folder == mine
    assert start(save=tmp_path / "save", load=tmp_path / "load", finetune=True).weights_only is False
    assert start(save=tmp_path / "empty", load=tmp_path / "load").folder == other


def test_weights_only_sources(tmp_path):
    folder = publish(tmp_path / "load")
    for settings in (dict(load=tmp_path / "load", finetune=True), dict(pretrained_checkpoint=tmp_path / "load")):
        found = start(save=tmp_path / "save", **settings)
        assert found.folder == folder and found.weights_only


def test_load_equal_to_an_empty_save_is_a_fresh_start(tmp_path):
    assert start(save=tmp_path / "run", load=str(tmp_path / "x" / ".." / "run")).folder is None
    assert start().folder is None


def test_missing_sources_are_fatal(tmp_path):
    with pytest.raises(ValueError, match="load = .*no checkpoint is published there"):
        start(save=tmp_path / "save", load=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="pretrained_checkpoint = .*no checkpoint is published there"):
        start(pretrained_checkpoint=tmp_path / "nowhere")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    for settings in (dict(load=tmp_path), dict(pretrained_checkpoint=tmp_path)):
        with pytest.raises(ValueError, match=f"python -m tools.import_hf --hf {tmp_path} --save DIR, then"):
            start(save=tmp_path / "save", **settings)
    publish(tmp_path / "load")
    with pytest.raises(ValueError, match="iter_0000009: missing or not complete"):
        start(load=tmp_path / "load", ckpt_step=9)


def test_an_unfinished_folder_is_never_chosen(tmp_path):
    publish(tmp_path, step=5)
    (tmp_path / "iter_0000010").mkdir()  # no manifest: something else made it
    assert start(save=tmp_path).folder.name == "iter_0000005"
    (tmp_path / checkpoint.LATEST).write_text("10")
    with pytest.raises(ValueError, match="iter_0000010: missing or not complete"):
        start(save=tmp_path)
    (tmp_path / checkpoint.LATEST).write_text("ten")
    with pytest.raises(ValueError, match="must hold an iteration number"):
        start(save=tmp_path)


class Harmful:
    def __reduce__(self):
        import os
        return os.mkdir, ("/tmp/ithaca-unpickled-code-ran",)


def test_metadata_that_would_run_code_is_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match="names posix.mkdir"):
        checkpoint.SafeReader(tmp_path).read_metadata()


def test_atomic_write_leaves_no_temporary_file(tmp_path):
    checkpoint.write_atomically(tmp_path / "a.txt", "1")
    checkpoint.write_atomically(tmp_path / "a.txt", "2")
    assert (tmp_path / "a.txt").read_text() == "2" and len(list(tmp_path.iterdir())) == 1
