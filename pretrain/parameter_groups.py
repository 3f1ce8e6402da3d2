"""Which parameters the optimizer treats alike, by their roles in the sharding table."""

from collections.abc import Sequence
from typing import TypedDict

from torch import nn

from model.config import ModelConfig
from model.gpt import GPTStage
from model.sharding import role_of
from pretrain.config.optimizer_config import OptimizerConfig


class ParameterGroup(TypedDict):
    """What a group of torch's optimizers holds, and what we add to it."""

    params: list[nn.Parameter]
    weight_decay: float
    lr_scale: float
    """The group's learning rate over that of the schedule."""


def parameter_groups(
    stages: Sequence[GPTStage], model: ModelConfig, config: OptimizerConfig
) -> list[ParameterGroup]:
    """Sort the parameters of this rank's stages: matrices decay; norms, biases and sinks do not.

    Every rank has the same groups in the same order, though some may be empty on it.
    """
    matrices = ParameterGroup(params=[], weight_decay=config.weight_decay, lr_scale=1.0)
    vectors = ParameterGroup(params=[], weight_decay=0.0, lr_scale=1.0)
    for stage in stages:
        for name, parameter in stage.named_parameters():
            group = vectors if role_of(name, model) == "vector" else matrices
            group["params"].append(parameter)
    return [matrices, vectors]
