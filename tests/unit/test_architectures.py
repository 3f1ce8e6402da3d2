"""The table of architectures: what each reads of config.json, and which one an export takes."""

import pytest

from model.config import ModelConfig
from model.hf.architectures import ARCHITECTURES
from model.hf.choice import architecture_of
from model.hf.config_json import huggingface_config
from tests.huggingface.model_folders import LINEAR, MODELS, SHAPE, YARN
from tools.huggingface.config import interpret_config


def content_of(kind: str, *, drop: tuple[str, ...] = (), **changes) -> dict:
    """The config.json that transformers writes for a model of tests/huggingface/model_folders.py,
    with other values and without some keys."""
    from transformers import AutoConfig

    written = AutoConfig.for_model(kind, **(SHAPE | MODELS[kind])).to_dict() | changes
    return {key: value for key, value in written.items() if key not in drop}


def model_of(content: dict) -> ModelConfig:
    """Our settings of a config.json."""
    return ModelConfig(**interpret_config(content).model)


def test_every_architecture_has_a_folder_for_tests():
    assert set(MODELS) == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", MODELS)
def test_an_export_means_the_same_as_what_was_imported(kind):
    before = model_of(content_of(kind))
    assert before.validate() == []
    row = architecture_of(before)
    assert row.model_type == kind
    written = huggingface_config(row, before, 67, before.rope, 96, "float32", None)
    after = interpret_config(written)
    assert ModelConfig(**after.model) == before and after.warnings == []


# ---------------------------------------------------------------- forms of config.json


def test_gemma_3_of_transformers_4_is_read():
    older = content_of(
        "gemma3_text",
        drop=("layer_types", "rope_parameters", "_sliding_window_pattern"),
        rope_theta=2e6,
        rope_local_base_freq=3e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=3,
        cache_implementation="hybrid",
    )
    config = model_of(older)
    assert config.windows == (7, 7, None)
    assert (
        config.rope.describe()
        == model_of(
            content_of("llama", rope_parameters=LINEAR | dict(rope_theta=2e6, factor=8.0))
        ).rope.describe()
    )
    assert config.window_rotary_base == 3e4
    # Beside layer_types the pattern means nothing.
    named = older | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    assert model_of(named).windows == (None, 7, None)


def test_olmo_3_of_transformers_4_scales_the_rope_of_layers_without_a_window_only():
    older = content_of(
        "olmo3",
        drop=("rope_parameters", "layer_types"),
        rope_theta=5e5,
        rope_scaling={key: value for key, value in YARN.items() if key != "rope_theta"},
    )
    config = model_of(older)
    assert config.windows == (7, 7, 7, None)
    assert config.rope.type == "yarn" and config.rope.base == 5e5
    assert config.window_rotary_base == 5e5


def test_two_ropes_that_are_one_need_no_setting():
    same = content_of("olmo3", rope_parameters=dict(full_attention=YARN, sliding_attention=YARN))
    assert model_of(same).window_rotary_base is None


def test_gemma_2_has_its_activation_and_scale_under_its_own_keys():
    config = model_of(content_of("gemma2", hidden_act="gelu", query_pre_attn_scalar=6))
    assert config.activation_func == "gelu_tanh"
    assert config.softmax_scale is None, "6 is the size of a head"
    assert model_of(content_of("gemma2", query_pre_attn_scalar=9)).softmax_scale == 9**-0.5
    assert config.embedding_multiplier == 4.0


def test_a_qwen2_folder_with_keys_without_effect_is_read():
    content = content_of("qwen2", attention_bias=False, hidden_act="swish")
    assert interpret_config(content).warnings == []


def test_a_llama_2_folder_is_read():
    content = content_of(
        "llama",
        drop=("rope_parameters", "head_dim", "num_key_value_heads", "attention_bias", "mlp_bias"),
        rope_scaling=None,
        pretraining_tp=1,
    )
    config = model_of(content)
    assert (
        config.num_kv_heads == 4
        and config.rope.describe()
        == model_of(
            content_of("mistral", rope_parameters=dict(rope_type="default", rope_theta=1e4))
        ).rope.describe()
    )


@pytest.mark.parametrize(
    "changes, windows, ropes",
    [
        (dict(), (None,) * 4, ("main", "none") * 2),
        (dict(no_rope_layer_interval=3), (None,) * 4, ("main", "main", "none", "main")),
        # A list wins over the interval; what it has beyond the layers is nobody's.
        (dict(no_rope_layers=[0, 5, 1, 1, 0]), (None,) * 4, ("none", "main", "main", "main")),
        # Without layer_types the layers without rope have the window.
        (dict(use_sliding_window=True), (None, 7) * 2, ("main", "none") * 2),
        (dict(use_sliding_window=True, sliding_window=None), (None,) * 4, ("main", "none") * 2),
    ],
    ids=str,
)
def test_smollm_3_has_layers_without_rope_by_list_or_interval(changes, windows, ropes):
    content = content_of(
        "smollm3",
        drop=("no_rope_layers", "layer_types"),
        no_rope_layer_interval=2,
        use_sliding_window=False,
    )
    config = model_of(content | changes)
    assert config.windows == windows
    assert config.layer_ropes == ropes


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("gemma3", dict(), "model_type = gemma3: not built here"),
        ("gemma2", dict(hidden_activation="gelu"), "hidden_activation = gelu: only silu, swish"),
        ("gemma2", dict(hidden_activation=None), "hidden_activation"),
        ("gemma2", dict(attn_logit_softcapping=0.0), "attn_logit_softcapping = 0.0: must be a fin"),
        ("gemma2", dict(attn_logit_softcapping="4"), "attn_logit_softcapping"),
        ("gemma2", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar = 0: must be a finite"),
        ("gemma2", dict(query_pre_attn_scalar=10**400), "query_pre_attn_scalar = 1"),
        ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention = True"),
        ("gemma2", dict(attention_bias=True), "attention_bias = True: only False"),
        ("gemma3_text", dict(rope_local_base_freq="1"), "rope_local_base_freq = 1: must be a num"),
        ("gemma3_text", dict(rope_parameters=LINEAR), "rope_parameters has rope_type: Gemma3ForC"),
        (
            "olmo3",
            dict(rope_parameters=dict(sliding_attention=YARN)),
            "rope of sliding_attention is base 10000, yarn",
        ),
        ("granite", dict(attention_multiplier=None), "expected"),
        ("granite", dict(logits_scaling=float("inf")), "logits_scaling = inf: must be a finite"),
        ("granite", dict(residual_multiplier="0.2"), "expected"),
        ("olmo2", dict(sliding_window=8), "sliding_window = 8: transformers' Olmo2ForCausalLM has"),
        (
            "mistral",
            dict(layer_types=["full_attention", "sliding_attention"]),
            "transformers' MistralForCausalLM has sliding_attention in all layers",
        ),
        (
            "mistral",
            dict(sliding_window=None, layer_types=["sliding_attention"] * 2),
            "transformers' MistralForCausalLM has full_attention in all layers",
        ),
        ("smollm3", dict(attention_bias=True), "attention_bias = True: only False"),
        ("smollm3", dict(mlp_bias=True), "mlp_bias = True: only False"),
        ("smollm3", dict(no_rope_layers=[1, 0]), "no_rope_layers = [1, 0]: must have an item for"),
        ("smollm3", dict(use_sliding_window=False), "use_sliding_window = False: but layer_types"),
        ("llama", dict(no_rope_layers=[1, 0]), "no_rope_layers = [1, 0]: only None"),
        ("llama", dict(embedding_multiplier=12.0), "embedding_multiplier = 12.0: only None"),
        ("llama", dict(final_logit_softcapping=30.0), "final_logit_softcapping = 30.0: only None"),
    ],
    ids=str,
)
def test_what_would_be_another_model_is_refused_by_name(kind, changes, message):
    content = content_of("gemma3_text" if kind == "gemma3" else kind, **changes)
    content["model_type"] = kind
    with pytest.raises(ValueError) as refusal:
        interpret_config(content)
    assert message in str(refusal.value)
    assert all("Fix: " in line for line in str(refusal.value).splitlines())


# ---------------------------------------------------------------- which one an export takes


def llama_with(**settings) -> ModelConfig:
    """A Llama with other settings."""
    shape = dict(num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4)
    return ModelConfig(**(shape | settings))


@pytest.mark.parametrize(
    "settings, imported_as, expected",
    [
        (dict(), None, "llama"),
        (dict(), "granite", "granite"),
        (dict(), "qwen2", "llama"),
        (dict(qk_layernorm_scope="all_heads"), None, "llama"),  # without effect: no norm
        (dict(softmax_scale=0.1), None, "granite"),
        (dict(activation_func="gelu_tanh"), None, "llama"),
        (dict(window_size=[7, 0]), None, "mistral"),
        (dict(window_size=[7, 0], window_attn_skip_freq=[2]), None, "smollm3"),
        (dict(no_rope_freq=[4]), None, "smollm3"),
        (dict(), "smollm3", "smollm3"),
        (dict(window_size=[7, 0], window_attn_skip_freq=[2], qk_layernorm=True), None, "qwen3"),
        (
            dict(qk_layernorm=True, qk_layernorm_scope="all_heads", norm_placement="post"),
            None,
            "olmo2",
        ),
    ],
    ids=str,
)
def test_an_export_takes_the_architecture_that_has_all_parts(settings, imported_as, expected):
    assert architecture_of(llama_with(**settings), imported_as).model_type == expected


def test_the_usual_scale_written_out_is_still_llama():
    head_size = llama_with().head_size
    assert architecture_of(llama_with(softmax_scale=head_size**-0.5)).model_type == "llama"


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(qk_layernorm=True, add_qkv_bias=True), "= True: Qwen"),
        (
            dict(window_size=[7, 0], residual_multiplier=0.5, logits_scaling=2.0),
            "window_size = [7, 0]: GraniteForCausalLM has no windows",
        ),
        (dict(softmax_type="learnable"), "softmax_type = learnable: Llama"),
        (dict(norm_placement="post"), "norm_placement = post: Llama"),
        (dict(no_rope_freq=[4], qk_layernorm=True), "no_rope_freq = [4]: Qwen3ForCausalLM has"),
        (
            dict(window_size=[7, 0], window_rotary_base=1e4),
            "window_rotary_base = 10000.0: MistralForCausalLM has one rotary embedding",
        ),
        (
            dict(apply_layernorm_1p=True, norm_placement="both", embedding_multiplier=5.6),
            "embedding_multiplier = 5.6: Gemma2ForCausalLM has embedding_multiplier = 5.65685415",
        ),
        (
            dict(
                apply_layernorm_1p=True,
                norm_placement="both",
                embedding_multiplier=5.656854152679443,
                softmax_scale=0.3,
            ),
            "softmax_scale = 0.3: query_pre_attn_scalar of Gemma2ForCausalLM cannot be it",
        ),
    ],
    ids=str,
)
def test_an_export_names_the_setting_that_no_architecture_has(settings, named):
    with pytest.raises(ValueError) as refusal:
        architecture_of(llama_with(**settings))
    assert named in str(refusal.value) and "Fix: " in str(refusal.value)
