"""An import is what transformers makes of config.json, or it is refused by name."""

import json
from dataclasses import replace

import pytest
import torch

from data.tokenizers.tokenizer import build_tokenizer
from model.hf.architectures import ARCHITECTURES
from model.hf.choice import architecture_of
from pretrain.checkpointing.folders import LATEST, find_published
from pretrain.config.config_yaml import read_config_yaml
from tests.huggingface import chat_folders
from tests.huggingface.imports import IDS, POSITIONS, assert_same_model, our_logits, refusal, run
from tests.huggingface.model_folders import (
    change_config,
    change_weights,
    transformers_logits,
    transformers_model,
    write_folder,
)
from tools import import_hf
from tools.huggingface import compare_weights, import_settings, sample_text, verify_import
from tools.huggingface.config import interpret_config


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "hf", "llama")


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_missing_fields_have_the_defaults_of_the_architecture(tmp_path, kind):
    from transformers import AutoConfig

    epsilon = AutoConfig.for_model(kind).rms_norm_eps
    folder = write_folder(tmp_path / "hf", kind)
    dropped = (
        "rms_norm_eps",
        "hidden_act",
        "initializer_range",
        "rope_parameters",
        "max_position_embeddings",
    )
    change_config(folder, drop=dropped)
    assert_same_model(folder)
    config = read_config_yaml(str(find_published(tmp_path / "imported") / "config.yaml"))
    assert config.model.norm_epsilon == epsilon


def test_a_missing_head_size_of_qwen3_is_128(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", "qwen3", head_dim=128)
    change_config(folder, drop=("head_dim",))
    assert_same_model(folder)


def test_a_missing_intermediate_size_is_the_architecture_s(folder, capsys):
    change_config(folder, drop=("intermediate_size",))
    assert "gate_proj.weight has shape (24, 16), config.json means (11008, 16)" in refusal(
        folder, capsys
    )


def test_swish_is_silu(folder):
    change_config(folder, hidden_act="swish")
    assert_same_model(folder)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("llama", dict(is_causal=False), "is_causal = False: only True is built"),
        ("llama", dict(attention_bias=True), "attention_bias = True: only False is built"),
        ("llama", dict(mlp_bias=True), "mlp_bias = True: only False is built"),
        (
            "llama",
            dict(sliding_window=16),
            "sliding_window = 16: transformers' LlamaForCausalLM has full",
        ),
        ("mistral", dict(sliding_window=0), "sliding_window = 0: must be a whole number"),
        ("llama", dict(layer_types=["sliding_attention", "full_attention"]), "layer_types = "),
        ("llama", dict(quantization_config={"quant_method": "fp8"}), "quantization_config = "),
        ("llama", dict(attn_logit_softcapping=30.0), "attn_logit_softcapping = 30.0: only None"),
        ("llama", dict(clip_qkv=8.0), "clip_qkv = 8.0: only None"),
        ("llama", dict(logit_scale=0.25), "logit_scale = 0.25"),
        (
            "llama",
            dict(hidden_act="gelu"),
            "hidden_act = gelu: only silu, swish, gelu_pytorch_tanh",
        ),
        (
            "llama",
            dict(partial_rotary_factor=0.5),
            "partial_rotary_factor = 0.5: only 1.0 is built",
        ),
        ("llama", dict(per_layer_config={"0": {"head_dim": 8}}), "per_layer_config = "),
        ("llama", dict(to_dict=1), "to_dict = 1: is the name of a method"),
        ("llama", dict(auto_map=8), "auto_map = 8: must be an object of class names"),
        ("llama", dict(auto_map={"AutoConfig": 8}), "must be an object of class names"),
        ("llama", dict(vocab_size="67"), "expected int, got str"),
        ("llama", dict(num_hidden_layers=True), "expected int, got bool"),
        ("llama", dict(rms_norm_eps=None), "expected float, got NoneType"),
        (
            "llama",
            dict(rms_norm_eps=float("nan")),
            "rms_norm_eps = nan: must be a finite number above 0",
        ),
        (
            "llama",
            dict(num_key_value_heads=3),
            "num_key_value_heads = 3: must divide num_attention_heads = 4",
        ),
        ("llama", dict(pad_token_id=67), "pad_token_id = 67: is not in the vocabulary of 67"),
        ("llama", dict(max_position_embeddings=0), "max_position_embeddings = 0: must be from 1"),
        ("llama", dict(model_type="gpt2"), "model_type = gpt2: not built here"),
        (
            "qwen2",
            dict(layer_types=["chunked_attention", "full_attention"]),
            "layer_types has chunked_attention: only full_attention and sliding_attention",
        ),
        (
            "qwen2",
            dict(layer_types=["sliding_attention"] * 2),
            "sliding_window = null: layer_types",
        ),
        ("qwen2", dict(head_dim=None), "head_dim = None: must be an even whole number"),
        ("qwen3", dict(attention_bias=True), "attention_bias = True: only False is built"),
    ],
    ids=str,
)
def test_what_would_be_another_model_is_refused_by_name(tmp_path, capsys, kind, changes, message):
    folder = write_folder(tmp_path / "hf", kind)
    change_config(folder, **changes)
    assert message in refusal(folder, capsys)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\x80"])
def test_a_config_that_is_no_object_is_one_line(folder, capsys, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json: " in refusal(folder, capsys)


def test_keys_without_effect_are_named(folder, capsys):
    change_config(
        folder,
        drop=("architectures",),
        my_own_key=3,
        auto_map={"AutoConfig": "x.Z", "AutoModelForCausalLM": "x.Y"},
        attention_dropout=0.1,
        initializer_range=0.0,
    )
    assert_same_model(folder)
    errors = capsys.readouterr().err
    for text in (
        "my_own_key = 3: LlamaConfig of transformers has no such setting; ignored",
        "auto_map = ",
        "attention_dropout = 0.1: there is no dropout here",
        "initializer_range = 0.0",
    ):
        assert text in errors, errors


def test_a_window_that_no_layer_uses_is_read(tmp_path):
    folder = write_folder(tmp_path / "hf", "qwen2")
    change_config(
        folder,
        drop=("layer_types",),
        use_sliding_window=True,
        max_window_layers=2,
        sliding_window=4,
    )
    assert_same_model(folder)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_windows_of_the_last_layers_are_read(tmp_path, kind):
    folder = write_folder(tmp_path / "hf", kind)
    window = dict(use_sliding_window=True, max_window_layers=1, sliding_window=4)
    change_config(folder, drop=("layer_types",), **window)
    assert_same_model(folder)
    config = read_config_yaml(str(find_published(tmp_path / "imported") / "config.yaml"))
    assert config.model.windows == (None, 4)


def test_mistral_has_its_window_in_all_layers(tmp_path):
    folder = write_folder(tmp_path / "hf", "mistral", sliding_window=5)
    assert_same_model(folder)
    config = read_config_yaml(str(find_published(tmp_path / "imported") / "config.yaml"))
    assert config.model.windows == (5, 5)


def test_mistral_without_a_window_is_read(tmp_path):
    folder = write_folder(tmp_path / "hf", "mistral", sliding_window=None)
    assert_same_model(folder)
    config = read_config_yaml(str(find_published(tmp_path / "imported") / "config.yaml"))
    assert config.model.window_size == []
    # It leaves as what it came as; a model that began here would be a Llama.
    assert architecture_of(config.model, "mistral").class_name == "MistralForCausalLM"
    assert architecture_of(config.model).class_name == "LlamaForCausalLM"


def test_yarn_with_truncate_null_does_not_truncate(tmp_path):
    folder = write_folder(tmp_path / "hf", "qwen3")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    change_config(folder, rope_parameters=rope | {"truncate": None})
    assert_same_model(folder)


# ---------------------------------------------------------------- the comparison


def test_a_wrong_conversion_is_noticed_and_leaves_nothing(folder, capsys, monkeypatch):
    row = ARCHITECTURES["llama"]
    swapped = dict(row.layer_names)
    swapped["mlp.gate.weight"] = "mlp.up_proj.weight"
    swapped["mlp.up.weight"] = "mlp.gate_proj.weight"
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(row, layer_names=swapped))
    assert "verification of the import failed" in refusal(folder, capsys)
    code, save = run(folder, "--no-verify")
    assert code == 0 and find_published(save)


def test_a_fault_that_the_rounding_of_fp32_hides_is_noticed(folder, capsys, monkeypatch):
    """An epsilon ten times too large, beside hidden states that are large themselves."""

    def enlarge(tensors):
        tensors["model.embed_tokens.weight"] *= 30

    def with_another_epsilon(content):
        settings = interpret_config(content)
        settings.model["norm_epsilon"] *= 10
        return settings

    change_weights(folder, enlarge)
    monkeypatch.setattr(import_hf, "interpret_config", with_another_epsilon)
    save = folder.parent / "unverified"
    assert import_hf.main(["--hf", str(folder), "--save", str(save), "--no-verify"]) == 0
    expected = transformers_logits(transformers_model(folder), IDS, POSITIONS)
    difference = float((our_logits(save) - expected).abs().max() / expected.abs().max())
    assert difference < 1e-5, difference
    assert "verification of the import failed" in refusal(folder, capsys)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_rounding_alone_is_no_difference(tmp_path, kind):
    """Wide random weights and large biases, whose logits fp32 rounds by 2e-5 of the largest."""
    wide = dict(hidden_size=256, num_attention_heads=8, head_dim=32, num_hidden_layers=6)
    folder = write_folder(tmp_path / "hf", kind, max_position_embeddings=5000, **wide)
    assert run(folder)[0] == 0


def test_positions_are_compared_over_the_whole_declared_context(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", "qwen3", max_position_embeddings=100_000)
    assert run(folder)[0] == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " logits, " in line]
    assert [line.split("  ok  ")[1:] != [] for line in lines] == [True] * len(lines), lines
    for precision in ("fp32", "fp64"):
        for place in (
            "positions 0 to 255",
            "positions 32 to 287",
            "positions 49,872 to 50,127",
            "positions 99,744 to 99,999",
            "each 392th position to 99,960",
        ):
            assert any(f"{precision} logits, {place} " in line for line in lines), (place, lines)
    assert len(lines) == 10


def test_a_checkpoint_that_stores_other_weights_than_the_folder_is_removed(
    folder, capsys, monkeypatch
):
    read = compare_weights.StoredTensors.read

    def read_with_fault(self, name):
        tensor = read(self, name)
        if name == "model.layers.1.attention.k.weight":
            tensor.view(torch.int32)[0, 3] ^= 1
        return tensor

    monkeypatch.setattr(compare_weights.StoredTensors, "read", read_with_fault)
    code, save = run(folder)
    assert code == 2 and list(save.iterdir()) == []
    assert "layers.1.attention.k.weight differs in 1 of 128 numbers" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_again_is_not_left(folder, capsys, monkeypatch):
    def fail(stored, name):
        raise OSError(5, "Input/output error", "0.distcp")

    monkeypatch.setattr(compare_weights.StoredTensors, "read", fail)
    code, save = run(folder)
    assert code != 0 and list(save.iterdir()) == []


def test_real_text_is_compared_where_the_folder_has_a_tokenizer(tmp_path):
    folder = chat_folders.write_tokenizer(chat_folders.write_model(tmp_path / "hf"))
    sizes = dict(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
    config = import_settings.make_config(sizes, 320, folder, vocab_multiple=1, ids_from=None)
    questions = verify_import.questions_about(config, 320, 1000)
    text = build_tokenizer("HuggingFaceTokenizer", str(folder), None).decode(
        questions.sequences[0].ids.tolist()
    )
    assert len(text) > 256 and text in sample_text.TEXT.read_text(encoding="utf-8")


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


@pytest.mark.parametrize(
    "words, compared",
    [
        ((), True),
        (("--verify",), True),
        (("--verify", "True"), True),
        (("--no-verify",), False),
        (("--verify", "False"), False),
    ],
)
def test_each_spelling_of_the_switch_is_read(folder, capsys, words, compared):
    assert run(folder, *words)[0] == 0
    assert ("verify: " in capsys.readouterr().out) == compared


def test_generation_settings_that_transformers_ignores_are_named(folder, capsys):
    (folder / "generation_config.json").write_text("{")
    assert run(folder)[0] == 0
    assert "generation_config.json: is not valid JSON; kept as it is" in capsys.readouterr().err


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


def test_an_import_that_was_killed_before_a_file_named_it_is_made_again(folder):
    _, save = run(folder)
    (save / LATEST).unlink()
    assert run(folder)[0] == 0
    assert (save / LATEST).is_file()


def test_a_checkpoint_that_no_file_names_is_not_replaced(folder, capsys):
    _, save = run(folder)
    (save / LATEST).unlink()
    # A run's own checkpoint, not one that an import left.
    progress = save / "iter_0000000" / "progress.json"
    progress.write_text(progress.read_text().replace('"imported"', '"base"'))
    before = (save / "iter_0000000" / "config.yaml").stat().st_ino
    assert run(folder)[0] == 2
    assert "holds a checkpoint already" in capsys.readouterr().err
    assert (save / "iter_0000000" / "config.yaml").stat().st_ino == before
