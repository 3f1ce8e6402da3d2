"""The architectures of transformers that are imported and exported, a row each.

Names and meanings as in transformers' modeling_*.py and configuration_*.py.
"""

import math
from typing import Any

from model.config import ModelConfig
from model.hf.architecture import Architecture, Setting

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


# ---------------------------------------------------------------- the rows

_ROWS = (
    Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        layer_names=_LLAMA_LAYER,
        fixed={},
        settings=_COMMON,
        only={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)},
    ),
    Architecture(
        model_type="mistral",
        class_name="MistralForCausalLM",
        layer_names=_LLAMA_LAYER,
        fixed={},
        settings=_COMMON,
        windows="same",
        only={"hidden_act": ("silu", "swish")},
    ),
    Architecture(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        layer_names=_LLAMA_LAYER | _QKV_BIASES,
        fixed={"add_qkv_bias": True},
        settings=_COMMON,
        windows="by_layer",
        only={"hidden_act": ("silu", "swish")},
        # Its biases are always there; no key turns them off.
        harmless=frozenset({"attention_bias", "qkv_bias"}),
    ),
    Architecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        layer_names=_LLAMA_LAYER | _QK_NORMS,
        fixed={"qk_layernorm": True},
        settings=_COMMON,
        windows="by_layer",
        only={"hidden_act": ("silu", "swish"), "attention_bias": (False,)},
    ),
)
ARCHITECTURES = {row.model_type: row for row in _ROWS}
"""model_type -> architecture. Of several that have a model's parts an export takes the first, or
the one that the model came from."""
