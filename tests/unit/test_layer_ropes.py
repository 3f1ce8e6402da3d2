"""Which layers have which rotary embedding, and the norms that layers other than Llama's have."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from model.config import ModelConfig
from model.init import initialize
from model.layer_ropes import layer_ropes, no_rope_problems, shortest_no_rope
from model.norm_over_heads import _NormOverHeads
from model.parts import RMSNorm
from model.pointwise import rms_norm
from model.positions import RotaryTables
from parallel.layout import single_process_layout
from tools.bench.contenders import Ours, one_process, preset

CPU = torch.device("cpu")
NO_WINDOWS = (None,) * 6


# ---- ropes


@pytest.mark.parametrize("freq", [[1], [2], [3], [6], [0, 1, 1, 0, 0, 1]])
def test_the_layers_without_rope_are_those_of_megatron(freq):
    given = freq[0] if len(freq) == 1 else freq
    megatron = TransformerConfig(
        num_layers=6, hidden_size=8, num_attention_heads=2, no_rope_freq=given
    )
    found = layer_ropes(NO_WINDOWS, freq, windows_have_own=False)
    assert isinstance(megatron.no_rope_freq, list)
    assert [kind == "none" for kind in found] == [bool(skip) for skip in megatron.no_rope_freq]


def test_layers_with_a_window_have_their_own_rope_only_where_it_is_given():
    windows = (8, None, 8, None)
    assert layer_ropes(windows, [], windows_have_own=False) == ("main",) * 4
    own = layer_ropes(windows, [], windows_have_own=True)
    assert own == ("window", "main", "window", "main")
    # No rope goes before either.
    assert layer_ropes(windows, [3], windows_have_own=True) == ("window", "main", "none", "main")


def test_a_phase_changes_the_rope_of_the_layers_without_a_window_only():
    config = ModelConfig(num_layers=2, window_size=[7, 0], window_rotary_base=100.0)
    config.rotary_base = 5e6
    config.rope_type = "linear"
    config.rope_scaling_factor = 8.0
    assert config.window_rope is not None
    assert config.window_rope.describe() == "base 100"


@pytest.mark.parametrize(
    "freq, said",
    [
        ([0], "no_rope_freq = 0: every so many layers one has no rope"),
        ([4], "no_rope_freq = 4: every so many layers one has no rope"),
        ([1, 0], "no_rope_freq = [1, 0]: must be one number, or for each of the 3 layers"),
        ([1, 0, 2], "no_rope_freq = [1, 0, 2]: must be one number"),
    ],
)
def test_layers_that_cannot_be_are_refused(freq, said):
    config = ModelConfig(
        num_layers=3,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=2,
        no_rope_freq=freq,
    )
    assert config.validate() == no_rope_problems(freq, 3)
    (problem,) = config.validate()
    assert problem.startswith(said) and "Fix: " in problem


@pytest.mark.parametrize(
    "pattern, freq",
    [([0, 0, 0, 0], []), ([0, 1, 0, 1], [2]), ([1, 1, 1, 1], [1]), ([1, 0, 0, 1], [1, 0, 0, 1])],
)
def test_a_pattern_is_spelled_shortly_and_means_the_same(pattern, freq):
    assert shortest_no_rope(pattern) == freq
    found = layer_ropes((None,) * 4, freq, windows_have_own=False)
    assert [int(kind == "none") for kind in found] == pattern


def test_tables_without_turning_take_no_memory():
    tables = RotaryTables.without_turning(torch.arange(1000), 64, torch.bfloat16)
    for table, value in zip(tables, (1.0, 0.0), strict=True):
        assert table.shape == (1000, 64) and (table == value).all()
        assert table.untyped_storage().nbytes() == 2


# ---- norms


def norm(size: int, **settings) -> RMSNorm:
    made = RMSNorm(size, ModelConfig(**settings))
    made.weight = torch.nn.Parameter(2.0**-10 * torch.arange(size).to(torch.bfloat16))
    return made


def test_one_plus_weight_keeps_the_digits_that_bf16_would_lose():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    module = norm(8, apply_layernorm_1p=True)
    # Of 1 + 2 ** -10, bf16 keeps the 1.
    weight = 1.0 + module.weight.detach().double()
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    assert torch.equal(module(x), expected.bfloat16())
    assert torch.equal(norm(8).local_weight(), module.weight)


def test_initial_norms_multiply_by_one():
    for one_plus, value in ((True, 0.0), (False, 1.0)):
        config = preset(
            "tiny",
            num_layers=1,
            qk_layernorm=True,
            norm_placement="both",
            apply_layernorm_1p=one_plus,
        )
        with one_process() as layout:
            (stage,) = stages = Ours(config, 64, "float32", layout, 0).stages
            initialize(stages, config, layout, 0)
            norms = [x.to_local() for n, x in stage.named_parameters() if n.endswith("norm.weight")]
        assert len(norms) == 7 and all((weight == value).all() for weight in norms), one_plus


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_norm_over_heads_of_one_rank_is_the_usual_norm(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 24, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(24, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    grad = torch.randn(7, 24, generator=generator, dtype=torch.float64).to(dtype)
    tp = single_process_layout(CPU).tp
    found = _NormOverHeads.apply(x, weight, 1e-6, tp)
    expected = rms_norm(x, weight, 1e-6)
    tolerance = 1e-12 if dtype == torch.float64 else 2**-7
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for ours, usual in zip(
        torch.autograd.grad(found, (x, weight), grad),
        torch.autograd.grad(expected, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, usual, rtol=tolerance, atol=tolerance)
