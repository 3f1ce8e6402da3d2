"""The architectures of transformers that are imported and exported, a row each.

Names and meanings as in transformers' modeling_*.py and configuration_*.py.
"""

import math
from typing import Any

import numpy as np

from model.config import ModelConfig
from model.hf.architecture import Architecture, Setting
from model.layer_ropes import shortest_no_rope

# ---------------------------------------------------------------- parameters of a layer

_PROJECTIONS = {
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.o.weight": "self_attn.o_proj.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_NORMS_BEFORE = {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
}
_QKV_BIASES = {
    "attention.q.bias": "self_attn.q_proj.bias",
    "attention.k.bias": "self_attn.k_proj.bias",
    "attention.v.bias": "self_attn.v_proj.bias",
}
_QK_NORMS = {
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
}
_LLAMA_LAYER = _PROJECTIONS | _NORMS_BEFORE

# ---------------------------------------------------------------- settings in config.json


def head_size_of(parsed: Any) -> Any:
    """Return the size of a head as the modeling files take it: an attribute counts, even a null."""
    return getattr(parsed, "head_dim", parsed.hidden_size // parsed.num_attention_heads)


def _init_std(parsed: Any) -> float:
    """Return the deviation of initial weights; ours where the file has none that could be."""
    given = parsed.initializer_range
    return given if math.isfinite(given) and given > 0 else ModelConfig.init_method_std


_COMMON = (
    Setting(ours="num_layers", theirs="num_hidden_layers"),
    Setting(ours="hidden_size", theirs="hidden_size"),
    Setting(ours="ffn_hidden_size", theirs="intermediate_size"),
    Setting(ours="num_attention_heads", theirs="num_attention_heads"),
    Setting(
        ours="num_query_groups",
        theirs="num_key_value_heads",
        write=lambda config: config.num_kv_heads,
    ),
    Setting(
        ours="kv_channels",
        theirs="head_dim",
        read=head_size_of,
        write=lambda config: config.head_size,
    ),
    Setting(ours="norm_epsilon", theirs="rms_norm_eps", is_above_zero=True),
    Setting(
        ours="untie_embeddings_and_output_weights",
        theirs="tie_word_embeddings",
        read=lambda parsed: not parsed.tie_word_embeddings,
        write=lambda config: not config.untie_embeddings_and_output_weights,
    ),
    Setting(ours="init_method_std", theirs="initializer_range", read=_init_std),
)
"""Settings that every architecture here has."""


# ---------------------------------------------------------------- settings of some


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names of activations -> activation_func. Of two names for one the first is
written."""


def _activation(key: str) -> Setting:
    """Pair the activation of the MLP's gate with its key."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return Setting(
        ours="activation_func",
        theirs=key,
        read=lambda parsed: ACTIVATIONS[getattr(parsed, key)],
        write=lambda config: names[config.activation_func],
        values=tuple(ACTIVATIONS),
    )


def _number(name: str) -> Setting:
    """Pair a setting with the key of the same name, a number above 0 or null."""
    return Setting(
        ours=name, theirs=name, read=lambda parsed: _float(parsed, name), is_above_zero=True
    )


def _float(parsed: Any, key: str) -> float | None:
    """Return a number that may be written as a whole one, or null."""
    value = getattr(parsed, key)
    return None if value is None else float(value)


def _scale(parsed: Any, scale: float) -> float | None:
    """Return a factor on scores as our setting: the usual one is None."""
    return None if scale == head_size_of(parsed) ** -0.5 else scale


def _query_scalar(config: ModelConfig) -> int:
    """Return the whole number whose root the scores are divided by, as nearly as there is one."""
    return round(config.softmax_scale**-2) if config.softmax_scale else config.head_size


def _has_query_scalar(config: ModelConfig) -> bool:
    """Tell whether the scores are divided by the root of a whole number."""
    scalar = _query_scalar(config)
    scale = config.softmax_scale
    return scale is None or (scalar > 0 and math.isclose(scalar**-0.5, scale, rel_tol=1e-12))


def _root_in_fp32(hidden_size: int) -> float:
    """Return the root of the width as transformers keeps it: in fp32."""
    return float(np.float32(math.sqrt(hidden_size)))


def _layers_without_rope(parsed: Any) -> list[int]:
    """Return which layers have no rope; of theirs 0 is such a layer, and of ours 1."""
    has_rope = parsed.no_rope_layers[: parsed.num_hidden_layers]
    return shortest_no_rope([int(not each) for each in has_rope])


_USUAL = (*_COMMON, _activation("hidden_act"))

_GEMMA_FIXED = {
    "norm_placement": "both",
    "apply_layernorm_1p": True,
    "embedding_multiplier": _root_in_fp32,
}
_GEMMA_LAYER = _PROJECTIONS | {
    "attention_norm.weight": "input_layernorm.weight",
    "attention_post_norm.weight": "post_attention_layernorm.weight",
    "mlp_norm.weight": "pre_feedforward_layernorm.weight",
    "mlp_post_norm.weight": "post_feedforward_layernorm.weight",
}
_GEMMA_SETTINGS = (
    *_COMMON,
    _activation("hidden_activation"),
    Setting(
        ours="softmax_scale",
        theirs="query_pre_attn_scalar",
        read=lambda parsed: _scale(parsed, parsed.query_pre_attn_scalar**-0.5),
        write=_query_scalar,
        can_write=_has_query_scalar,
        is_above_zero=True,
    ),
    _number("final_logit_softcapping"),
)
_GEMMA_ONLY = {"attention_bias": (False,), "use_bidirectional_attention": (False, None)}

_OLMO_FIXED = {
    "norm_placement": "post",
    "qk_layernorm": True,
    "qk_layernorm_scope": "all_heads",
}
_OLMO_LAYER = (
    _PROJECTIONS
    | _QK_NORMS
    | {
        "attention_post_norm.weight": "post_attention_layernorm.weight",
        "mlp_post_norm.weight": "post_feedforward_layernorm.weight",
    }
)

# ---------------------------------------------------------------- the rows

_ROWS = (
    Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        layer_names=_LLAMA_LAYER,
        fixed={},
        settings=_USUAL,
        only={"attention_bias": (False,), "mlp_bias": (False,)},
    ),
    Architecture(
        model_type="mistral",
        class_name="MistralForCausalLM",
        layer_names=_LLAMA_LAYER,
        fixed={},
        settings=_USUAL,
        windows="same",
    ),
    Architecture(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        layer_names=_LLAMA_LAYER | _QKV_BIASES,
        fixed={"add_qkv_bias": True},
        settings=_USUAL,
        windows="switched",
        # Its biases are always there; no key turns them off.
        harmless=frozenset({"attention_bias", "qkv_bias"}),
    ),
    Architecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        layer_names=_LLAMA_LAYER | _QK_NORMS,
        fixed={"qk_layernorm": True},
        settings=_USUAL,
        windows="switched",
        only={"attention_bias": (False,)},
    ),
    Architecture(
        model_type="olmo2",
        class_name="Olmo2ForCausalLM",
        layer_names=_OLMO_LAYER,
        fixed=_OLMO_FIXED,
        settings=_USUAL,
        only={"attention_bias": (False,)},
    ),
    Architecture(
        model_type="olmo3",
        class_name="Olmo3ForCausalLM",
        layer_names=_OLMO_LAYER,
        fixed=_OLMO_FIXED,
        settings=_USUAL,
        windows="by_layer",
        has_two_ropes=True,
        only={"attention_bias": (False,)},
    ),
    Architecture(
        model_type="gemma2",
        class_name="Gemma2ForCausalLM",
        layer_names=_GEMMA_LAYER,
        fixed=_GEMMA_FIXED,
        settings=(*_GEMMA_SETTINGS, _number("attn_logit_softcapping")),
        windows="by_layer",
        only=_GEMMA_ONLY,
        # Its activation has another key.
        harmless=frozenset({"hidden_act"}),
    ),
    Architecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        layer_names=_GEMMA_LAYER | _QK_NORMS,
        fixed=_GEMMA_FIXED | {"qk_layernorm": True},
        settings=_GEMMA_SETTINGS,
        windows="by_layer",
        has_two_ropes=True,
        only=_GEMMA_ONLY,
        # Its attention reads no soft cap.
        harmless=frozenset({"hidden_act", "attn_logit_softcapping"}),
        older=frozenset(
            {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"}
        ),
    ),
    Architecture(
        model_type="granite",
        class_name="GraniteForCausalLM",
        layer_names=_LLAMA_LAYER,
        fixed={},
        settings=(
            *_USUAL,
            Setting(
                ours="softmax_scale",
                theirs="attention_multiplier",
                read=lambda parsed: _scale(parsed, float(parsed.attention_multiplier)),
                write=lambda config: config.softmax_scale or config.head_size**-0.5,
                is_above_zero=True,
            ),
            _number("embedding_multiplier"),
            _number("residual_multiplier"),
            _number("logits_scaling"),
        ),
        only={"attention_bias": (False,), "mlp_bias": (False,)},
    ),
    Architecture(
        model_type="smollm3",
        class_name="SmolLM3ForCausalLM",
        layer_names=_LLAMA_LAYER,
        fixed={},
        settings=(
            *_USUAL,
            Setting(
                ours="no_rope_freq",
                theirs="no_rope_layers",
                read=_layers_without_rope,
                write=lambda config: [int(rope != "none") for rope in config.layer_ropes],
                is_by_layer=True,
            ),
        ),
        windows="switched",
        only={"attention_bias": (False,), "mlp_bias": (False,)},
        older=frozenset({"no_rope_layer_interval"}),
    ),
)
ARCHITECTURES = {row.model_type: row for row in _ROWS}
"""model_type -> architecture. Of several that have a model's parts an export takes the one that the
model came from, else the first."""
