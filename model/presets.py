"""Presets of the model by name."""

# Each preset gives the fields that differ from the defaults.
PRESETS: dict[str, dict] = {
    # About 10M parameters with an 8K vocabulary: for laptops, tests and the quick start.
    "tiny": dict(
        num_layers=8,
        hidden_size=256,
        ffn_hidden_size=704,
        num_attention_heads=8,
        num_query_groups=4,
        untie_embeddings_and_output_weights=True,
    ),
    # The smallest model of GPT-3 (arXiv 2005.14165, table 2.1), with SwiGLU.
    "125m": dict(num_layers=12, hidden_size=768, ffn_hidden_size=2048, num_attention_heads=12),
    # Llama 3.2 1B's shape without its rope scaling (huggingface: meta-llama/Llama-3.2-1B
    # config.json).
    "1b": dict(
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        rotary_base=500000.0,
    ),
    # Shapes as published in the models' config.json.
    "llama3-8b": dict(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        untie_embeddings_and_output_weights=True,
        rotary_base=500000.0,
    ),
    "llama3-70b": dict(
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_attention_heads=64,
        num_query_groups=8,
        untie_embeddings_and_output_weights=True,
        rotary_base=500000.0,
    ),
    "qwen3-8b": dict(
        num_layers=36,
        hidden_size=4096,
        ffn_hidden_size=12288,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=128,
        qk_layernorm=True,
        norm_epsilon=1e-6,
        untie_embeddings_and_output_weights=True,
        rotary_base=1000000.0,
    ),
}
