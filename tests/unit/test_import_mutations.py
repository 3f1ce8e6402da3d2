"""Whatever config.json says, an import is transformers' model of it, or one line and exit 2.

The import runs without its own comparison, so that its rules are tested and not its safety net.
"""

import contextlib
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.huggingface.imports import checkpoint_logits
from tests.huggingface.model_folders import (
    MODELS,
    SHAPE,
    transformers_logits,
    transformers_model,
    write_folder,
)
from tools import export_hf, import_hf
from tools.huggingface.stored_model import open_stored_model

IDS = torch.randint(SHAPE["vocab_size"], (48,), generator=torch.Generator().manual_seed(3))
POSITIONS = 2 * torch.arange(48)
TOLERANCE = 1e-5
"""Largest error over the largest logit; a wrong setting changes far more."""

WRONG_TYPES = [
    "7",
    "x",
    True,
    False,
    None,
    [],
    {},
    [1, 2],
    {"a": 1},
    7.5,
    4.0,
    ["full_attention"] * 2,
]
OTHER_VALUES = [
    0,
    -1,
    1,
    2,
    3,
    4,
    5,
    8,
    16,
    24,
    32,
    66,
    67,
    68,
    96,
    128,
    10**12,
    10**400,
    0.0,
    0.5,
    1e-6,
    1e-5,
    1.0,
    1e4,
    5e5,
    1e300,
    float("nan"),
    float("inf"),
    "silu",
    "swish",
    "gelu",
    "gelu_pytorch_tanh",
    "default",
    "linear",
    "llama3",
    "yarn",
    "dynamic",
    "longrope",
    "float16",
]
UNKNOWN = [
    "is_causal",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "quantization_config",
    "clip_qkv",
    "logit_scale",
    "attn_logit_softcapping",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "auto_map",
    "pretraining_tp",
    "attention_dropout",
    "is_heterogeneous",
    "to_dict",
    "per_layer_config",
    "torch_dtype",
    "return_dict",
    "output_attentions",
    "num_labels",
    "my_own_key",
    "self",
    "name_or_path",
    "transformers_weights",
    "is_decoder",
    "validate",
    "factor",
    "hidden_activation",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "sliding_window_pattern",
    "rope_local_base_freq",
    "use_bidirectional_attention",
    "cache_implementation",
    "no_rope_layers",
    "no_rope_layer_interval",
]
KINDS = [*MODELS, "gemma3", "gpt2", "Llama", "", None, 3]
ROPE_KEYS = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
    "mrope_section",
    "long_factor",
    "full_attention",
    "sliding_attention",
    "finetuned",
]
values = st.sampled_from(WRONG_TYPES + OTHER_VALUES)


@st.composite
def mutations(draw, content: dict) -> dict:
    """A config.json with one to three things changed."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        how = draw(
            st.sampled_from(["drop", "set", "add", "scale", "rope", "rope", "kind", "older"])
        )
        key = draw(st.sampled_from(sorted(content)))
        if how == "drop":
            content.pop(key)
        elif how == "set":
            content[key] = draw(values)
        elif how == "add":
            content[draw(st.sampled_from(UNKNOWN) | st.text(max_size=8))] = draw(values)
        elif how == "scale" and type(content[key]) in (int, float):
            content[key] = draw(
                st.sampled_from([content[key] + 1, content[key] - 1, content[key] * 2])
            )
        elif how == "rope" and isinstance(rope := content.get("rope_parameters"), dict):
            place = draw(st.sampled_from(ROPE_KEYS))
            # One of the two, where a kind of layer has its own.
            parts = [part for part in rope.values() if isinstance(part, dict)]
            rope = draw(st.sampled_from([rope, *parts]))
            rope.pop(place, None)
            if draw(st.booleans()):
                rope[place] = draw(values)
        elif how == "kind":
            where = draw(st.sampled_from(["model_type", "architectures"]))
            name = draw(st.sampled_from(KINDS))
            content[where] = name if where == "model_type" else [f"{name}ForCausalLM"]
        elif how == "older" and "rope_parameters" in content:
            content["rope_scaling"] = content.pop("rope_parameters")
        if not content:
            break
    return content


def run_main(main, argv: list[str]) -> tuple[int, str]:
    """(exit code, what it wrote to stderr) of a tool."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(argv)
    return code, errors.getvalue()


def check_mutation(original: Path, content: dict) -> str:
    """Import, export, compare -> what became of it."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = root / "hf"
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(original / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(content))
        argv = ["--hf", str(folder), "--save", str(root / "imported"), "--no-verify"]
        code, errors = run_main(import_hf.main, argv)
        if code != 0:
            lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
            assert code == 2 and lines, (content, code, errors)
            assert all(line.startswith("error: ") and "Fix:" in line for line in lines), (
                content,
                errors,
            )
            assert not (root / "imported").exists(), content
            return "refused"
        check_same_model(folder, root, content)
        return "imported"


def check_same_model(folder: Path, root: Path, content: dict) -> None:
    """Assert that import and export are what transformers makes of the folder."""
    theirs = transformers_model(folder)
    expected = transformers_logits(theirs, IDS, POSITIONS)
    exported = root / "exported"
    export_hf.export(export_hf.Arguments(load=str(root / "imported"), output=str(exported)))
    source = open_stored_model(str(root / "imported"), None)
    ours = checkpoint_logits(source, exported, IDS, POSITIONS)
    difference = (ours - expected).abs().max()
    assert difference <= TOLERANCE * expected.abs().max(), (
        content,
        difference,
        expected.abs().max(),
    )
    again = transformers_model(exported)
    weights = theirs.state_dict()
    back = again.state_dict()
    assert weights.keys() == back.keys(), content
    assert [key for key in weights if not torch.equal(weights[key], back[key])] == [], content
    found = transformers_logits(again, IDS, POSITIONS)
    assert torch.equal(found, expected), (content, (found - expected).abs().max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """model_type -> (folder, content of its config.json)."""
    root = tmp_path_factory.mktemp("folders")
    made = {kind: write_folder(root / kind, kind) for kind in MODELS}
    return {
        kind: (folder, json.loads((folder / "config.json").read_text()))
        for kind, folder in made.items()
    }


def check_many(folders, examples: int) -> Counter:
    """Run as many mutations as asked, the same in every run -> how often which end was reached."""
    ends = Counter()

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data(), kind=st.sampled_from(sorted(MODELS)))
    def check(data, kind):
        folder, content = folders[kind]
        ends[check_mutation(folder, data.draw(mutations(content)))] += 1

    check()
    return ends


def test_the_folders_themselves_are_imported(folders):
    for folder, content in folders.values():
        assert check_mutation(folder, content) == "imported"


def test_a_changed_config_gives_the_same_model_or_one_line(folders):
    ends = check_many(folders, 40)
    assert ends["imported"] >= 10 and ends["refused"] >= 10, ends


@pytest.mark.long
def test_many_changed_configs_give_the_same_model_or_one_line(folders):
    ends = check_many(folders, 700)
    assert sum(ends.values()) >= 500 and ends["imported"] >= 100, ends
