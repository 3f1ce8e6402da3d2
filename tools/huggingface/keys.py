"""What the keys of a Hugging Face folder's config.json mean to an import.

Each key is read (tools/huggingface/config.py), known to change no logit, or refused by name because
it does. A key that is unknown to the architecture's configuration class in transformers is ignored
there, and here with a warning.
"""

from dataclasses import fields
from typing import Any

from model.hf.architecture import Architecture
from tools.shared.message_text import short

ANOTHER = "Fix: another model."
CORRECT = "Fix: correct config.json, or download it again."

READ = {
    "model_type",
    "vocab_size",
    "max_position_embeddings",
    "pad_token_id",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "attention_dropout",
    "architectures",
    "auto_map",
}
"""Keys that tools/huggingface/config.py and rope_config.py read, beside an architecture's own."""

WITHOUT_EFFECT = {
    # notes of whoever saved the file
    "transformers_version",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "tokenizer_class",
    # how weights are stored and attention is computed: the same model
    "dtype",
    "torch_dtype",
    "use_cache",
    "cache_implementation",
    "pretraining_tp",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "use_bfloat16",
    "torchscript",
    "chunk_size_feed_forward",
    # what is returned beside the logits
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    # generation
    "bos_token_id",
    "eos_token_id",
    "unk_token_id",
    "sep_token_id",
    "cls_token_id",
    "decoder_start_token_id",
    "generation_config",
    "max_length",
    "min_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "num_beams",
    "repetition_penalty",
    "length_penalty",
    # other tasks and architectures
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
    "is_decoder",
    "cross_attention_hidden_size",
    "tie_encoder_decoder",
    "prefix",
    "bad_words_ids",
}
"""Keys that change no logit of the architectures built here."""

ONLY: dict[str, tuple[Any, ...]] = {
    # another kind of model
    "is_causal": (True,),
    "use_bidirectional_attention": (False, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    # biases and norms
    "attention_bias": (False,),
    "qkv_bias": (False, None),
    "mlp_bias": (False,),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
    # weights that are stored in another way
    "quantization_config": (None,),
    "compression_config": (None,),
    "per_layer_config": (None,),
    "configuration_files": (None,),
    "transformers_weights": (None,),
    "pruned_heads": (None, {}),
    # scaled or capped numbers
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None, 0.0),
    "final_logit_softcapping": (None, 0.0),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "scale_emb": (None, 1.0),
    "scale_depth": (None,),
    # other positions and masks
    "alibi": (False, None),
    "rope_interleaved": (False, None),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None,),
    "attention_chunk_size": (None,),
    "use_mrope": (False, None),
    # mixture of experts
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
}
"""Keys that would change the numbers -> the values that do not; others are refused."""


def sort_keys(
    content: dict[str, Any], architecture: Architecture, parser: type
) -> tuple[list[str], list[str]]:
    """Sort the keys of a config.json -> (those refused, those that are ignored), a line each.

    Args:
        parser: transformers' configuration class.
    """
    read = READ | architecture.older | {setting.theirs for setting in architecture.settings}
    known = read | WITHOUT_EFFECT | architecture.harmless
    only = {**ONLY, **architecture.only}
    defaults = {item.name: item.default for item in fields(parser)}
    problems = []
    warnings = []
    for key, value in content.items():
        # Known ones first, then what only transformers knows.
        if key in known:
            continue
        if key in only:
            if value not in only[key]:
                problems.append(f"{key} = {short(value)}: only {only[key][0]} is built. {ANOTHER}")
        elif key in defaults:
            if value != defaults[key]:
                problems.append(
                    f"{key} = {short(value)}: {parser.__name__} reads it, and it is not "
                    f"built here. {ANOTHER}"
                )
        elif hasattr(parser, key):
            problems.append(
                f"{key} = {short(value)}: is the name of a method or constant of "
                f"{parser.__name__}. Fix: remove it from config.json."
            )
        else:
            warnings.append(
                f"{key} = {short(value)}: {parser.__name__} of transformers has no such "
                "setting; ignored, as there"
            )
    return problems, warnings
