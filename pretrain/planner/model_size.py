"""How much a model is: parameters and floating-point operations (see rank_memory.py and cost.py for
a rank's share)."""

from model.config import ModelConfig


def matrix_parameters_per_layer(config: ModelConfig) -> int:
    """Weights of one layer that take part in matrix products."""
    D = config.hidden_size
    H = config.head_size
    heads = config.num_attention_heads
    kv_heads = config.num_kv_heads
    return 2 * D * heads * H + 2 * D * kv_heads * H + 3 * D * config.ffn_hidden_size


def num_parameters(config: ModelConfig, vocab_size: int) -> int:
    """All weights, the padded rows of the embedding left out."""
    D = config.hidden_size
    H = config.head_size
    small = 2 * D + (2 * H if config.qk_layernorm else 0)
    if config.add_qkv_bias:
        small += (config.num_attention_heads + 2 * config.num_kv_heads) * H
    tables = vocab_size * D * (2 if config.untie_embeddings_and_output_weights else 1)
    return config.num_layers * (matrix_parameters_per_layer(config) + small) + tables + D


def step_flops(config: ModelConfig, vocab_size: int, tokens: int, causal_pairs: int) -> float:
    """Model FLOPs of forward and backward: matrix products and the causal half of attention, no
    recompute.

    Args:
        causal_pairs: sum over documents of length * (length + 1) / 2: pairs of tokens that see each
            other.
    """
    weights = (
        config.num_layers * matrix_parameters_per_layer(config) + vocab_size * config.hidden_size
    )
    attention = 4 * config.num_layers * config.num_attention_heads * config.head_size * causal_pairs
    return 6.0 * weights * tokens + 3.0 * attention
