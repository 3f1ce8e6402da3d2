"""The sharding table: how each parameter of the GPT is cut over the tp axis, and its role.

One table feeds the modules' gradients, initialisation, the optimizer, the gradient norm,
checkpoints and export. What a role means where muP widens a model: width_scaling.py.
"""

import re
from typing import NamedTuple

from model.config import ModelConfig
from model.width_scaling import FanIn, Role, Scaling, scaling_of_role
from parallel.tensor import ParameterSharding


class Row(NamedTuple):
    """What the parameters of one pattern have in common."""

    pattern: str
    """Regular expression of their whole names."""
    sharding: ParameterSharding
    role: Role
    fan_in: FanIn = "hidden"
    """What a hidden matrix reads."""


_REPLICATED = ParameterSharding()
_ROWS = ParameterSharding(dim=0)
_COLUMNS = ParameterSharding(dim=1)
# Every rank holds it, each computes the gradient of its own heads only.
_REPLICATED_PARTIAL = ParameterSharding(partial_gradient=True)


def sharding_table(config: ModelConfig, tp_size: int, sequence_parallel: bool) -> list[Row]:
    """Return the rows of the table; the first whose pattern matches a name is its row."""
    # Fewer key/value heads than tp ranks: each rank holds all of them and slices out the one it
    # needs.
    kv = _ROWS if config.num_kv_heads >= tp_size else _REPLICATED_PARTIAL
    # With the tokens split over tp, each rank's norms see only its part of them.
    norm = _REPLICATED_PARTIAL if sequence_parallel else _REPLICATED
    # A norm of a single head is the same for all, one over all heads is cut as they are.
    q_norm = k_norm = _REPLICATED_PARTIAL
    if config.norms_all_heads:
        q_norm = _ROWS
        k_norm = kv
    return [
        Row(r"embedding\.weight", _ROWS, "embedding"),
        Row(r"output\.weight", _ROWS, "output"),
        Row(r"layers\.\d+\.attention\.q\.weight", _ROWS, "hidden"),
        Row(r"layers\.\d+\.attention\.q\.bias", _ROWS, "vector"),
        Row(r"layers\.\d+\.attention\.[kv]\.weight", kv, "hidden"),
        Row(r"layers\.\d+\.attention\.[kv]\.bias", kv, "vector"),
        Row(r"layers\.\d+\.attention\.sinks", _ROWS, "vector"),
        Row(r"layers\.\d+\.attention\.o\.weight", _COLUMNS, "hidden", "heads"),
        Row(r"layers\.\d+\.attention\.q_norm\.weight", q_norm, "vector"),
        Row(r"layers\.\d+\.attention\.k_norm\.weight", k_norm, "vector"),
        Row(r"layers\.\d+\.mlp\.(gate|up)\.weight", _ROWS, "hidden"),
        Row(r"layers\.\d+\.mlp\.down\.weight", _COLUMNS, "hidden", "ffn"),
        Row(r"layers\.\d+\.(attention|mlp)(_post)?_norm\.weight", norm, "vector"),
        Row(r"final_norm\.weight", norm, "vector"),
    ]


def shardings_for(
    names: list[str], config: ModelConfig, tp_size: int, sequence_parallel: bool = False
) -> dict[str, ParameterSharding]:
    """Look up the sharding of each named parameter; every name must match a pattern."""
    table = sharding_table(config, tp_size, sequence_parallel)
    return {name: _row_of(name, table).sharding for name in names}


def row_of(name: str, config: ModelConfig) -> Row:
    """Look up a parameter's row in the table of one process; role and fan-in are all layouts'."""
    return _row_of(name, sharding_table(config, 1, sequence_parallel=False))


def role_of(name: str, config: ModelConfig) -> Role:
    """Look up the role of a parameter; it is the same in every layout."""
    return row_of(name, config).role


def scaling_of(row: Row, config: ModelConfig) -> Scaling:
    """Return the factors that muP puts on the initial weights and updates of a row's parameters."""
    return scaling_of_role(row.role, config.fan_in_ratio(row.fan_in), config.width_ratio)


def _row_of(name: str, table: list[Row]) -> Row:
    for row in table:
        if re.fullmatch(row.pattern, name):
            return row
    raise AssertionError(f"no row of the sharding table matches {name}")
