"""Which parameters the optimizer treats alike, by their roles in the sharding table."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from torch import nn

from model.config import ModelConfig
from model.gpt import GPTStage
from model.sharding import Row, row_of, scaling_of, sharding_table
from pretrain.config.optimizer_config import OptimizerConfig


class ParameterGroup(TypedDict):
    """What a group of torch's optimizers holds, and what we add to it."""

    params: list[nn.Parameter]
    weight_decay: float
    eps: float
    lr_scale: float
    """The group's learning rate over that of the schedule."""


class _Treatment(NamedTuple):
    """How the parameters of a group are updated."""

    weight_decay: float
    eps: float
    lr_scale: float


def parameter_groups(
    stages: Sequence[GPTStage], model: ModelConfig, config: OptimizerConfig
) -> list[ParameterGroup]:
    """Sort the parameters of this rank's stages: matrices decay; norms, biases and sinks do not.

    Without muP these are two groups. With it matrices of another fan-in, and those between hidden
    vectors and others, have learning rates of their own. Every rank has the same groups in the same
    order, though some may be empty on it.
    """
    rows = sharding_table(model, 1, sequence_parallel=False)
    groups = {treatment: [] for row in rows for treatment in [_treatment(row, model, config)]}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            groups[_treatment(row_of(name, model), model, config)].append(parameter)
    return [
        ParameterGroup(params=params, **treatment._asdict()) for treatment, params in groups.items()
    ]


def _treatment(row: Row, model: ModelConfig, config: OptimizerConfig) -> _Treatment:
    """Return how parameters of a row of the table are updated."""
    scaling = scaling_of(row, model)
    decays = row.role != "vector"
    return _Treatment(
        weight_decay=config.weight_decay * scaling.weight_decay if decays else 0.0,
        eps=config.adam_eps * scaling.epsilon,
        lr_scale=scaling.learning_rate,
    )
