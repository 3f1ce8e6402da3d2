"""An exported checkpoint is the same model in transformers, for every architecture we map to."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batch import IGNORE, Batch
from model.hf.architectures import ARCHITECTURES
from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.stored_tensors import read_whole_tensors, tensor_names
from pretrain.config.flat import field_table
from pretrain.checkpointing.setting_changes import setting_changes
from tests.dist.training import VOCABULARY, base_arguments, losses, train, write_corpus
from tests.huggingface.imports import checkpoint_logits
from tools.export_hf import Arguments, export
from tools.huggingface.stored_model import open_stored_model
from tools.import_hf import Arguments as ImportArguments
from tools.import_hf import import_folder

MODELS = {
    "LlamaForCausalLM": dict(untie_embeddings_and_output_weights=True, rotary_base=5e5),
    "LlamaForCausalLM tied mqa": dict(
        untie_embeddings_and_output_weights=False,
        num_query_groups=1,
        kv_channels=12,
        use_rope_scaling=True,
        original_max_position_embeddings=64,
    ),
    "MistralForCausalLM": dict(window_size="39,0", num_query_groups=1),
    "Qwen3ForCausalLM windows": dict(
        qk_layernorm=True, window_size="31,0", window_attn_skip_freq=2
    ),
    "Qwen2ForCausalLM": dict(
        add_qkv_bias=True, norm_epsilon=1e-6, rope_type="linear", rope_scaling_factor=4.0
    ),
    "Qwen3ForCausalLM": dict(
        qk_layernorm=True,
        kv_channels=16,
        rope_type="yarn",
        rope_scaling_factor=8.0,
        original_max_position_embeddings=32,
    ),
}


@pytest.fixture(scope="module")
def trained(pool, tmp_path_factory):
    """Model name -> folder of a run of 3 steps on tp 2 (large weights, so that logits are not all
    alike)."""
    root = tmp_path_factory.mktemp("exports")
    corpus = write_corpus(root / "corpus")
    runs = {}
    for number, (name, model) in enumerate(MODELS.items()):
        runs[name] = root / f"run{number}"
        argv = base_arguments(
            corpus,
            save=str(runs[name]),
            train_iters=3,
            seq_length=256,
            init_method_std=0.2,
            tensor_model_parallel_size=2,
            **model,
        )
        assert pool.run(train, 2, argv) == ["done"] * 2
    return runs


@pytest.mark.parametrize("name", MODELS)
def test_export_verifies_and_logits_agree_at_the_last_positions(trained, tmp_path, name, capsys):
    from transformers import AutoModelForCausalLM

    output = tmp_path / "hf"
    export(
        Arguments(
            load=str(trained[name]),
            output=str(output),
            verify=True,
            max_position_embeddings=100_000,
        )
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if "  ok" in line]
    # Weights, the continuation, and in both precisions five places, or four with a plain rope.
    assert len(rows) == 2 + 2 * (5 if "rope" in str(MODELS[name].keys()) else 4), rows
    config = json.loads((output / "config.json").read_text())
    assert (
        config["architectures"] == [name.split()[0]]
        and config["max_position_embeddings"] == 100_000
    )
    assert config["vocab_size"] == VOCABULARY
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert theirs.__class__.__name__ == name.split()[0]
    assert theirs.get_input_embeddings().weight.shape[0] == VOCABULARY, (
        "padded rows must not be exported"
    )
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, 300))
    positions = torch.arange(99_700, 100_000)
    with torch.no_grad():
        expected = theirs(input_ids=ids[None], position_ids=positions[None]).logits[0]
    found = checkpoint_logits(open_stored_model(str(trained[name]), None), output, ids, positions)
    largest = expected.abs().max()
    assert largest > 1 and (found - expected).abs().max() <= 1e-5 * largest
    # One wrong detail is seen: other positions give other logits.
    shifted = checkpoint_logits(
        open_stored_model(str(trained[name]), None), output, ids, positions * 2
    )
    assert (shifted - expected).abs().max() > 1e-3 * largest


def test_declared_context_of_yarn(trained, tmp_path, capsys):
    for number, (asked, declared) in enumerate(((None, 256), (100_000, 100_000))):
        export(
            Arguments(
                load=str(trained["Qwen3ForCausalLM"]),
                output=str(tmp_path / str(number)),
                max_position_embeddings=asked,
            )
        )
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert config["max_position_embeddings"] == declared
        assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 8.0
        assert ("gives another model than 256 does" in capsys.readouterr().err) == (declared != 256)


def test_verification_catches_swapped_weights(trained, tmp_path, monkeypatch):
    row = ARCHITECTURES["llama"]
    swapped = dict(row.layer_names)
    swapped["mlp.gate.weight"] = row.layer_names["mlp.up.weight"]
    swapped["mlp.up.weight"] = row.layer_names["mlp.gate.weight"]
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(row, layer_names=swapped))
    with pytest.raises(ValueError, match="verification of the export failed"):
        export(
            Arguments(
                load=str(trained["LlamaForCausalLM"]), output=str(tmp_path / "hf"), verify=True
            )
        )
    assert not (tmp_path / "hf").exists()


def test_bfloat16_shards_and_rope_settings(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    output = tmp_path / "hf"
    export(
        Arguments(
            load=str(trained["LlamaForCausalLM"]),
            output=str(output),
            dtype="bfloat16",
            verify=True,
            max_shard_bytes=20_000,
        )
    )
    assert len(list(output.glob("model-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16 and model.config.max_position_embeddings == 256
    assert model.config.rope_parameters["rope_theta"] == 5e5


def test_bad_input_leaves_nothing(trained, tmp_path):
    run = str(trained["LlamaForCausalLM"])
    (tmp_path / "taken").mkdir()
    for arguments, message in (
        (
            dict(load=str(tmp_path / "nowhere"), output=str(tmp_path / "out")),
            "no checkpoint is published",
        ),
        (dict(load=run, output=str(tmp_path / "taken")), "exists already"),
        (dict(load=run, output=str(tmp_path / "out"), ckpt_step=9), "missing or not complete"),
        (
            dict(load=run, output=str(tmp_path / "out"), verify=True, verify_text=__file__),
            "has no tokenizer",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            export(Arguments(**arguments))
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_not_exported(trained, tmp_path):
    folder = find_published(trained["Qwen3ForCausalLM"])
    data = next(folder.glob("*.distcp"))
    original = data.read_bytes()
    try:
        data.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(ValueError, match="differs from its checksum"):
            export(Arguments(load=str(trained["Qwen3ForCausalLM"]), output=str(tmp_path / "out")))
    finally:
        data.write_bytes(original)


def test_loss_of_our_model_equals_transformers(trained, tmp_path):
    """Cross entropy over real positions, not only logits: labels are shifted once, by the data."""
    from transformers import AutoModelForCausalLM

    output = tmp_path / "hf"
    export(Arguments(load=str(trained["LlamaForCausalLM"]), output=str(output)))
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, VOCABULARY, 200))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(output)(
            input_ids=ids[None], labels=ids[None]
        ).loss
    source = open_stored_model(str(trained["LlamaForCausalLM"]), None)
    ours = torch.nn.functional.cross_entropy(
        checkpoint_logits(source, output, ids, torch.arange(200))[:-1], ids[1:]
    )
    assert abs(float(ours - theirs)) < 1e-5 * float(theirs)
    assert IGNORE == -100 and Batch.__doc__ and os.path.isdir(output)


@pytest.mark.parametrize("name", MODELS)
def test_import_gives_back_the_same_weights_and_settings(trained, tmp_path, name):
    from pretrain.config.config_yaml import read_config_yaml

    export(Arguments(load=str(trained[name]), output=str(tmp_path / "hf")))
    folder = import_folder(
        ImportArguments(hf=str(tmp_path / "hf"), save=str(tmp_path / "imported"))
    )
    original = find_published(trained[name])
    names = tensor_names(original)
    assert names == tensor_names(folder)
    before, after = (read_whole_tensors(place, names) for place in (original, folder))
    for tensor in names:
        rows = (
            VOCABULARY
            if tensor in ("model.embedding.weight", "model.output.weight")
            else before[tensor].shape[0]
        )
        assert torch.equal(before[tensor][:rows], after[tensor][:rows]), tensor
    configs = [read_config_yaml(str(place / "config.yaml")) for place in (original, folder)]
    assert [change for change in setting_changes(*configs) if change.kind == "forbidden"] == []
    assert configs[0].model.rope == configs[1].model.rope


def test_mups_factors_are_written_out_and_come_back(pool, tmp_path, capsys):
    """A model with muP is Granite's in transformers: the same logits, and a plain model again."""
    from transformers import AutoModelForCausalLM

    from pretrain.config.config_yaml import read_config_yaml

    corpus = write_corpus(tmp_path / "corpus")
    mup = dict(use_mup=True, mup_base_hidden_size=16, init_method_std=0.2)
    argv = base_arguments(corpus, save=str(tmp_path / "run"), train_iters=2, **mup)
    assert pool.run(train, 1, argv) == ["done"]
    output = tmp_path / "hf"
    export(Arguments(load=str(tmp_path / "run"), output=str(output), verify=True))
    assert capsys.readouterr().out.count("  ok") == 4
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["GraniteForCausalLM"]
    # Heads of 8, and twice the base's width.
    assert (config["logits_scaling"], config["attention_multiplier"]) == (2.0, 1 / 8)
    folder = import_folder(ImportArguments(hf=str(output), save=str(tmp_path / "imported")))
    imported = read_config_yaml(str(folder / "config.yaml")).model
    assert (imported.use_mup, imported.logits_scaling, imported.softmax_scale) == (False, 2.0, 0.125)
    # One divisor the less is seen.
    (output / "config.json").write_text(json.dumps(config | {"logits_scaling": 1.0}))
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, 40))
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(input_ids=ids[None]).logits[0]
    source = open_stored_model(str(tmp_path / "run"), None)
    found = checkpoint_logits(source, output, ids, torch.arange(40))
    torch.testing.assert_close((found * 2).float(), logits, rtol=1e-4, atol=1e-5)


def test_a_run_starts_from_an_imported_model(pool, trained, tmp_path):
    """The first loss of the new run is the imported model's loss, on another layout, with and
    without the flags that describe the model."""
    name = "Qwen3ForCausalLM"
    corpus = write_corpus(tmp_path / "corpus", seed=5)
    export(Arguments(load=str(trained[name]), output=str(tmp_path / "hf")))
    import_folder(ImportArguments(hf=str(tmp_path / "hf"), save=str(tmp_path / "imported")))
    found = []
    for source in (trained[name], tmp_path / "imported"):
        argv = base_arguments(
            corpus,
            save=str(tmp_path / f"run{len(found)}"),
            pretrained_checkpoint=str(source),
            train_iters=2,
            context_parallel_size=2,
            **MODELS[name],
        )
        if found:
            argv = [*without_model_flags(argv), "--use-checkpoint-args"]
        assert pool.run(train, 2, argv) == ["done"] * 2
        found.append(losses(tmp_path / f"run{len(found)}"))
    assert found[0] == found[1] and sorted(found[0]) == [1, 2]


def without_model_flags(argv: list[str]) -> list[str]:
    words = " ".join(argv).split(" --")
    kept = [
        word.removeprefix("--")
        for word in words
        if field_table()[word.removeprefix("--").split()[0].replace("-", "_")][0] != "model"
    ]
    return [part for word in kept for part in f"--{word}".split()]


def test_folders_that_cannot_be_imported_are_refused(trained, tmp_path):
    export(Arguments(load=str(trained["LlamaForCausalLM"]), output=str(tmp_path / "hf")))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())

    def refuse(message, **changes):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            import_folder(ImportArguments(hf=str(tmp_path / "hf"), save=str(tmp_path / "imported")))
        assert not (tmp_path / "imported").exists()

    refuse("model_type = gpt2: not built here", model_type="gpt2")
    refuse(
        "rope_type = longrope: only default, linear, llama3, yarn are built",
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4},
    )
    refuse("attention_bias = True: only False", attention_bias=True)
    refuse("the weights do not fit config.json", num_hidden_layers=3)
    refuse("has shape", intermediate_size=64)
    with pytest.raises(ValueError, match="no config.json in it"):
        import_folder(ImportArguments(hf=str(tmp_path), save=str(tmp_path / "imported")))


def test_the_model_card_has_the_facts_of_the_training(trained, tmp_path):
    run = trained["Qwen3ForCausalLM"]
    export(Arguments(load=str(run), output=str(tmp_path / "hf"), dtype="bfloat16"))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "tags:\n- ithaca\n- qwen3\n- pretraining\n" in card
    assert "Trained from scratch." in card
    assert "| checkpoint | step 3, after 3,072 tokens |" in card
    assert f"| training loss of the last step | {losses(run)[3]:.4f} |" in card
    assert "| main | 256 | 3,072 | 1,024 tokens | 0.01 | corpus 100.0% |" in card, card
    # Nothing of this machine.
    assert str(tmp_path.parent) not in card and "/" not in card.replace("key/value", "")
