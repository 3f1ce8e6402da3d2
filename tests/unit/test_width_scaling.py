"""muP: what each role's parameters get in a model four times as wide as its base."""

import math
import re
from dataclasses import replace

import pytest
import torch

from model.build import parameter_shapes
from model.config import ModelConfig
from model.hf.choice import architecture_of, export_form
from model.init import initialize
from model.sharding import row_of, scaling_of
from pretrain.config.facts import problems_of
from pretrain.config.optimizer_config import OptimizerConfig
from pretrain.optimizer import build_optimizer
from pretrain.parameter_groups import parameter_groups
from pretrain.step import train_step
from tools.bench.contenders import BenchModel, Ours, make_sample, one_process

VOCABULARY = 64
SIZES = dict(num_layers=2, hidden_size=128, ffn_hidden_size=352, num_attention_heads=8)
PLAIN = BenchModel(**SIZES, untie_embeddings_and_output_weights=True, add_qkv_bias=True)
WIDE = replace(PLAIN, use_mup=True, mup_base_hidden_size=32, mup_base_head_dim=16.0)
"""Four times as wide as its base, with as many more heads of the same size."""
UNEVEN = replace(WIDE, mup_base_ffn_hidden_size=44, mup_base_num_attention_heads=4)
"""Its MLP is eight times, its heads together are twice as wide as its base's."""


def factors(config: ModelConfig) -> dict[str, tuple[float, ...]]:
    """(init, learning rate, weight decay, epsilon) of the parameters of the first layer and the
    ends."""
    names = [name for name in parameter_shapes(config, VOCABULARY) if "layers.1" not in name]
    return {name: tuple(scaling_of(row_of(name, config), config)) for name in names}


def test_the_table_is_what_is_computed_by_hand():
    ends = (1.0, 1.0, 1.0, 0.25)  # every gradient is a quarter, since the logits are
    hidden = (0.5, 0.25, 4.0, 0.25)
    for name, found in factors(WIDE).items():
        is_hidden = name.endswith(".weight") and name.startswith("layers.") and "norm" not in name
        assert found == (hidden if is_hidden else ends), name


def test_each_matrix_is_scaled_by_what_it_sums_itself():
    found = factors(UNEVEN)
    assert found["layers.0.attention.q.weight"] == (0.5, 0.25, 4.0, 0.25)
    assert found["layers.0.attention.o.weight"] == (2**-0.5, 0.5, 2.0, 0.25)
    assert found["layers.0.mlp.up.weight"] == (0.5, 0.25, 4.0, 0.25)
    assert found["layers.0.mlp.down.weight"] == (8**-0.5, 0.125, 8.0, 0.25)


@pytest.mark.parametrize(
    "config", [PLAIN, replace(PLAIN, mup_base_hidden_size=32, mup_base_ffn_hidden_size=44)]
)
def test_without_mup_nothing_is_scaled(config):
    assert set(factors(config).values()) == {(1.0, 1.0, 1.0, 1.0)}
    assert config.logits_divisor == 1.0 and config.score_scale is None


def test_scores_are_divided_by_the_head_size_and_logits_by_the_ratio():
    assert replace(WIDE, logits_scaling=3.0).logits_divisor == 12.0
    assert WIDE.score_scale is None, "16 is the head size of all widths"
    assert replace(WIDE, mup_base_head_dim=None).score_scale == 1 / 16
    assert replace(WIDE, mup_base_head_dim=4.0).score_scale == 2 / 16
    half = replace(WIDE, mup_base_head_dim=None, mup_attn_scale_power=0.25)
    assert half.score_scale == 1 / 2
    assert replace(WIDE, softmax_scale=0.3).score_scale == 0.3
    assert {scoring.scale for scoring in half.scorings} == {1 / 2}


def measured(config: BenchModel, lr: float = 0.01, steps: int = 1) -> tuple[dict, dict, list]:
    """Train -> weights before and after, whole, and the losses; without clipping."""
    settings = OptimizerConfig(lr=lr, weight_decay=0.5)
    with one_process() as layout:
        ours = Ours(config, VOCABULARY, "float32", layout, 0, optimizer=False)
        initialize(ours.stages, config, layout, 1)
        optimizer = build_optimizer(ours.stages, config, settings)
        weights = dict(ours.stages[0].named_parameters())
        before = {name: p.full_tensor().detach().clone() for name, p in weights.items()}
        batch = [make_sample([40, 24], VOCABULARY, 1)]
        losses = [train_step(ours.stepper, optimizer, batch, lr, 0.0).loss for _ in range(steps)]
        after = {name: p.full_tensor().detach().clone() for name, p in weights.items()}
    return before, after, losses


def test_initial_weights_and_a_step_of_each_role():
    """Adam's first step moves a weight by its learning rate, and decay by rate x decay of it."""
    before, after, _ = measured(UNEVEN)
    base, base_after, _ = measured(PLAIN)
    for name, weight in before.items():
        init, rate, *_ = scaling_of(row_of(name, UNEVEN), UNEVEN)
        if weight.dim() == 2:
            depth = 2 if name.endswith((".o.weight", ".down.weight")) else 1
            assert float(weight.std()) == pytest.approx(0.02 * init / depth, rel=0.05), name
            torch.testing.assert_close(weight, base[name] * init, msg=name)
        # As much decay as without muP: 0.01 x 0.5, whatever the learning rate.
        decay = 0.005 if weight.dim() == 2 else 0.0
        moved = after[name] - weight * (1 - decay)
        assert float(moved.abs().max()) == pytest.approx(0.01 * rate, rel=0.02), name
        plain = base_after[name] - base[name] * (1 - decay)
        assert float(plain.abs().max()) == pytest.approx(0.01, rel=0.02), name


def test_at_the_base_width_nothing_changes():
    """The same weights and losses, bit for bit, where a head is of the base's size, too."""
    at_base = replace(PLAIN, use_mup=True, mup_base_head_dim=16.0)
    for config in (at_base, replace(at_base, mup_base_hidden_size=128)):
        before, after, losses = measured(config, steps=3)
        base, base_after, base_losses = measured(PLAIN, steps=3)
        assert losses == base_losses
        assert all(torch.equal(before[name], base[name]) for name in base)
        assert all(torch.equal(after[name], base_after[name]) for name in base)


def test_one_group_for_each_treatment():
    optimizer = OptimizerConfig(weight_decay=0.1, adam_eps=1e-8)

    def treatments(config: ModelConfig) -> list[tuple[float, ...]]:
        groups = parameter_groups([], config, optimizer)
        return [(group["weight_decay"], group["eps"], group["lr_scale"]) for group in groups]

    assert treatments(PLAIN) == [(0.1, 1e-8, 1.0), (0.0, 1e-8, 1.0)]
    assert treatments(WIDE) == [(0.1, 2.5e-9, 1.0), (0.4, 2.5e-9, 0.25), (0.0, 2.5e-9, 1.0)]
    assert len(treatments(UNEVEN)) == 5


def test_an_export_writes_the_factors_out():
    """Granite has the divisor and the scale; without a norm of the heads nothing else is needed."""
    llama = replace(WIDE, add_qkv_bias=False)
    plain = llama.without_mup()
    assert (plain.use_mup, plain.logits_scaling, plain.softmax_scale) == (False, 4.0, None)
    assert plain.without_mup() == plain
    assert architecture_of(llama).model_type == "granite"
    at_base = replace(llama, mup_base_hidden_size=None)
    assert architecture_of(at_base).model_type == "llama"
    assert architecture_of(replace(at_base, mup_base_head_dim=None)).model_type == "granite"
    with pytest.raises(ValueError, match="makes logits_scaling = 4.0, and Qwen3ForCausalLM has"):
        architecture_of(replace(llama, qk_layernorm=True))


GEMMA = dict(
    norm_placement="both",
    apply_layernorm_1p=True,
    embedding_multiplier=11.313708305358887,
    add_qkv_bias=False,
)


@pytest.mark.parametrize(
    "settings, model_type, factors",
    [
        (dict(qk_layernorm=True), "qwen3", {"final_norm.weight": 0.25}),
        (dict(), "qwen2", {"final_norm.weight": 0.25}),
        # Granite has both as settings.
        (dict(add_qkv_bias=False, mup_base_head_dim=4.0), "granite", {}),
        (
            dict(mup_base_head_dim=4.0, mup_base_hidden_size=None),
            "qwen2",
            {"attention.q.weight": 0.5, "attention.q.bias": 0.5},
        ),
        # Roots that are no floats: sqrt(32) / 128 over 1 / sqrt(128) is a half all the same.
        (
            dict(qk_layernorm=True, kv_channels=128, mup_base_head_dim=32.0),
            "qwen3",
            {"final_norm.weight": 0.25, "attention.q_norm.weight": 0.5},
        ),
        (dict(qk_layernorm=True, mup_base_hidden_size=128), "qwen3", {}),
    ],
)
def test_factors_without_a_setting_go_into_weights(settings, model_type, factors):
    bias = not settings.get("qk_layernorm", False)
    form = export_form(replace(WIDE, **(dict(add_qkv_bias=bias) | settings)))
    assert (form.architecture.model_type, form.factors) == (model_type, factors)
    assert not form.config.use_mup
    if factors:
        assert (form.config.logits_scaling, form.config.softmax_scale) == (1.0, None)


@pytest.mark.parametrize(
    "settings, refusal",
    [
        (
            GEMMA,
            "use_mup = True, mup_base_hidden_size = 32: makes logits_scaling = 4.0, and "
            "Gemma2ForCausalLM has logits_scaling = 1.0, and no other architecture of transformers "
            "that we know has the model's other parts. Fix: --mup-base-hidden-size 128, or train "
            "without --use-mup.",
        ),
        (
            dict(logits_scaling=3.0),
            "use_mup = True, mup_base_hidden_size = 32, logits_scaling = 3.0: makes logits_scaling "
            "= 12.0, and Qwen2ForCausalLM has logits_scaling = 1.0, and no other architecture of "
            "transformers that we know has the model's other parts. Fix: --logits-scaling 1; and "
            "--mup-base-hidden-size 128, or train without --use-mup.",
        ),
        (
            dict(mup_base_hidden_size=None, mup_base_head_dim=3.0),
            "use_mup = True, mup_base_head_dim = 3.0, mup_attn_scale_power = 1.0: makes "
            "softmax_scale = 0.10825317547305482, and Qwen2ForCausalLM has softmax_scale = None, "
            "and no other architecture of transformers that we know has the model's other parts. "
            "Fix: --mup-base-head-dim 16, or train without --use-mup.",
        ),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused_by_the_flags_of_mup(settings, refusal):
    config = replace(WIDE, **settings)
    with pytest.raises(ValueError) as raised:
        export_form(config)
    assert str(raised.value) == refusal
    # The fix is one.
    flags = dict(mup_base_hidden_size=None, mup_base_head_dim=16.0, logits_scaling=1.0)
    assert export_form(replace(config, **flags)).factors == {}


def test_the_base_head_size_of_a_refusal_is_exact_enough_to_be_taken():
    """16^0.7 is no short number: rounded to six digits it would be refused again."""
    config = replace(WIDE, mup_base_head_dim=3.0, mup_attn_scale_power=0.85)
    with pytest.raises(ValueError) as raised:
        export_form(config)
    (given,) = re.findall(r"Fix: --mup-base-head-dim (\S+),", str(raised.value))
    form = export_form(replace(config, mup_base_head_dim=float(given)))
    assert form.factors == {"final_norm.weight": 0.25} and form.config.softmax_scale is None


@pytest.mark.parametrize(
    "settings, problem",
    [
        (
            dict(mup_base_hidden_size=48),
            "mup_base_hidden_size = 48: must divide hidden_size = 128. "
            "Fix: one of [16, 32, 64], or another hidden_size.",
        ),
        (
            dict(mup_base_hidden_size=256),
            "mup_base_hidden_size = 256: must divide hidden_size = 128. "
            "Fix: one of [32, 64, 128], or another hidden_size.",
        ),
        (
            dict(mup_base_hidden_size=0),
            "mup_base_hidden_size = 0: must be at least 1. Fix: give that of the base model, or "
            "leave it out.",
        ),
        (
            dict(mup_base_head_dim=math.nan),
            "mup_base_head_dim = nan: must be a finite number. Fix: give one.",
        ),
    ],
)
def test_a_base_that_cannot_be_is_one_error(settings, problem):
    found = problems_of(replace(PLAIN, use_mup=True, **settings))
    assert found == [problem]
