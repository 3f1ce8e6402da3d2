"""Parts of layers that Llama does not have: logits and gradients are those of transformers."""

import re
from functools import cache

import pytest
import torch

from model.activation_memory.settings import MemorySettings
from model.attention_backends.choice import choose_attention
from model.build import parameter_shapes
from model.config import ModelConfig
from model.gpt import GPTStage
from parallel.layout import single_process_layout

CPU = torch.device("cpu")
VOCABULARY = 61
TOKENS = 24
# The same names in both: rows of q, k, v.
SIZES = dict(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=12,
    make_vocab_size_divisible_by=1,
    norm_epsilon=1e-6,
)
THEIR_SIZES = dict(
    vocab_size=VOCABULARY,
    num_hidden_layers=4,
    hidden_size=48,
    intermediate_size=40,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    rms_norm_eps=1e-6,
    max_position_embeddings=128,
    pad_token_id=None,
    attention_dropout=0.0,
)
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
WINDOWS = dict(window_size=[4, 0], window_attn_skip_freq=[2])
GEMMA = dict(
    norm_placement="both",
    apply_layernorm_1p=True,
    activation_func="gelu_tanh",
    # The root in fp32, as transformers has it.
    embedding_multiplier=float(torch.tensor(48**0.5)),
    **WINDOWS,
)
OLMO = dict(norm_placement="post", qk_layernorm=True, qk_layernorm_scope="all_heads")
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8)
OURS = {
    "gemma2": GEMMA
    | dict(
        rotary_base=1000.0,
        # Low, so that they bend the scores and logits of this model.
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        softmax_scale=20**-0.5,
    ),
    "gemma3_text": GEMMA
    | dict(
        qk_layernorm=True,
        rotary_base=5000.0,
        window_rotary_base=100.0,
        rope_type="linear",
        rope_scaling_factor=8.0,
    ),
    "olmo2": OLMO | dict(rotary_base=5000.0, untie_embeddings_and_output_weights=True),
    "olmo3": OLMO
    | WINDOWS
    | dict(
        rotary_base=5000.0,
        window_rotary_base=5000.0,
        rope_type="yarn",
        rope_scaling_factor=4.0,
        original_max_position_embeddings=8,
        untie_embeddings_and_output_weights=True,
    ),
    "granite": dict(
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_scaling=6.0,
        rotary_base=1000.0,
        softmax_scale=0.4,
    ),
    "smollm3": dict(no_rope_freq=[3], rotary_base=1000.0),
}
THEIRS = {
    "gemma2": dict(
        layer_types=KINDS,
        sliding_window=5,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        rope_parameters=dict(rope_type="default", rope_theta=1000.0),
    ),
    "gemma3_text": dict(
        layer_types=KINDS,
        sliding_window=5,
        query_pre_attn_scalar=12,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=5000.0),
            sliding_attention=dict(rope_type="default", rope_theta=100.0),
        ),
    ),
    "olmo2": dict(
        tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=5000.0),
    ),
    "olmo3": dict(
        tie_word_embeddings=False,
        layer_types=KINDS,
        sliding_window=5,
        rope_parameters=dict(
            full_attention=YARN | dict(rope_theta=5000.0),
            sliding_attention=dict(rope_type="default", rope_theta=5000.0),
        ),
    ),
    "granite": dict(
        tie_word_embeddings=True,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_scaling=6.0,
        attention_multiplier=0.4,
        rope_parameters=dict(rope_type="default", rope_theta=1000.0),
    ),
    "smollm3": dict(
        tie_word_embeddings=True,
        no_rope_layers=[1, 1, 0, 1],
        use_sliding_window=False,
        sliding_window=None,
        layer_types=["full_attention"] * 4,
        rope_parameters=dict(rope_type="default", rope_theta=1000.0),
    ),
}
PRE = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
POST = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
BOTH = POST | {"attention_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
NORM_NAMES = {"pre": PRE, "post": POST, "both": BOTH}


def their_name(name: str, placement: str) -> str:
    """Spell a parameter's name as transformers does."""
    for ours, theirs in NORM_NAMES[placement].items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    name = re.sub(r"attention\.([qkvo])\.", r"self_attn.\1_proj.", name)
    name = name.replace(".attention.", ".self_attn.")
    name = re.sub(r"mlp\.(gate|up|down)\.", r"mlp.\1_proj.", name)
    name = name.replace("final_norm", "norm").replace("embedding", "embed_tokens")
    return name.replace("output", "lm_head") if name == "output.weight" else f"model.{name}"


def draw_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Draw weights large enough that no part is nearly the identity."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        + (0.0 if config.apply_layernorm_1p or not name.endswith("norm.weight") else 1.0)
        for name, shape in parameter_shapes(config, VOCABULARY).items()
    }


def norm_in_fp64(self, x):
    """transformers' RMSNorm casts to fp32; here it stays in fp64."""
    epsilon = self.eps if hasattr(self, "eps") else self.variance_epsilon
    weight = 1.0 + self.weight if "Gemma" in type(self).__name__ else self.weight
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))


def attention_in_fp64(module, q, k, v, mask, scaling=None, softcap=None, **_):
    """transformers' eager attention without its softmax in fp32."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return ((scores + mask).softmax(-1) @ v).transpose(1, 2).contiguous(), None


@cache
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (TOKENS + 1,), generator=generator)
    return tokens[:-1], tokens[1:]


@cache
def theirs(kind: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits, gradients by our names) of transformers' model."""
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        AutoConfig,
        AutoModelForCausalLM,
    )
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("fp64", attention_in_fp64)
    AttentionMaskInterface.register("fp64", eager_mask)
    config = AutoConfig.for_model(kind, **THEIR_SIZES, **THEIRS[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="fp64").double()
    ours = ModelConfig(**SIZES, **OURS[kind])
    weights = draw_weights(ours)
    names = {name: their_name(name, ours.norm_placement) for name in weights}
    state = {names[name]: weight for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm_in_fp64.__get__(module)
    tokens, labels = batch()
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    torch.nn.functional.cross_entropy(logits, labels).backward()
    gradients = {name: model.get_parameter(theirs).grad for name, theirs in names.items()}
    return logits.detach(), gradients


class Batch:
    """One document."""

    tokens, labels = batch()
    positions = torch.arange(TOKENS)
    cu_seqlens = torch.tensor([0, TOKENS], dtype=torch.int32)
    source_runs = ()


def make_stage(config: ModelConfig) -> GPTStage:
    attend, _ = choose_attention("sdpa", CPU, torch.float64, needs=config.scoring_needs)
    stage = GPTStage(config, VOCABULARY, single_process_layout(CPU), attend)
    stage.load_state_dict(draw_weights(config), assign=True)
    return stage.requires_grad_()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert float(expected.abs().max()) > 0, "comparing with zeros proves nothing"
    return float((found - expected).abs().max() / expected.abs().max())


def gradients_of(stage: GPTStage, settings: MemorySettings) -> dict[str, torch.Tensor]:
    stage.memory = settings
    stage.zero_grad(set_to_none=True)
    stage.begin_step([Batch()], TOKENS)
    stage(torch.empty(0, dtype=torch.float64)).backward()
    return {name: parameter.grad for name, parameter in stage.named_parameters()}


LEVELS = {
    "none": MemorySettings(),
    "selective": MemorySettings("selective"),
    "full, tiles": MemorySettings("full", mlp_tiles=3, loss_chunk_tokens=7),
    "attention kept": MemorySettings("attention_kept"),
}


@pytest.mark.parametrize("kind", OURS)
def test_logits_and_gradients_are_those_of_transformers(kind):
    config = ModelConfig(**SIZES, **OURS[kind])
    assert config.validate() == [] and config.rope_problems() == []
    expected_logits, expected = theirs(kind)
    stage = make_stage(config)
    with torch.no_grad():
        logits = stage.logits(stage.hidden(torch.empty(0, dtype=torch.float64), Batch()))
    assert error(logits, expected_logits) < 1e-10
    for level, settings in LEVELS.items():
        found = gradients_of(stage, settings)
        assert set(found) == set(expected)
        for name, gradient in found.items():
            assert error(gradient, expected[name]) < 1e-10, f"{level}: {name}"


@pytest.mark.parametrize("kind", ["granite", "smollm3", "gemma2"])
def test_head_chunks_change_nothing(kind):
    stage = make_stage(ModelConfig(**SIZES, **OURS[kind]))
    found = gradients_of(stage, MemorySettings("full", attention_head_chunks=2))
    for name, gradient in found.items():
        assert error(gradient, theirs(kind)[1][name]) < 1e-10, name
