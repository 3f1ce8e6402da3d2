"""Which parameters the optimizer treats alike, by their roles in the sharding table."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from torch import nn

from model.config import ModelConfig
from model.gpt import GPTStage
from model.sharding import Row, row_of, scaling_of, sharding_table
from pretrain.config.optimizer_config import OptimizerConfig

MUON_LEARNING_RATE_POWER = {"spectral": 0.5, "shape_scaling": 0.0, "unit_rms_norm": 0.0}
"""Scale of Muon's updates -> the power of muP's factor on AdamW's learning rate that Muon needs.

Matrices of any width take updates of the same spectral norm. At one learning rate AdamW's grow with
the width, those of scale `spectral` with its root, the others' not at all."""


class ParameterGroup(TypedDict):
    """What a group of torch's optimizers holds, and what we add to it."""

    params: list[nn.Parameter]
    names: list[str]
    """Whole names of `params`."""
    weight_decay: float
    eps: float
    lr_scale: float
    """The group's learning rate over that of the schedule."""
    by_muon: bool
    """Muon updates these, and AdamW all others."""


class _Treatment(NamedTuple):
    """How the parameters of a group are updated."""

    weight_decay: float
    eps: float
    lr_scale: float
    by_muon: bool


def parameter_groups(
    stages: Sequence[GPTStage], model: ModelConfig, config: OptimizerConfig
) -> list[ParameterGroup]:
    """Sort the parameters of this rank's stages: matrices decay; norms, biases and sinks do not.

    Without muP these are two groups, and one for Muon. With it matrices of another fan-in, and
    those between hidden vectors and others, have learning rates of their own. Every rank has the
    same groups in the same order, though some may be empty on it.
    """
    rows = sharding_table(model, 1, sequence_parallel=False)
    groups = {
        treatment: ParameterGroup(params=[], names=[], **treatment._asdict())
        for row in rows
        for treatment in [_treatment(row, model, config)]
    }
    for stage in stages:
        for name, parameter in stage.named_parameters():
            group = groups[_treatment(row_of(name, model), model, config)]
            group["params"].append(parameter)
            group["names"].append(name)
    return list(groups.values())


def _treatment(row: Row, model: ModelConfig, config: OptimizerConfig) -> _Treatment:
    """Return how parameters of a row of the table are updated."""
    scaling = scaling_of(row, model)
    decays = row.role != "vector"
    by_muon = row.role == "hidden" and config.optimizer == "muon"
    power = MUON_LEARNING_RATE_POWER[config.muon_scale_mode] if by_muon else 1.0
    learning_rate = scaling.learning_rate**power
    return _Treatment(
        weight_decay=config.weight_decay * scaling.weight_decay**power if decays else 0.0,
        eps=config.adam_eps * scaling.epsilon,
        lr_scale=learning_rate,
        by_muon=by_muon,
    )
