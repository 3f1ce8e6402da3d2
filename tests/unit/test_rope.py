"""Rotary embeddings are those of transformers bit for bit, and survive export and import."""

from dataclasses import asdict, fields, replace

import pytest
import torch

from data.batch import IGNORE, Batch
from model.attention_backends.choice import choose_attention
from model.build import build_whole_model, parameter_shapes
from model.config import ModelConfig
from model.hf.choice import architecture_of
from model.hf.config_json import context_to_declare, huggingface_config
from model.init import normal_rows
from model.pointwise import rotate
from model.rope import PARAMETERS, Rope, inverse_frequencies, rotary_tables
from pretrain.config.load import load_config
from pretrain.config.phase_config import PhaseConfig
from tools.huggingface.config import interpret_config

LLAMA3 = dict(use_rope_scaling=True)
YARN = dict(rope_type="yarn", rope_scaling_factor=4.0, original_max_position_embeddings=32768)
ROPES = {
    "default": dict(),
    "default 5e5": dict(rotary_base=5e5),
    "default 5e8": dict(rotary_base=5e8),
    "linear": dict(rope_type="linear", rope_scaling_factor=4.0),
    "linear uneven": dict(rope_type="linear", rope_scaling_factor=3.3, rotary_base=1e6),
    "llama3": LLAMA3 | dict(rotary_base=5e5),
    "llama3.2": LLAMA3 | dict(rotary_base=5e5, rope_scaling_factor=32.0),
    "llama3 other": dict(
        rope_type="llama3",
        rotary_base=8e6,
        rope_scaling_factor=128.0,
        rope_low_freq_factor=0.7,
        rope_high_freq_factor=9.3,
        original_max_position_embeddings=4097,
    ),
    "llama3 factor 1": LLAMA3 | dict(rope_scaling_factor=1.0),
    "yarn": YARN | dict(rotary_base=1e6),
    "yarn betas": YARN | dict(yarn_beta_fast=18.7, yarn_beta_slow=0.3),
    "yarn not rounded": YARN
    | dict(yarn_correction_range_round_to_int=False, rope_scaling_factor=10.7),
    "yarn attention": YARN | dict(yarn_attention_factor=0.9),
    "yarn mscales": YARN
    | dict(yarn_mscale=0.707, yarn_mscale_all_dim=1.3, rope_scaling_factor=40.0),
    "yarn tiny original": YARN | dict(original_max_position_embeddings=2),
    "yarn factor 1": YARN | dict(rope_scaling_factor=1.0),
    "yarn million": YARN
    | dict(rope_scaling_factor=128.0, original_max_position_embeddings=8192, rotary_base=5e8),
}
POSITIONS = torch.cat(
    [torch.arange(64), torch.arange(2**17, 2**17 + 64), torch.arange(2**20 - 63, 2**20 + 1)]
)


def model_config(rope: dict, **changes) -> ModelConfig:
    shape = dict(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=32,
        init_method_std=0.2,
        untie_embeddings_and_output_weights=True,
    )
    config = ModelConfig(**(shape | rope | changes))
    assert config.validate() == [] and config.rope_problems() == []
    return config


def exported(config: ModelConfig, **changes) -> dict:
    """The config.json of an export."""
    declared = context_to_declare(config.rope, 2**20)
    row = architecture_of(config)
    return huggingface_config(row, config, 128, config.rope, declared, "float32", None) | changes


@pytest.mark.parametrize("head_size", [128, 96, 2])
@pytest.mark.parametrize("name", ROPES)
def test_angles_are_those_of_transformers_bit_for_bit(name, head_size):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = model_config(ROPES[name], kv_channels=head_size)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**exported(config)))
    assert theirs.rope_type == config.rope.type
    assert torch.equal(inverse_frequencies(head_size, config.rope), theirs.inv_freq)
    assert config.rope.attention_scaling == theirs.attention_scaling
    for dtype in (torch.float32, torch.bfloat16):
        cos, sin = theirs(torch.zeros(1, dtype=dtype), POSITIONS[None])
        ours = rotary_tables(POSITIONS, head_size, config.rope, dtype)
        assert (
            torch.equal(ours[0], cos[0]) and torch.equal(ours[1], sin[0]) and ours[0].dtype == dtype
        )
        q = torch.randn(len(POSITIONS), 2, head_size, dtype=dtype)
        expected, _ = apply_rotary_pos_emb(
            q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos, sin
        )
        assert torch.equal(rotate(q, *ours), expected[0].transpose(0, 1))
    in_double = rotary_tables(POSITIONS, head_size, config.rope, torch.float64)
    assert torch.equal(
        in_double[0], rotary_tables(POSITIONS, head_size, config.rope, torch.float32)[0].double()
    )


def test_every_parameter_changes_the_angles():
    """Otherwise the comparison above could not see one that is not read."""

    def table(**settings):
        return rotary_tables(POSITIONS, 128, model_config(settings).rope, torch.float32)[0]

    llama3 = LLAMA3 | dict(rotary_base=5e5)
    for start, changes in (
        ({}, [dict(rotary_base=5e5), dict(rope_type="linear", rope_scaling_factor=4.0)]),
        (
            llama3,
            [
                dict(rope_scaling_factor=4.0),
                dict(rope_low_freq_factor=2.0),
                dict(rope_high_freq_factor=3.0),
                dict(original_max_position_embeddings=4096),
            ],
        ),
        (
            YARN,
            [
                dict(rope_scaling_factor=5.0),
                dict(original_max_position_embeddings=4096),
                dict(yarn_beta_fast=8.0),
                dict(yarn_beta_slow=4.0),
                dict(yarn_attention_factor=1.0),
                dict(yarn_mscale=2.0, yarn_mscale_all_dim=1.0),
                dict(yarn_correction_range_round_to_int=False),
            ],
        ),
    ):
        for change in changes:
            assert not torch.equal(table(**start), table(**(start | change))), change


def yarn(**changes) -> Rope:
    return replace(ModelConfig(**YARN).rope, **changes)


@pytest.mark.parametrize(
    "rope, message",
    [
        (Rope(base=0.0), "rotary_base = 0.0: must be above 0"),
        (Rope(base=float("nan")), "rotary_base = nan: must be a finite number"),
        (
            Rope(type="linear", factor=float("inf")),
            "rope_scaling_factor = inf: must be a finite number",
        ),
        (Rope(type="linear", factor=0.5), "rope_scaling_factor = 0.5: must be at least 1"),
        (Rope(type="linear"), "rope_scaling_factor = None: rope_type linear needs it"),
        (
            Rope.make(1e4, "yarn", {"factor": 4.0}),
            "original_max_position_embeddings = None: rope_type yarn needs it",
        ),
        (
            Rope.make(1e4, "llama3", {"original_max_position_embeddings": 0}),
            "original_max_position_embeddings = 0: must be at least 1",
        ),
        (
            Rope.make(1e4, "llama3", {"low_freq_factor": 4.0}),
            "rope_low_freq_factor = 4.0: must be below rope_high_freq_factor = 4.0. Fix: 1 and 4",
        ),
        (
            Rope.make(1e4, "llama3", {"low_freq_factor": 0.0}),
            "rope_low_freq_factor = 0.0: must be above 0",
        ),
        (
            Rope.make(1.0, "yarn", {"factor": 4.0, "original_max_position_embeddings": 8}),
            "rotary_base = 1.0: must be above 1",
        ),
        (
            yarn(beta_fast=1.0),
            "yarn_beta_fast = 1.0: must be above yarn_beta_slow = 1.0. Fix: 32 and 1",
        ),
        (yarn(beta_slow=-1.0), "yarn_beta_slow = -1.0: must be above 0"),
        (yarn(attention_factor=0.0), "yarn_attention_factor = 0.0: must be above 0"),
        (
            yarn(mscale=1.0),
            "yarn_mscale = 1.0, yarn_mscale_all_dim = None: have an effect together only",
        ),
        (
            yarn(mscale=1.0, mscale_all_dim=0.5, attention_factor=1.0),
            "yarn_attention_factor = 1.0: takes the place of yarn_mscale",
        ),
    ],
    ids=str,
)
def test_ropes_that_cannot_be_trained_or_exported(rope, message):
    (problem,) = rope.problems()
    assert problem.startswith(message) and " Fix: " in problem


@pytest.mark.parametrize("name", ROPES)
def test_export_and_import_give_back_the_same_rope(name):
    config = model_config(ROPES[name])
    written = exported(config)
    older = {key: value for key, value in written.items() if key != "rope_parameters"}
    newer = {
        key: value for key, value in written.items() if key not in ("rope_scaling", "rope_theta")
    }
    for form in (written, older, newer):
        assert ModelConfig(**interpret_config(form).model).rope == config.rope
    assert Rope(**asdict(config.rope)) == config.rope


def test_folders_as_others_write_them():
    """Llama 3.1's and Qwen2.5's config.json (huggingface), DeepSeek's spelling, and what old ones
    leave out."""
    plain = {
        key: value
        for key, value in exported(model_config({})).items()
        if not key.startswith("rope")
    }

    def rope(**changes):
        return ModelConfig(**interpret_config(plain | changes).model).rope

    llama = dict(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    )
    assert (
        rope(rope_theta=500000.0, rope_scaling=llama)
        == ModelConfig(rotary_base=5e5, use_rope_scaling=True).rope
    )
    qwen = dict(factor=4.0, original_max_position_embeddings=32768, type="yarn")
    expected = yarn(base=1e6)
    assert rope(rope_theta=1000000, rope_scaling=qwen) == expected
    more = dict(finetuned=True, factor=4, mscale=1.0, beta_fast=32)
    assert rope(rope_theta=1e6, rope_scaling=qwen | more) == expected
    # Left out, the original context is the declared one; a null factor is the declared context over
    # the original.
    short = dict(max_position_embeddings=32768, rope_theta=1e6)
    assert rope(**short, rope_scaling=dict(factor=4.0, type="yarn")) == expected
    assert (
        rope(max_position_embeddings=131072, rope_theta=1e6, rope_scaling=qwen | dict(factor=None))
        == expected
    )
    assert rope(rope_scaling=dict(type="linear", factor=2)) == Rope(type="linear", factor=2.0)
    assert rope(rope_scaling=None) == rope() == Rope()
    # transformers reads rope_scaling where both forms stand.
    assert rope(
        rope_scaling=dict(type="linear", factor=2.0),
        rope_parameters=dict(rope_type="linear", factor=3.0),
    ) == Rope(type="linear", factor=2.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        *(
            (
                dict(rope_scaling=dict(type=kind, factor=2.0)),
                f"rope_type = {kind}: only default, linear, llama3, yarn are",
            )
            for kind in ("dynamic", "longrope", "su", "mrope", "proportional")
        ),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5: only 1.0 is built"),
        (
            dict(rope_parameters=dict(partial_rotary_factor=0.25)),
            "partial_rotary_factor = 0.25: only 1.0 is built",
        ),
        (
            dict(rope_scaling=dict(type="default", mrope_section=[1, 1])),
            "rope parameter mrope_section = .* is not built",
        ),
        (
            dict(rope_parameters=dict(full_attention=dict(rope_type="default"))),
            "rope parameter full_attention",
        ),
        (
            dict(rope_scaling=dict(type="linear", factor="8")),
            "rope parameter factor = 8: must be a number",
        ),
        (dict(rope_theta=None), "rope_theta = null: transformers computes no angle from it"),
        (
            dict(rope_scaling=dict(type="yarn", factor=2.0, original_max_position_embeddings=32.5)),
            "rope parameter original_max_position_embeddings = 32.5: must be a whole number",
        ),
        (
            dict(rope_scaling=dict(type="linear")),
            "transformers refuses it .*Missing required keys .*'factor'",
        ),
        (
            dict(rope_scaling=dict(type="linear", factor=0.5)),
            "rope_scaling_factor = 0.5: must be at least 1",
        ),
        (
            dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0)),
            "transformers refuses it .*Missing required keys .*'high_freq_factor'",
        ),
    ],
)
def test_ropes_that_are_not_imported(changes, message):
    plain = {
        key: value
        for key, value in exported(model_config({})).items()
        if not key.startswith("rope")
    }
    with pytest.raises(ValueError, match=message):
        interpret_config(plain | changes)


def test_declared_context():
    assert context_to_declare(model_config(YARN).rope, 8192) == 131072
    assert context_to_declare(model_config(LLAMA3).rope, 8192) == 8192
    assert model_config(LLAMA3).rope.describe() == (
        "base 10000, llama3 factor 8.0, original_max_position_embeddings 8192, low_freq_factor "
        "1.0, high_freq_factor 4.0"
    )


def test_flags_of_a_launch_script():
    config = load_config(
        "--model llama3-8b --use-rope-scaling --rope-scaling-factor 8.0".split()
    ).model
    assert config.rope == Rope.make(5e5, "llama3", {}) and config.rope_problems() == []
    config = load_config(
        "--model tiny --rope-type yarn --rope-scaling-factor 16 --yarn-mscale 1 "
        "--yarn-mscale-all-dim 0.5 --original-max-position-embeddings 4096 "
        "--no-yarn-correction-range-round-to-int".split()
    )
    assert config.model.rope == replace(
        Rope.make(1e4, "yarn", dict(factor=16.0, original_max_position_embeddings=4096)),
        mscale=1.0,
        mscale_all_dim=0.5,
        truncate=False,
    )


@pytest.mark.parametrize("name", ["default 5e5", "linear", "llama3", "yarn", "yarn mscales"])
@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_logits_are_those_of_transformers_up_to_a_million_positions(name, form):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model_config(ROPES[name])
    cpu = torch.device("cpu")
    tensors = {
        key: 1 + 0.1 * normal_rows(1, key, torch.Size((*shape, 1)), 0, shape[0])[:, 0]
        if len(shape) == 1
        else 0.2 * normal_rows(1, key, shape, 0, shape[0])
        for key, shape in parameter_shapes(config, 128).items()
    }
    written = exported(config)
    if name.startswith("default") or form == "rope_parameters":
        written.pop("rope_scaling", None)
    else:
        written.pop("rope_parameters")
    theirs = LlamaForCausalLM(LlamaConfig(**written)).eval()
    named = architecture_of(config).huggingface_name
    theirs.load_state_dict({named(key): tensor for key, tensor in tensors.items()})
    ours = build_whole_model(
        config, 128, tensors, choose_attention("sdpa", cpu, torch.float32)[0], cpu
    )
    ids = torch.randint(128, (192,), generator=torch.Generator().manual_seed(1))
    for start in (
        0,
        2**17,
        2**20 - 191,
    ):  # without gaps: transformers takes a gap for another document
        positions = torch.arange(start, start + 192)
        batch = Batch(
            tokens=ids,
            labels=torch.full_like(ids, IGNORE),
            positions=positions,
            cu_seqlens=torch.tensor([0, 192], dtype=torch.int32),
        )
        with torch.no_grad():
            expected = theirs(
                input_ids=ids[None], position_ids=positions[None], use_cache=False
            ).logits[0]
            found = ours.logits(ours.hidden(ids, batch))
            ours.rope = replace(config.rope, base=config.rope.base * 2)
            other = ours.logits(ours.hidden(ids, batch))
            ours.rope = config.rope
        largest = expected.abs().max()
        assert largest > 1 and (found - expected).abs().max() <= 1e-5 * largest
        assert (other - expected).abs().max() > 1e-3 * largest  # another rope is seen


def test_every_parameter_is_a_setting_of_the_run_and_of_a_phase():
    run, phase = (
        {field.name: field.type for field in fields(section)}
        for section in (ModelConfig, PhaseConfig)
    )
    settings = ("rotary_base", "use_rope_scaling", "rope_type", *PARAMETERS)
    assert {name: phase[name] for name in settings} == {name: run[name] for name in settings} | {
        "rotary_base": float | None
    }
    assert {"base", "type", *(name for name, _ in PARAMETERS.values())} == {
        field.name for field in fields(Rope)
    }
