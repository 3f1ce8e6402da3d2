"""A muP model whose factors no key of config.json holds is the same model in transformers: its
weights hold them."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from model.hf.architectures import ARCHITECTURES
from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.stored_tensors import read_whole_tensors, tensor_names
from tests.dist.training import VOCABULARY, base_arguments, train, write_corpus
from tests.huggingface.imports import checkpoint_logits
from tests.huggingface.model_folders import transformers_logits, transformers_model
from tools.export_hf import Arguments, export
from tools.huggingface.double import KeepDouble, compute_in_double
from tools.huggingface.stored_model import open_stored_model

MUP = dict(use_mup=True, mup_base_hidden_size=16, optimizer="muon", init_method_std=0.2)
MODELS = {
    "qwen3": dict(qk_layernorm=True, kv_channels=16, untie_embeddings_and_output_weights=False),
    "qwen2": dict(add_qkv_bias=True, kv_channels=64, untie_embeddings_and_output_weights=True),
    "mistral": dict(window_size="15,0", kv_channels=16),
    "olmo2": dict(
        qk_layernorm=True, qk_layernorm_scope="all_heads", norm_placement="post", kv_channels=4
    ),
}
FACTORS = {
    "qwen3": {"norm.weight": 1 / 2, "q_norm.weight": 1 / 4},
    "qwen2": {"norm.weight": 1 / 2, "q_proj.weight": 1 / 8, "q_proj.bias": 1 / 8},
    "mistral": {"norm.weight": 1 / 2, "q_proj.weight": 1 / 4},
    "olmo2": {"norm.weight": 1 / 2, "q_norm.weight": 1 / 2},
}
"""Parameter -> what it holds: one over the width's ratio, or over the root of the head size."""
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, 60))


@pytest.fixture(scope="module")
def trained(pool, tmp_path_factory):
    """model_type -> folder of a run of 2 steps."""
    root = tmp_path_factory.mktemp("folded")
    corpus = write_corpus(root / "corpus")
    for name, model in MODELS.items():
        argv = base_arguments(corpus, save=str(root / name), train_iters=2, **MUP, **model)
        assert pool.run(train, 1, argv) == ["done"]
    return root


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_hold_the_factors(trained, tmp_path, name, capsys):
    output = tmp_path / "hf"
    export(Arguments(load=str(trained / name), output=str(output), verify=True))
    said = capsys.readouterr().out
    notes = re.findall(r"note: (\S+) is multiplied by (\S+), for which (\w+) has no key", said)
    assert len(notes) == len(FACTORS[name]), said
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == name

    # The files: each weight of ours, times what its name is to get.
    row = ARCHITECTURES[name]
    written = load_file(output / "model.safetensors")
    folder = find_published(trained / name)
    for own, tensor in read_whole_tensors(folder, tensor_names(folder)).items():
        theirs = row.huggingface_name(own.removeprefix("model."))
        found = [
            factor
            for end, factor in FACTORS[name].items()
            if theirs.endswith(f"self_attn.{end}") or theirs == f"model.{end}"
        ]
        expected = tensor[: written[theirs].shape[0]].double() * (found[0] if found else 1.0)
        assert torch.equal(written[theirs].double(), expected), theirs

    # The model: transformers beside ours with muP, in fp64.
    theirs = transformers_model(output)
    compute_in_double(theirs, theirs.model.layers)
    positions = torch.arange(len(IDS))
    with KeepDouble():
        expected = transformers_logits(theirs, IDS, positions)
    stored = open_stored_model(str(trained / name), None)
    difference = (checkpoint_logits(stored, output, IDS, positions) - expected).abs().max()
    assert difference <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_rounded_weights_are_compared_as_they_are_written(trained, tmp_path, name):
    output = tmp_path / "hf"
    export(Arguments(load=str(trained / name), output=str(output), dtype="bfloat16", verify=True))
    assert load_file(output / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_the_model_card_names_mup_and_muon(trained, tmp_path):
    export(Arguments(load=str(trained / "qwen3"), output=str(tmp_path / "hf")))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["ithaca", "qwen3", "pretraining"]
    assert "| muP | learning rate of a base of width 16 |" in card, card
    assert "| optimizer | Muon of the layers' matrices, momentum 0.95; for the rest AdamW," in card
