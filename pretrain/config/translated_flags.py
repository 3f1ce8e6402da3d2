"""Flags of Megatron-LM that act through another setting; read once all settings are known."""

import dataclasses

from pretrain.config.config import Config


def with_translated_flags(config: Config) -> Config:
    """Translate --num-layers-per-virtual-pipeline-stage into stages per rank.

    Raises:
        ValueError: it means no whole number of stages, or another than is given.
    """
    given = config.given.megatron.get("num_layers_per_virtual_pipeline_stage")
    if given is None:
        return config
    name = f"num_layers_per_virtual_pipeline_stage = {given.value}"
    if any(phase.pipeline_model_parallel_size for phase in config.schedule.phases):
        raise ValueError(
            f"{name}: phases have pipelines of their own. "
            "Fix: num_virtual_stages_per_pipeline_rank in each phase."
        )
    per_rank = _stages_per_rank(config, given.value)
    if per_rank is None:
        layers = config.model.num_layers
        pp = config.layout.pipeline_model_parallel_size
        raise ValueError(
            f"{name}: must divide the num_layers = {layers} into equal stages on "
            f"pipeline_model_parallel_size = {pp} ranks. Fix: a divisor of {layers} / {pp}."
        )
    also = config.layout.num_virtual_stages_per_pipeline_rank
    if also not in (None, per_rank):
        raise ValueError(
            f"{name}: means num_virtual_stages_per_pipeline_rank = {per_rank}, but that is {also}. "
            "Fix: remove one of them."
        )
    layout = dataclasses.replace(config.layout, num_virtual_stages_per_pipeline_rank=per_rank)
    return dataclasses.replace(config, layout=layout)


def _stages_per_rank(config: Config, layers_of_stage: str) -> int | None:
    """Count the stages of that many layers on each pipeline rank; None = no whole number."""
    pp = config.layout.pipeline_model_parallel_size
    if not layers_of_stage.isdecimal() or int(layers_of_stage) == 0 or pp < 1:
        return None
    per_rank, rest = divmod(config.model.num_layers, pp * int(layers_of_stage))
    return None if rest else per_rank or None
