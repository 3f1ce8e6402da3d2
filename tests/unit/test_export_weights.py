"""The files of an export hold the checkpoint's weights, or nothing is published."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.hf.architecture import VOCABULARY_ROWS
from model.hf.architectures import ARCHITECTURES
from parallel.layout import single_process_layout
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.stored_tensors import read_whole_tensors, tensor_names
from pretrain.checkpointing.verifying_reader import VerifyingReader
from tests.damaged import flip
from tests.huggingface.model_folders import write_folder
from tools.export_hf import Arguments, export
from tools.import_hf import Arguments as ImportArguments
from tools.import_hf import import_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("weights") / "hf", "llama")


@pytest.fixture(scope="module")
def imported(folder) -> Path:
    root = folder.parent / "imported"
    import_folder(ImportArguments(hf=str(folder), save=str(root), verify=False))
    return root


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    imported, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("tools.outputs.files.free_bytes", lambda _: 1000)
    with pytest.raises(ValueError, match="out: takes .* MiB, and 0.0 MiB are free there"):
        export(Arguments(load=str(imported), output=str(tmp_path / "out")))
    with pytest.raises(ValueError, match="save: takes .* MiB, and 0.0 MiB are free there"):
        import_folder(ImportArguments(hf=str(folder), save=str(tmp_path / "save"), verify=False))
    assert list(tmp_path.iterdir()) == []


def change_weight(start: Path, root: Path, value: float) -> Path:
    """Save the weights of `start` again, with another number in one of them."""
    folder = find_published(start)
    tensors = read_whole_tensors(folder, tensor_names(folder))
    tensors["model.layers.1.mlp.up.weight"][3, 5] = value
    world = single_process_layout(torch.device("cpu")).world
    text = (folder / "config.yaml").read_text()
    checkpoint.save(root, 1, tensors, Progress.read(folder), text, {}, world)
    return root


@pytest.mark.parametrize(
    "value, dtype, message",
    [
        (
            7e4,
            "float16",
            "dtype = float16: model.layers.1.mlp.up_proj.weight: 1 numbers are beyond its largest, "
            "65,504",
        ),
        (float("nan"), "float32", "up_proj.weight: 1 numbers are NaN or infinite"),
        (float("-inf"), "bfloat16", "up_proj.weight: 1 numbers are NaN or infinite"),
    ],
)
@pytest.mark.parametrize("is_cut_by_rows", [True, False])
def test_numbers_that_the_dtype_cannot_hold_are_named(
    imported, tmp_path, monkeypatch, is_cut_by_rows, value, dtype, message
):
    """Also where a tensor is put together of parts before it is written."""
    monkeypatch.setattr(VerifyingReader, "is_cut_by_rows", lambda reader, name: is_cut_by_rows)
    run = change_weight(imported, tmp_path / "run", value)
    with pytest.raises(ValueError, match=re.escape(message)):
        export(Arguments(load=str(run), output=str(tmp_path / "out"), dtype=dtype))
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_files_hold_the_rounded_weights_and_the_index_all_of_them(imported, tmp_path, dtype):
    folder = find_published(imported)
    name = str(dtype).removeprefix("torch.")
    output = tmp_path / "out"
    export(Arguments(load=str(imported), output=str(output), dtype=name, max_shard_bytes=4000))
    places = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(files) >= 3 and set(files) == set(places.values())
    found = {}
    for file in files:
        tensors = load_file(output / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 4000 or len(tensors) == 1
        assert {places[name] for name in tensors} == {file}
        found |= tensors
    stored = read_whole_tensors(folder, tensor_names(folder))
    llama = ARCHITECTURES["llama"]
    assert len(found) == len(stored)
    for name, tensor in stored.items():
        own = name.removeprefix("model.")
        theirs = found[llama.huggingface_name(own)]
        rows = 67 if own in VOCABULARY_ROWS else None
        assert torch.equal(theirs, tensor[:rows].to(dtype)), name


def test_a_damaged_checkpoint_is_not_exported(imported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(imported, run)
    flip(find_published(run) / "__0_0.distcp", 8 * 20_000)
    with pytest.raises(ValueError, match="differs from its checksum"):
        export(Arguments(load=str(run), output=str(tmp_path / "out")))
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
