"""The sharding table: how each parameter of the GPT is cut over the tp axis.

One table feeds the modules' gradients, initialisation, the gradient norm, checkpoints and export.
"""

import re

from model.config import ModelConfig
from parallel.tensor import ParameterSharding

_REPLICATED = ParameterSharding()
_ROWS = ParameterSharding(dim=0)
_COLUMNS = ParameterSharding(dim=1)
# Every rank holds it, each computes the gradient of its own heads only.
_REPLICATED_PARTIAL = ParameterSharding(partial_gradient=True)


def sharding_table(
    config: ModelConfig, tp_size: int, sequence_parallel: bool
) -> list[tuple[str, ParameterSharding]]:
    """Return patterns of whole parameter names with their sharding; the first match wins."""
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
        (r"embedding\.weight|output\.weight", _ROWS),
        (r"layers\.\d+\.attention\.q\.(weight|bias)", _ROWS),
        (r"layers\.\d+\.attention\.[kv]\.(weight|bias)", kv),
        (r"layers\.\d+\.attention\.sinks", _ROWS),
        (r"layers\.\d+\.attention\.o\.weight", _COLUMNS),
        (r"layers\.\d+\.attention\.q_norm\.weight", q_norm),
        (r"layers\.\d+\.attention\.k_norm\.weight", k_norm),
        (r"layers\.\d+\.mlp\.(gate|up)\.weight", _ROWS),
        (r"layers\.\d+\.mlp\.down\.weight", _COLUMNS),
        (r"layers\.\d+\.(attention|mlp)(_post)?_norm\.weight|final_norm\.weight", norm),
    ]


def shardings_for(
    names: list[str], config: ModelConfig, tp_size: int, sequence_parallel: bool = False
) -> dict[str, ParameterSharding]:
    """Look up the sharding of each named parameter; every name must match a pattern."""
    table = sharding_table(config, tp_size, sequence_parallel)
    found = {}
    for name in names:
        matches = [sharding for pattern, sharding in table if re.fullmatch(pattern, name)]
        assert matches, f"no row of the sharding table matches {name}"
        found[name] = matches[0]
    return found
