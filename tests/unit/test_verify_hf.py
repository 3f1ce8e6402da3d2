"""An export is compared with transformers whatever layout its run had."""

import numpy as np
import pytest

from data.files import checksum
from pretrain.checkpointing.folders import MANIFEST, find_published
from pretrain.checkpointing.manifest import read_manifest, to_text
from pretrain.config.config_yaml import dump_yaml, read_config_yaml
from tests.huggingface import chat_folders
from tests.huggingface.model_folders import write_folder
from tools import export_hf, import_hf
from tools.huggingface import verify_export

SETTINGS = {
    # Legal on tp 2 x cp 2 x 2, where a rank has 3 query heads and 1 key head; not in one process.
    "chunks": dict(attention_head_chunks=3),
    "tiles": dict(mlp_tiles=4, recompute_granularity="full"),
    "offload": dict(cpu_offloading_num_layers=2, recompute_granularity="full"),
}


def imported_run(tmp_path, settings: dict) -> str:
    """Folder of a checkpoint with 12 query and 4 key heads, as a run with the settings leaves
    it."""
    folder = write_folder(
        tmp_path / "hf", "llama", num_attention_heads=12, num_key_value_heads=4, hidden_size=48
    )
    save = str(tmp_path / "run")
    assert import_hf.main(["--hf", str(folder), "--save", save, "--no-verify"]) == 0
    published = find_published(save)
    config = read_config_yaml(str(published / "config.yaml"))
    for name, value in settings.items():
        setattr(config.memory, name, value)
    (published / "config.yaml").write_text(dump_yaml(config))
    checksums = read_manifest(published).files
    checksums["config.yaml"] = checksum(published / "config.yaml")
    (published / MANIFEST).write_text(to_text(checksums))
    return save


@pytest.mark.parametrize("name", SETTINGS)
def test_an_export_is_verified_whatever_memory_settings_the_run_had(
    tmp_path, capsys, monkeypatch, name
):
    monkeypatch.setattr(verify_export, "_real_text", lambda *_: np.arange(60))
    save = imported_run(tmp_path, SETTINGS[name])
    output = str(tmp_path / "exported")
    export_hf.export(export_hf.Arguments(load=save, output=output, verify=True))
    rows = [line for line in capsys.readouterr().out.splitlines() if "  ok" in line]
    assert len(rows) == 2 + 2 * 4, rows


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_an_import_that_was_not_trained_is_verified_without_a_text(tmp_path, capsys, has_tokenizer):
    folder = chat_folders.write_model(tmp_path / "hf")
    if has_tokenizer:
        chat_folders.write_tokenizer(folder)
    save = str(tmp_path / "run")
    assert import_hf.main(["--hf", str(folder), "--save", save, "--no-verify"]) == 0
    output = str(tmp_path / "exported")
    assert export_hf.main(["--load", save, "--output", output, "--verify"]) == 0
    said = capsys.readouterr().out
    assert ("on random tokens" in said) != has_tokenizer
    assert "fp64 logits" in said and "DIFFERENT" not in said


def test_a_text_that_is_missing_is_said_before_anything_is_read(tmp_path, capsys):
    missing = str(tmp_path / "text.txt")
    words = ["--load", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--verify"]
    assert export_hf.main([*words, "--verify-text", missing]) == 2
    assert f"verify_text = {missing}: no such file. Fix: " in capsys.readouterr().err
