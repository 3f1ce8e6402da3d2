"""Our parameters and settings in Hugging Face's names, per architecture, both ways.

The rotary embedding uses the same half-split form, so weights are copied without any permutation.
Names as in transformers' modeling_llama.py, modeling_qwen2.py and modeling_qwen3.py.
"""

import re

from model.config import ModelConfig
from model.rope import Rope

_LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.q.bias": "self_attn.q_proj.bias",
    "attention.k.bias": "self_attn.k_proj.bias",
    "attention.v.bias": "self_attn.v_proj.bias",
    "attention.o.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_TOP_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
VOCABULARY_ROWS = ("embedding.weight", "output.weight")
"""Parameters with a row per token, whose padded rows an export leaves out."""


def huggingface_name(name: str) -> str:
    """Translate layers.7.attention.q.weight to model.layers.7.self_attn.q_proj.weight."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}" if match else _TOP_NAMES[name]


def architecture(config: ModelConfig, imported_as: str | None = None) -> tuple[str, str]:
    """Return (class name, model_type) of the architecture that has this model's parts.

    Args:
        imported_as: model_type of the folder that the model is from: without windows, Llama and
            Mistral are the same model.

    Raises:
        ValueError: no architecture of transformers that we know has them all.
    """
    windows = set(config.windows)
    if windows != {None} and not (config.qk_layernorm or config.add_qkv_bias):
        if None in windows:
            raise ValueError(
                f"window_attn_skip_freq = {config.window_attn_skip_freq}: no architecture of "
                "transformers that we know has windows in some layers, but neither norms nor "
                "biases on q and k. Fix: train with windows in all layers, or with qk_layernorm."
            )
        return "MistralForCausalLM", "mistral"
    if config.qk_layernorm and config.add_qkv_bias:
        raise ValueError(
            "qk_layernorm = True with add_qkv_bias = True: no architecture of transformers that we "
            "know has both. Fix: train with one of them."
        )
    # All have RMSNorm, SwiGLU, rope and grouped heads.
    if config.qk_layernorm:
        return "Qwen3ForCausalLM", "qwen3"
    if config.add_qkv_bias:
        return "Qwen2ForCausalLM", "qwen2"
    if imported_as == "mistral":
        return "MistralForCausalLM", "mistral"
    return "LlamaForCausalLM", "llama"


def context_to_declare(rope: Rope, longest: int) -> int:
    """Return max_position_embeddings of an export: the longest context trained, or yarn's.

    Late versions of transformers 4 take max_position_embeddings / original_max_position_embeddings
    for yarn's factor, and version 5 warns where the two differ: any other value would be another
    model there.
    """
    if rope.type != "yarn":
        return longest
    assert rope.scaled_length is not None, "yarn without its factor is refused"
    return rope.scaled_length


def huggingface_config(
    config: ModelConfig,
    vocab_size: int,
    rope: Rope,
    max_position_embeddings: int,
    dtype: str,
    eos_token_id: int | None,
    imported_as: str | None = None,
) -> dict:
    """Return the content of config.json; imported_as: see `architecture`."""
    class_name, model_type = architecture(config, imported_as)
    # Names and values are transformers' own already.
    scaling = {"rope_type": rope.type} | rope.parameters
    # Where transformers before version 5 and other engines read the rope.
    older = {"rope_theta": rope.base}
    if rope.type != "default":
        older |= {"rope_scaling": scaling}
    return (
        older
        | _window_keys(config, model_type)
        | {
            "architectures": [class_name],
            "model_type": model_type,
            "vocab_size": vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.ffn_hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_size,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "rms_norm_eps": config.norm_epsilon,
            "initializer_range": config.init_method_std,
            "max_position_embeddings": max_position_embeddings,
            # Where transformers reads it from version 5 on.
            "rope_parameters": {"rope_theta": rope.base} | scaling,
            "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
            "torch_dtype": dtype,
            "bos_token_id": None,
            "eos_token_id": eos_token_id,
            "pad_token_id": None,
            "use_cache": True,
        }
    )


def _window_keys(config: ModelConfig, model_type: str) -> dict:
    """Return the keys of config.json that say which layers have a window."""
    window = config.window_size[0] + 1 if config.window_size else None
    # Mistral has one window for all layers, or none.
    if model_type == "mistral":
        return {"sliding_window": window}
    if window is None:
        return {"use_sliding_window": False}
    types = ["full_attention" if each is None else "sliding_attention" for each in config.windows]
    # Where transformers reads no layer_types, it has a number of layers without, then those with.
    first = types.index("sliding_attention")
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": types,
    }


ARCHITECTURES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
}
"""model_type -> the settings that tell the architectures apart in an import."""


def our_name(name: str) -> str:
    """Translate model.layers.7.self_attn.q_proj.weight to layers.7.attention.q.weight.

    Folders of a base model, without a head, leave the prefix `model.` out.

    Raises:
        KeyError: a name that we do not have.
    """
    # A number with a leading zero would name the same layer twice.
    match = re.fullmatch(r"(?:model\.)?layers\.(0|[1-9]\d*)\.(.+)", name)
    if match:
        return f"layers.{match[1]}.{_BACK_LAYER[match[2]]}"
    return _BACK_TOP[name if name.startswith(("model.", "lm_head.")) else f"model.{name}"]


_BACK_LAYER = {theirs: ours for ours, theirs in _LAYER_NAMES.items()}
_BACK_TOP = {theirs: ours for ours, theirs in _TOP_NAMES.items()}
