"""Factors of logits and scores, multiplied into weights where an architecture has no key for them.

Both are linear in one weight each: the logits in that of the last norm, the scores in what the
queries are made with. Only powers of two go there: their product is exact in every type of numbers
(but for what float16 is too coarse for near zero).
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from model.config import ModelConfig
from model.hf.architecture import part_of

LAST_NORM = "final_norm.weight"
QUERY_NORM = "attention.q_norm.weight"
QUERY_WEIGHT = "attention.q.weight"
QUERY_BIAS = "attention.q.bias"
ROUNDING = 1e-12
"""Relative difference of a computed factor from a power of two that is rounding."""


def fold(config: ModelConfig) -> tuple[ModelConfig, dict[str, float]]:
    """Write factors into weights -> the settings that are left, and part -> its factor.

    A norm that multiplies by 1 + weight takes none: its weights would lose their precision.

    Args:
        config: without muP's settings (`ModelConfig.without_mup`).
    """
    assert not config.use_mup, "muP's factors are written out first"
    factors: dict[str, float] = {}
    logits = _power_of_two(1 / config.logits_scaling)
    if logits is not None and logits != 1.0 and not config.apply_layernorm_1p:
        factors[LAST_NORM] = logits
        config = replace(config, logits_scaling=1.0)
    # Without a factor of its own an architecture divides scores by the root of the head size.
    scores = None
    if config.softmax_scale is not None:
        scores = _power_of_two(config.softmax_scale * config.head_size**0.5)
    if scores is not None and not (config.qk_layernorm and config.apply_layernorm_1p):
        if scores != 1.0:
            factors |= dict.fromkeys(_parts_of_queries(config), scores)
        config = replace(config, softmax_scale=None)
    return config, factors


def _power_of_two(factor: float) -> float | None:
    """Return a factor that is a power of two, without its rounding; None for any other."""
    nearest = 2.0 ** round(math.log2(factor))
    return nearest if math.isclose(factor, nearest, rel_tol=ROUNDING) else None


def _parts_of_queries(config: ModelConfig) -> list[str]:
    """List the parts of a layer in which queries are linear, all of them together."""
    if config.qk_layernorm:
        return [QUERY_NORM]
    return [QUERY_WEIGHT, QUERY_BIAS] if config.add_qkv_bias else [QUERY_WEIGHT]


def factor_of(name: str, factors: Mapping[str, float]) -> float:
    """Return the factor of a parameter; 1 where nothing is multiplied into it.

    Args:
        name: layers.7.attention.q.weight, for example.
    """
    return factors.get(part_of(name), 1.0)
