"""An import takes the tensors that transformers takes; what it would draw at random is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.huggingface.imports import assert_same_model, refusal, run
from tests.huggingface.model_folders import SHAPE, change_config, change_weights, write_folder
from tools.huggingface.weights import INDEX, SINGLE

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "hf", "llama")


def shard(folder: Path, number: int = 3) -> list[str]:
    """Split model.safetensors into files with an index -> their names."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    files = [f"model-{i + 1:05d}-of-{number:05d}.safetensors" for i in range(number)]
    places = {name: files[i % number] for i, name in enumerate(sorted(tensors))}
    for file in files:
        part = {name: tensors[name] for name in tensors if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return files


# ---------------------------------------------------------------- files


def test_the_index_decides_and_a_file_beside_it_is_named(folder, capsys):
    files = shard(folder)
    stale = {EMBEDDING: torch.zeros(SHAPE["vocab_size"], SHAPE["hidden_size"])}
    save_file(stale, folder / "model-00009-of-00009.safetensors", metadata={"format": "pt"})
    assert len(files) == 3
    assert_same_model(folder)
    assert (
        "not read, since no index names them: model-00009-of-00009.safetensors"
        in capsys.readouterr().err
    )


def test_a_single_file_goes_before_an_index_as_in_transformers(folder, capsys):
    tensors = load_file(folder / SINGLE)
    shard(folder)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    change_weights(folder, lambda tensors: tensors[HEAD].mul_(2))
    assert_same_model(folder)
    assert "not read" in capsys.readouterr().err


def test_a_missing_shard_is_named(folder, capsys):
    files = shard(folder)
    (folder / files[1]).unlink()
    assert f"{files[1]}: is missing, and the index names it" in refusal(folder, capsys)


@pytest.mark.parametrize("place", ["", ".cache/huggingface/download"])
def test_a_download_that_is_not_finished_is_refused(folder, capsys, place):
    (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / place / "aBc=.0123.incomplete").write_bytes(b"")
    assert "its download is not finished" in refusal(folder, capsys)


def test_a_shard_that_is_cut_short_is_named(folder, capsys):
    files = shard(folder)
    data = (folder / files[2]).read_bytes()
    (folder / files[2]).write_bytes(data[:-1])
    assert f"{files[2]}: is not a whole safetensors file" in refusal(folder, capsys)


def test_a_tensor_that_is_not_in_its_shard_is_named(folder, capsys):
    files = shard(folder)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    tensors = load_file(folder / files[0])
    lost = sorted(tensors)[0]
    assert places[lost] == files[0]
    del tensors[lost]
    save_file(tensors, folder / files[0], metadata={"format": "pt"})
    assert f"tensor {lost} is not in it, but the index says so" in refusal(folder, capsys)


def test_a_tensor_that_lies_in_two_shards_is_refused(folder, capsys):
    files = shard(folder)
    twice = load_file(folder / files[0])
    tensors = load_file(folder / files[1]) | {sorted(twice)[0]: twice[sorted(twice)[0]]}
    save_file(tensors, folder / files[1], metadata={"format": "pt"})
    assert "the index does not say that it is here" in refusal(folder, capsys)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../model-1.safetensors"}}',
    ],
)
def test_an_index_that_is_none_is_refused(folder, capsys, text):
    shard(folder)
    (folder / INDEX).write_text(text)
    assert str(folder / INDEX) in refusal(folder, capsys)


def test_shards_without_an_index_are_refused(folder, capsys):
    shard(folder)
    (folder / INDEX).unlink()
    assert "neither model.safetensors nor an index" in refusal(folder, capsys)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"]
)
def test_pickled_weights_are_refused_by_name(folder, capsys, name):
    (folder / SINGLE).rename(folder / name)
    assert f"{name}: only safetensors are read" in refusal(folder, capsys)


def test_an_adapter_is_refused(folder, capsys):
    (folder / "adapter_config.json").write_text("{}")
    assert "adds an adapter" in refusal(folder, capsys)


def test_a_damaged_file_is_one_line(folder, capsys):
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) // 2])
    assert "is not a whole safetensors file" in refusal(folder, capsys)


# ---------------------------------------------------------------- tied or not


def test_tied_with_another_head_is_two_tensors_as_in_transformers(folder, capsys):
    change_config(folder, tie_word_embeddings=True)
    tensors = assert_same_model(folder)
    assert not torch.equal(tensors["model.output.weight"], tensors["model.embedding.weight"])
    assert "read as two tensors" in capsys.readouterr().err


def test_tied_with_an_equal_head_is_one_tensor(folder):
    change_config(folder, tie_word_embeddings=True)
    change_weights(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert "model.output.weight" not in assert_same_model(folder)


def test_tied_with_a_head_only_is_that_head(folder):
    change_config(folder, tie_word_embeddings=True)
    change_weights(folder, lambda tensors: tensors.pop(EMBEDDING))
    assert "model.output.weight" not in assert_same_model(folder)


def test_untied_without_a_head_is_refused_where_transformers_draws_one(folder, capsys):
    change_weights(folder, lambda tensors: tensors.pop(HEAD))
    assert "lm_head.weight is missing" in refusal(folder, capsys)


# ---------------------------------------------------------------- tensors


def test_fewer_rows_than_the_vocabulary_are_refused(folder, capsys):
    def cut(tensors):
        tensors[EMBEDDING] = tensors[EMBEDDING][:60].clone()
        tensors[HEAD] = tensors[HEAD][:60].clone()

    change_weights(folder, cut)
    assert "model.embed_tokens.weight has shape (60, 16), config.json means (67, 16)" in refusal(
        folder, capsys
    )


def test_more_rows_than_the_vocabulary_are_refused(folder, capsys):
    change_config(folder, vocab_size=60)
    assert "has shape (67, 16), config.json means (60, 16)" in refusal(folder, capsys)


def test_saved_buffers_are_not_read(folder, capsys):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        tensors["model.rotary_emb.inv_freq"] = torch.ones(2)

    change_weights(folder, add)
    assert_same_model(folder)
    assert "2 buffers (rotary_emb.inv_freq and the like)" in capsys.readouterr().err


def test_names_without_the_prefix_are_a_base_model(folder, capsys):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors.pop(HEAD)

    change_weights(folder, strip)
    assert "lm_head.weight is missing" in refusal(folder, capsys)
    change_config(folder, tie_word_embeddings=True)
    assert_same_model(folder)


def test_names_without_the_prefix_beside_a_head_are_the_whole_model(folder):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change_weights(folder, strip)
    assert_same_model(folder)


def test_a_part_that_is_not_built_is_named(folder, capsys):
    change_weights(
        folder,
        lambda tensors: tensors.update({"model.layers.0.mlp.gate_proj.bias": torch.ones(24)}),
    )
    assert "tensor model.layers.0.mlp.gate_proj.bias: our model has no such part" in refusal(
        folder, capsys
    )


def test_of_many_problems_some_are_said_and_the_others_counted(folder, capsys):
    strangers = {f"model.layers.0.stranger{i}": torch.ones(2) for i in range(6)}
    change_weights(folder, lambda tensors: tensors.update(strangers))
    capsys.readouterr()
    assert run(folder)[0] == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "stranger" in line]
    assert len(lines) == 4 and all(" Fix: " in line for line in lines)
    assert lines[-1].endswith("(and 2 more)")
    assert not any("more)" in line for line in lines[:-1])


def test_nan_and_infinity_are_named_with_their_count(folder, capsys):
    def spoil(tensors):
        tensors["model.norm.weight"][3] = float("nan")
        tensors["model.norm.weight"][7] = float("-inf")

    change_weights(folder, spoil)
    assert "tensor model.norm.weight: 2 of 16 numbers are NaN or infinite" in refusal(
        folder, capsys
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floating_point_dtypes_are_read(folder, capsys, dtype):
    def convert(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    change_weights(folder, convert)
    assert_same_model(folder)
    is_rounded = "of F64 are rounded to fp32" in capsys.readouterr().err
    assert is_rounded == (dtype == torch.float64)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_dtypes_are_refused(folder, capsys, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert f"tensor {name} has dtype" in refusal(folder, capsys)


def test_a_layer_too_few_or_too_many_is_refused(folder, capsys):
    for layers in (1, 3, 100_000):
        change_config(folder, num_hidden_layers=layers)
        line = refusal(folder, capsys)
        assert f"num_hidden_layers = {layers}, but the weights hold 2 layers" in line


def test_a_number_of_layers_beyond_memory_is_refused_at_once(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", "qwen3")
    change_config(folder, drop=("layer_types",), num_hidden_layers=10**12)
    assert "num_hidden_layers = 1000000000000: is above 100000" in refusal(folder, capsys)
