"""An import is what transformers makes of the folder; what it would not take, or draws at random, is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import hf
from pretrain import checkpoint
from pretrain.load_config import read_config_yaml
from tests.hf_folders import SHAPE, change_config, transformers_logits, transformers_model, write_folder
from tools import import_hf
from tools.export_hf import open_source
from tools.hf_weights import INDEX, SINGLE
from tools.verify_hf import _our_logits

IDS = torch.randint(SHAPE["vocab_size"], (48,), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.arange(48)
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "hf", "llama")


def run(folder: Path, *flags: str) -> tuple[int, Path]:
    """(exit code, place of the checkpoint)."""
    save = folder.parent / "imported"
    return import_hf.main(["--hf", str(folder), "--save", str(save), *flags]), save


def refusal(folder: Path, capsys, *flags: str) -> str:
    """The one line that the import is refused with; nothing is published."""
    code, save = run(folder, *flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2, code
    assert len(lines) == 1, lines
    assert not save.exists()
    return lines[0]


def assert_same_model(folder: Path, *flags: str) -> dict[str, torch.Tensor]:
    """Import and compare with transformers, by the test's own means -> the checkpoint's tensors."""
    code, save = run(folder, "--no-verify", *flags)
    assert code == 0
    expected = transformers_logits(transformers_model(folder), IDS, POSITIONS)
    ours = our_logits(save)
    difference = (ours - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max(), difference
    published = checkpoint.published(save)
    return checkpoint.read_whole_tensors(published, checkpoint.tensor_names(published))


def our_logits(save: Path) -> torch.Tensor:
    (save / "config.json").write_text('{"torch_dtype": "float32"}')
    return _our_logits(open_source(str(save), None), save, IDS, POSITIONS)


def change_weights(folder: Path, change) -> None:
    """Rewrite model.safetensors after `change` has edited its dict of tensors."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


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
    assert "not read, since no index names them: model-00009-of-00009.safetensors" in capsys.readouterr().err


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


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {}}',
                                  '{"weight_map": {"a": "../model-1.safetensors"}}'])
def test_an_index_that_is_none_is_refused(folder, capsys, text):
    shard(folder)
    (folder / INDEX).write_text(text)
    assert str(folder / INDEX) in refusal(folder, capsys)


def test_shards_without_an_index_are_refused(folder, capsys):
    shard(folder)
    (folder / INDEX).unlink()
    assert "neither model.safetensors nor an index" in refusal(folder, capsys)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"])
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
    assert "model.embed_tokens.weight has shape (60, 16), config.json means (67, 16)" in refusal(folder, capsys)


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
    change_weights(folder, lambda tensors: tensors.update({"model.layers.0.mlp.gate_proj.bias": torch.ones(24)}))
    assert "tensor model.layers.0.mlp.gate_proj.bias: our model has no such part" in refusal(folder, capsys)


def test_nan_and_infinity_are_named_with_their_count(folder, capsys):
    def spoil(tensors):
        tensors["model.norm.weight"][3] = float("nan")
        tensors["model.norm.weight"][7] = float("-inf")

    change_weights(folder, spoil)
    assert "tensor model.norm.weight: 2 of 16 numbers are NaN or infinite" in refusal(folder, capsys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floating_point_dtypes_are_read(folder, dtype):
    def convert(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    change_weights(folder, convert)
    assert_same_model(folder)


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


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_missing_fields_have_the_defaults_of_the_architecture(tmp_path, kind):
    from transformers import AutoConfig

    epsilon = AutoConfig.for_model(kind).rms_norm_eps
    folder = write_folder(tmp_path / "hf", kind)
    dropped = ("rms_norm_eps", "hidden_act", "initializer_range", "rope_parameters", "max_position_embeddings")
    change_config(folder, drop=dropped)
    assert_same_model(folder)
    config = read_config_yaml(str(checkpoint.published(tmp_path / "imported") / "config.yaml"))
    assert config.model.norm_epsilon == epsilon


def test_a_missing_head_size_of_qwen3_is_128(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", "qwen3", head_dim=128)
    change_config(folder, drop=("head_dim",))
    assert_same_model(folder)


def test_a_missing_intermediate_size_is_the_architecture_s(folder, capsys):
    change_config(folder, drop=("intermediate_size",))
    assert "gate_proj.weight has shape (24, 16), config.json means (11008, 16)" in refusal(folder, capsys)


def test_swish_is_silu(folder):
    change_config(folder, hidden_act="swish")
    assert_same_model(folder)


@pytest.mark.parametrize("kind, changes, message", [
    ("llama", dict(is_causal=False), "is_causal = False: only True is built"),
    ("llama", dict(attention_bias=True), "attention_bias = True: only False is built"),
    ("llama", dict(mlp_bias=True), "mlp_bias = True: only False is built"),
    ("llama", dict(sliding_window=16), "sliding_window = 16: only full attention"),
    ("llama", dict(layer_types=["sliding_attention", "full_attention"]), "layer_types = "),
    ("llama", dict(quantization_config={"quant_method": "fp8"}), "quantization_config = "),
    ("llama", dict(attn_logit_softcapping=30.0), "attn_logit_softcapping = 30.0: only None"),
    ("llama", dict(clip_qkv=8.0), "clip_qkv = 8.0: only None"),
    ("llama", dict(logit_scale=0.25), "logit_scale = 0.25"),
    ("llama", dict(hidden_act="gelu"), "hidden_act = gelu: only silu is built"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5: only 1.0 is built"),
    ("llama", dict(per_layer_config={"0": {"head_dim": 8}}), "per_layer_config = "),
    ("llama", dict(to_dict=1), "to_dict = 1: is the name of a method"),
    ("llama", dict(vocab_size="67"), "expected int, got str"),
    ("llama", dict(num_hidden_layers=True), "expected int, got bool"),
    ("llama", dict(rms_norm_eps=None), "expected float, got NoneType"),
    ("llama", dict(rms_norm_eps=float("nan")), "rms_norm_eps = nan: must be a finite number above 0"),
    ("llama", dict(num_key_value_heads=3), "num_key_value_heads = 3: must divide num_attention_heads = 4"),
    ("llama", dict(pad_token_id=67), "pad_token_id = 67: is not in the vocabulary of 67"),
    ("llama", dict(max_position_embeddings=0), "max_position_embeddings = 0: must be from 1"),
    ("llama", dict(model_type="mistral"), "model_type = mistral: not built here"),
    ("qwen2", dict(use_sliding_window=True, max_window_layers=1, sliding_window=8), "layer_types = "),
    ("qwen2", dict(head_dim=None), "head_dim = None: must be an even whole number"),
    ("qwen3", dict(attention_bias=True), "attention_bias = True: only False is built"),
], ids=str)
def test_what_would_be_another_model_is_refused_by_name(tmp_path, capsys, kind, changes, message):
    folder = write_folder(tmp_path / "hf", kind)
    if changes.get("use_sliding_window"):
        change_config(folder, drop=("layer_types",))
    change_config(folder, **changes)
    assert message in refusal(folder, capsys)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\x80"])
def test_a_config_that_is_no_object_is_one_line(folder, capsys, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json: " in refusal(folder, capsys)


def test_keys_without_effect_are_named(folder, capsys):
    change_config(folder, drop=("architectures",), my_own_key=3, auto_map={"AutoModelForCausalLM": "x.Y"},
                  attention_dropout=0.1, initializer_range=0.0)
    assert_same_model(folder)
    errors = capsys.readouterr().err
    for text in ("my_own_key = 3: LlamaConfig of transformers has no such setting; ignored",
                 "auto_map = ", "attention_dropout = 0.1: there is no dropout here", "initializer_range = 0.0"):
        assert text in errors, errors


def test_a_window_that_no_layer_uses_is_read(tmp_path):
    folder = write_folder(tmp_path / "hf", "qwen2")
    change_config(folder, drop=("layer_types",), use_sliding_window=True, max_window_layers=2, sliding_window=4)
    assert_same_model(folder)


def test_yarn_with_truncate_null_does_not_truncate(tmp_path):
    folder = write_folder(tmp_path / "hf", "qwen3")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    change_config(folder, rope_parameters=rope | {"truncate": None})
    assert_same_model(folder)


# ---------------------------------------------------------------- the comparison


def test_a_wrong_conversion_is_noticed_and_leaves_nothing(folder, capsys, monkeypatch):
    swapped = dict(hf._BACK_LAYER)
    swapped["mlp.gate_proj.weight"] = "mlp.up.weight"
    swapped["mlp.up_proj.weight"] = "mlp.gate.weight"
    monkeypatch.setattr(hf, "_BACK_LAYER", swapped)
    assert "verification of the import failed" in refusal(folder, capsys)
    code, save = run(folder, "--no-verify")
    assert code == 0 and checkpoint.published(save)


def test_positions_are_compared_over_the_whole_declared_context(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", "qwen3", max_position_embeddings=100_000)
    assert run(folder)[0] == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "verify: " in line]
    assert ["ok" in line for line in lines] == [True, True, True], lines
    assert "positions 99,744 to 99,999" in lines[1], lines
    assert "each 392th position" in lines[2], lines


def test_a_folder_that_transformers_cannot_run_is_one_line(folder, capsys, monkeypatch):
    from transformers import AutoModelForCausalLM

    def fail(*_, **__):
        raise RuntimeError("size mismatch:\n\tlm_head")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    assert "transformers cannot run it (size mismatch: lm_head)" in refusal(folder, capsys)


def test_what_is_returned_beside_the_logits_does_not_matter(folder):
    change_config(folder, output_attentions=True, output_hidden_states=True, return_dict=False)
    assert run(folder)[0] == 0


def test_the_comparison_is_left_out_from_ten_billion_parameters_on(capsys):
    assert import_hf.should_verify(None, 9_999_999_999)
    assert not import_hf.should_verify(None, 10_000_000_000)
    assert "not compared with transformers: 10,000,000,000 parameters" in capsys.readouterr().err
    assert import_hf.should_verify(True, 10_000_000_000)
    assert not import_hf.should_verify(False, 1)


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize("multiple, rows", [(1, 67), (6, 72), (128, 128)])
def test_the_vocabulary_is_padded_as_asked(folder, multiple, rows):
    tensors = assert_same_model(folder, "--make-vocab-size-divisible-by", str(multiple))
    assert tensors["model.embedding.weight"].shape == (rows, 16)
    assert not tensors["model.embedding.weight"][67:].any()


def test_a_padding_below_one_is_refused(folder, capsys):
    line = refusal(folder, capsys, "--make-vocab-size-divisible-by", "0")
    assert "make_vocab_size_divisible_by = 0: must be at least 1" in line


def test_the_same_folder_is_not_imported_twice(folder, capsys):
    assert run(folder)[0] == 0
    assert run(folder)[0] == 2
    assert "holds a checkpoint already" in capsys.readouterr().err
