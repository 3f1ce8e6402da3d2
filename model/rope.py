"""Rotary position embedding (arXiv 2104.09864), in the half-split form of transformers.

Angles follow transformers' modeling_rope_utils.py and LlamaRotaryEmbedding operation by operation
in fp32: at a million positions another order of operations gives another model.

Legend: t tokens, H head size.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar

import torch

T = TypeVar("T")
RopeType = Literal["default", "linear", "llama3", "yarn"]


class RopeParameter(NamedTuple):
    """One parameter of a rope's scaling."""

    name: str
    """Its name in `Rope` and in transformers' rope_parameters."""
    types: tuple[RopeType, ...]
    """The rope types that use it."""


PARAMETERS: dict[str, RopeParameter] = {
    "rope_scaling_factor": RopeParameter("factor", ("linear", "llama3", "yarn")),
    "original_max_position_embeddings": RopeParameter(
        "original_max_position_embeddings", ("llama3", "yarn")
    ),
    "rope_low_freq_factor": RopeParameter("low_freq_factor", ("llama3",)),
    "rope_high_freq_factor": RopeParameter("high_freq_factor", ("llama3",)),
    "yarn_beta_fast": RopeParameter("beta_fast", ("yarn",)),
    "yarn_beta_slow": RopeParameter("beta_slow", ("yarn",)),
    "yarn_attention_factor": RopeParameter("attention_factor", ("yarn",)),
    "yarn_mscale": RopeParameter("mscale", ("yarn",)),
    "yarn_mscale_all_dim": RopeParameter("mscale_all_dim", ("yarn",)),
    "yarn_correction_range_round_to_int": RopeParameter("truncate", ("yarn",)),
}
"""Setting of the configuration -> the parameter that it gives."""
# Llama 3.1's values are those that Megatron-LM's --use-rope-scaling means; yarn's are the paper's
# (arXiv 2309.00071).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama3": dict(
        factor=8.0, original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    "yarn": dict(beta_fast=32.0, beta_slow=1.0, truncate=True),
}


@dataclass(frozen=True)
class Rope:
    """Describes one rotary embedding, defaults filled in; what its type does not use is None.

    Names and meanings are those of transformers' rope_parameters; `base` is its rope_theta. linear
    is position interpolation (arXiv 2306.15595), llama3 is Llama 3.1's (arXiv 2407.21783), yarn is
    arXiv 2309.00071.
    """

    base: float = 10000.0
    type: RopeType = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    @classmethod
    def make(cls, base: float, type: RopeType, given: Mapping[str, Any]) -> "Rope":
        """Make a rope from transformers' names, with the type's defaults for what is missing.

        Parameters that the type does not use are dropped.
        """
        used = {name: given.get(name) for name, types in PARAMETERS.values() if type in types}
        used = {name: value for name, value in used.items() if value is not None}
        return cls(base, type, **_DEFAULTS.get(type, {}) | used)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that are set, by transformers' names; without base and type."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None and name not in ("base", "type")
        }

    @property
    def scaled_length(self) -> int | None:
        """Longest context that the frequencies are scaled for; None where the type does not say."""
        if self.factor is None or self.original_max_position_embeddings is None:
            return None
        return round(self.factor * self.original_max_position_embeddings)

    @property
    def attention_scaling(self) -> float:
        """Factor on cosines and sines: yarn's attention scaling, 1 for the other types."""
        if self.type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        factor = _required(self.factor)
        if self.mscale and self.mscale_all_dim:
            return float(_magnitude(factor, self.mscale) / _magnitude(factor, self.mscale_all_dim))
        return _magnitude(factor, 1)

    def describe(self) -> str:
        """Write the rope in words: `base 500000`, or `base 500000, llama3 factor 8, ...`."""
        words = [f"{name} {value}" for name, value in self.parameters.items()]
        return f"base {self.base:g}" + (f", {self.type} {', '.join(words)}" if words else "")

    def problems(self) -> list[str]:
        """List values that give no usable angles, or that transformers would read otherwise.

        Each is named by its setting in the configuration.
        """
        values: dict[str, Any] = {"rotary_base": self.base} | {
            setting: getattr(self, name) for setting, (name, _) in PARAMETERS.items()
        }
        found = [
            f"{setting} = {value}: must be a finite number. Fix: give one."
            for setting, value in values.items()
            if value is not None and not math.isfinite(value)
        ]
        if found:
            return found
        least = 1 if self.type == "yarn" else 0  # yarn divides by the base's logarithm
        if self.base <= least:
            found.append(
                f"rotary_base = {self.base}: must be above {least}. Fix: 10000 and 500000 are "
                "common."
            )
        for setting, (name, types) in PARAMETERS.items():
            if self.type in types:
                found += self._range_problems(setting, name, values[setting])
        # Comparing parameters with each other makes sense only where each is in its range.
        return found or self._disagreements()

    def _range_problems(self, setting: str, name: str, value: Any) -> list[str]:
        """Check one parameter of this rope's type by itself."""
        if name in ("factor", "original_max_position_embeddings"):
            if value is None:
                return [
                    f"{setting} = None: rope_type {self.type} needs it. Fix: give it; factor = "
                    "longest context / original one."
                ]
            if value < 1:
                return [
                    f"{setting} = {value}: must be at least 1. Fix: factor = longest context / "
                    "original one, both in tokens."
                ]
        elif value is not None and name != "truncate" and value <= 0:
            return [
                f"{setting} = {value}: must be above 0. Fix: give a positive number, or leave it "
                "out."
            ]
        return []

    def _disagreements(self) -> list[str]:
        """List parameters that do not go together."""
        found = []
        if self.type == "llama3" and _required(self.low_freq_factor) >= _required(
            self.high_freq_factor
        ):
            found.append(
                f"rope_low_freq_factor = {self.low_freq_factor}: must be below "
                f"rope_high_freq_factor = {self.high_freq_factor}. Fix: 1 and 4 are Llama 3.1's."
            )
        if self.type == "yarn" and _required(self.beta_fast) <= _required(self.beta_slow):
            found.append(
                f"yarn_beta_fast = {self.beta_fast}: must be above yarn_beta_slow = "
                f"{self.beta_slow}. Fix: 32 and 1 are the paper's."
            )
        # transformers reads mscale and mscale_all_dim together or not at all, and attention_factor
        # before them.
        if (self.mscale is None) != (self.mscale_all_dim is None):
            found.append(
                f"yarn_mscale = {self.mscale}, yarn_mscale_all_dim = {self.mscale_all_dim}: have "
                "an effect together only. Fix: give both, or yarn_attention_factor."
            )
        elif self.attention_factor is not None and self.mscale is not None:
            found.append(
                f"yarn_attention_factor = {self.attention_factor}: takes the place of yarn_mscale "
                "and yarn_mscale_all_dim. Fix: remove it or them."
            )
        return found


def _required(parameter: T | None) -> T:
    """Return a parameter that the rope's type needs, and that `Rope.problems` has checked."""
    assert parameter is not None, "a rope with problems has no angles"
    return parameter


def _magnitude(scale: float, mscale: float) -> float:
    """Return yarn's factor on cosines and sines: transformers' get_mscale."""
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


@cache
def inverse_frequencies(head_size: int, rope: Rope) -> torch.Tensor:
    """Return the angle per position of each pair of dims: fp32 [H / 2].

    Computed on the CPU as transformers does: a GPU's power function rounds differently.
    """
    dims = torch.arange(0, head_size, 2, dtype=torch.int64, device="cpu")
    positions_per_radian = rope.base ** (dims.to(torch.float32) / head_size)
    if rope.type == "linear":
        return 1.0 / positions_per_radian / _required(rope.factor)
    if rope.type == "llama3":
        return _llama3(1.0 / positions_per_radian, rope)
    if rope.type == "yarn":
        return _yarn(positions_per_radian, head_size, rope)
    return 1.0 / positions_per_radian


def _llama3(frequencies: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Divide the frequencies of long waves by the factor, keep short ones, blend those between."""
    original = _required(rope.original_max_position_embeddings)
    factor = _required(rope.factor)
    low = _required(rope.low_freq_factor)
    high = _required(rope.high_freq_factor)
    # A wave's length is in positions, so it compares with the original context.
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    kept_share = (original / wavelengths - low) / (high - low)
    blended = (1 - kept_share) * scaled / factor + kept_share * scaled
    between = ~(wavelengths < original / high) * ~(wavelengths > original / low)
    return torch.where(between, blended, scaled)


def _yarn(positions_per_radian: torch.Tensor, head_size: int, rope: Rope) -> torch.Tensor:
    """Keep dims that turn often within the original context, divide slow ones by the factor."""
    original = _required(rope.original_max_position_embeddings)
    factor = _required(rope.factor)

    def dim_of(turns: float) -> float:
        """Return the dim that turns this often in the original context."""
        return (head_size * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(rope.base))

    # Between these dims the two are blended.
    low = dim_of(_required(rope.beta_fast))
    high = dim_of(_required(rope.beta_slow))
    if rope.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, head_size - 1)
    if low == high:
        high += 0.001  # as transformers does: no division by zero
    numbers = torch.arange(head_size // 2, dtype=torch.float32, device="cpu")
    kept_share = 1 - torch.clamp((numbers - low) / (high - low), 0, 1)
    scaled = 1.0 / (factor * positions_per_radian)
    return scaled * (1 - kept_share) + 1.0 / positions_per_radian * kept_share


def rotary_tables(
    positions_t: torch.Tensor, head_size: int, rope: Rope, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of every position's angles: int64 [t] -> two [t, H] of `dtype`.

    Both carry yarn's attention scaling.
    """
    frequencies = inverse_frequencies(head_size, rope).to(positions_t.device, non_blocking=True)
    angles = positions_t.to(torch.float32)[:, None] * frequencies[None, :]
    # Dims i and i + H / 2 are a pair and turn by the same angle.
    angles = torch.cat([angles, angles], dim=-1)
    scaling = rope.attention_scaling
    return angles.cos().mul_(scaling).to(dtype), angles.sin().mul_(scaling).to(dtype)
