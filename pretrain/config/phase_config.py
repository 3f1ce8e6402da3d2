"""One entry of `phases:` as a user writes it."""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import tyro

from data.config import Exhausted, Packing
from data.units import parse_tokens
from model.activation_memory.settings import MemoryConfig, MemorySettings
from model.config import ModelConfig
from model.rope import ROPE_SETTINGS, RopeType
from parallel.config import CommType, ShardingStrategy
from parallel.schedule import ScheduleName

Tokens = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="TOKENS",
        instance_from_str=lambda args: parse_tokens(args[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""A count of tokens in a field: YAML and flags accept 800B and 8Mi."""


@dataclass(kw_only=True)
class PhaseConfig:
    """One entry of `phases:`; what it leaves out is taken from the run's own settings."""

    name: str = ""
    seq_length: Tokens | None = None
    train_tokens: Tokens | None = None
    global_batch_tokens: Tokens | None = None
    rampup_batch_size: list[int] | None = None
    step_batch_size_schedule: str | None = None
    micro_batch_size: int | None = None
    layout: Literal["auto", "given"] | None = None
    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None
    context_parallel_size: int | None = None
    pipeline_schedule: ScheduleName | None = None
    num_virtual_stages_per_pipeline_rank: int | None = None
    cp_comm_type: CommType | None = None
    hierarchical_context_parallel_sizes: list[int] | None = None
    data_parallel_sharding_strategy: ShardingStrategy | None = None
    sequence_parallel: bool | None = None
    recompute_granularity: Literal["none", "selective", "full", "attention_kept"] | None = None
    cpu_offloading_num_layers: int | None = None
    mlp_tiles: int | None = None
    attention_head_chunks: int | None = None
    loss_chunk_tokens: int | None = None
    rotary_base: float | None = None
    use_rope_scaling: bool | None = None
    rope_type: RopeType | None = None
    rope_scaling_factor: float | None = None
    original_max_position_embeddings: int | None = None
    rope_low_freq_factor: float | None = None
    rope_high_freq_factor: float | None = None
    yarn_beta_fast: float | None = None
    yarn_beta_slow: float | None = None
    yarn_attention_factor: float | None = None
    yarn_mscale: float | None = None
    yarn_mscale_all_dim: float | None = None
    yarn_correction_range_round_to_int: bool | None = None
    document_masking: bool | None = None
    packing: Packing | None = None
    data_path: list[str] | None = None
    data_exhausted: Exhausted | None = None
    lr: float | None = None
    min_lr: float | None = None
    lr_schedule: Literal["continue", "rewarm", "decay"] | None = None
    lr_warmup_tokens: Tokens | None = None

    @property
    def has_own_batch(self) -> bool:
        """Does the phase leave the run's batch and its schedule?"""
        return bool(
            self.global_batch_tokens is not None
            or self.rampup_batch_size
            or self.step_batch_size_schedule
        )

    def with_memory(self, memory: MemoryConfig) -> MemorySettings:
        """The run's memory settings with this phase's."""
        given = {
            field.name: getattr(self, field.name)
            for field in fields(MemorySettings)
            if getattr(self, field.name) is not None
        }
        return replace(memory, **given).settings

    def with_rope(self, model: ModelConfig) -> ModelConfig:
        """The run's model settings with this phase's rope; parameters that it leaves out are the
        run's own."""
        given = {
            name: getattr(self, name) for name in ROPE_SETTINGS if getattr(self, name) is not None
        }
        if {
            "rope_type",
            "use_rope_scaling",
        } & given.keys():  # one choice under two names: the phase's stands alone
            given = {"rope_type": None, "use_rope_scaling": None} | given
        return replace(model, **given)
