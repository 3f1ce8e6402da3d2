"""A config.yaml that an older version wrote into a checkpoint still reads."""

from pretrain.config.config_yaml import dump_yaml, read_config_yaml
from pretrain.schedule.resolve import resolve_phases

# As of the time when the memory settings were a part of the model's.
OLD = """\
model: tiny
num_layers: 8
hidden_size: 256
ffn_hidden_size: 704
num_attention_heads: 8
num_query_groups: 4
swiglu: true
untie_embeddings_and_output_weights: true
rotary_base: 10000.0
recompute_granularity: selective
recompute_activations: false
cpu_offloading_num_layers: 0
mlp_tiles: 2
attention_head_chunks: 1
tensor_model_parallel_size: 1
data_path: [corpus]
tokenizer_type: NullTokenizer
vocab_size: 100
micro_batch_size: 1
phases:
- {name: a, seq_length: 64, train_tokens: 5120, global_batch_tokens: 256}
- {name: b, seq_length: 128, train_tokens: 5120, global_batch_tokens: 256, mlp_tiles: 4,
  recompute_granularity: none, rotary_base: 500000.0}
lr: 0.001
seed: 1234
"""


def test_a_config_of_before_reads_and_means_the_same(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(OLD)
    config = read_config_yaml(str(path))
    assert config.memory.mlp_tiles == 2 and config.memory.recompute_granularity == "selective"
    first, second = resolve_phases(config)
    assert (first.memory.mlp_tiles, first.memory.recompute_granularity) == (2, "selective")
    assert (second.memory.mlp_tiles, second.memory.recompute_granularity) == (4, None)
    assert (first.rope.base, second.rope.base) == (10000.0, 500000.0)
    path.write_text(dump_yaml(config))
    assert read_config_yaml(str(path)) == config
