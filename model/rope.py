"""Rotary position embedding (arXiv 2104.09864), in the half-split form of Hugging Face
transformers.

Angles follow transformers' modeling_rope_utils.py and LlamaRotaryEmbedding operation by operation
in fp32: at a million positions another order of operations gives another model.

Legend: t tokens, n heads, H head size.
"""

import math
from dataclasses import asdict, dataclass
from functools import cache
from typing import Literal

import torch

RopeType = Literal["default", "linear", "llama3", "yarn"]
PARAMETERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rope_scaling_factor": ("factor", ("linear", "llama3", "yarn")),
    "original_max_position_embeddings": ("original_max_position_embeddings", ("llama3", "yarn")),
    "rope_low_freq_factor": ("low_freq_factor", ("llama3",)),
    "rope_high_freq_factor": ("high_freq_factor", ("llama3",)),
    "yarn_beta_fast": ("beta_fast", ("yarn",)),
    "yarn_beta_slow": ("beta_slow", ("yarn",)),
    "yarn_attention_factor": ("attention_factor", ("yarn",)),
    "yarn_mscale": ("mscale", ("yarn",)),
    "yarn_mscale_all_dim": ("mscale_all_dim", ("yarn",)),
    "yarn_correction_range_round_to_int": ("truncate", ("yarn",)),
}
"""Setting of the configuration -> (its name in `Rope` and in transformers, the types that use
it)."""
ROPE_SETTINGS = ("rotary_base", "use_rope_scaling", "rope_type", *PARAMETERS)
# Llama 3.1's values are those that Megatron-LM's --use-rope-scaling means; yarn's are the paper's
# (arXiv 2309.00071).
_DEFAULTS = {
    "llama3": dict(
        factor=8.0, original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    "yarn": dict(beta_fast=32.0, beta_slow=1.0, truncate=True),
}


@dataclass(frozen=True)
class Rope:
    """One rotary embedding, everything resolved; what its type does not use is None.

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
    def make(cls, base: float, type: RopeType, given: dict) -> "Rope":
        """From transformers' names: parameters that the type does not use are dropped, missing ones
        its defaults."""
        used = {name: given.get(name) for name, types in PARAMETERS.values() if type in types}
        used = {name: value for name, value in used.items() if value is not None}
        return cls(base, type, **_DEFAULTS.get(type, {}) | used)

    @property
    def parameters(self) -> dict:
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
        if self.mscale and self.mscale_all_dim:
            return float(
                _magnitude(self.factor, self.mscale) / _magnitude(self.factor, self.mscale_all_dim)
            )
        return _magnitude(self.factor, 1)

    def describe(self) -> str:
        """`base 500000`, or with its scaling `base 500000, llama3 factor 8,
        original_max_position_embeddings 8192`."""
        words = [f"{name} {value}" for name, value in self.parameters.items()]
        return f"base {self.base:g}" + (f", {self.type} {', '.join(words)}" if words else "")

    def problems(self) -> list[str]:
        """Values that give no usable angles or that transformers would read otherwise, by the
        configuration's names."""
        values = {"rotary_base": self.base} | {
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
                f"rotary_base = {self.base}: must be above {least}. Fix: 10000 and 500000 are common."
            )
        for setting, (name, types) in PARAMETERS.items():
            value = values[setting]
            if self.type not in types:
                continue
            if name in ("factor", "original_max_position_embeddings"):
                if value is None:
                    found.append(
                        f"{setting} = None: rope_type {self.type} needs it. Fix: give it; factor = longest "
                        "context / original one."
                    )
                elif value < 1:
                    found.append(
                        f"{setting} = {value}: must be at least 1. Fix: factor = longest context / original "
                        "one, both in tokens."
                    )
            elif value is not None and name != "truncate" and value <= 0:
                found.append(
                    f"{setting} = {value}: must be above 0. Fix: give a positive number, or leave it out."
                )
        return found or self._disagreements()

    def _disagreements(self) -> list[str]:
        """Parameters that do not go together."""
        found = []
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            found.append(
                f"rope_low_freq_factor = {self.low_freq_factor}: must be below rope_high_freq_factor = "
                f"{self.high_freq_factor}. Fix: 1 and 4 are Llama 3.1's."
            )
        if self.type == "yarn" and self.beta_fast <= self.beta_slow:
            found.append(
                f"yarn_beta_fast = {self.beta_fast}: must be above yarn_beta_slow = {self.beta_slow}. "
                "Fix: 32 and 1 are the paper's."
            )
        # transformers reads mscale and mscale_all_dim together or not at all, and attention_factor
        # before them.
        if (self.mscale is None) != (self.mscale_all_dim is None):
            found.append(
                f"yarn_mscale = {self.mscale}, yarn_mscale_all_dim = {self.mscale_all_dim}: have an effect "
                "together only. Fix: give both, or yarn_attention_factor."
            )
        elif self.attention_factor is not None and self.mscale is not None:
            found.append(
                f"yarn_attention_factor = {self.attention_factor}: takes the place of yarn_mscale and "
                "yarn_mscale_all_dim. Fix: remove it or them."
            )
        return found


def _magnitude(scale: float, mscale: float) -> float:
    """transformers' get_mscale."""
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


@cache
def inverse_frequencies(head_size: int, rope: Rope) -> torch.Tensor:
    """fp32 [H / 2], computed on the CPU as transformers does: a GPU's power function rounds
    differently."""
    dims = torch.arange(0, head_size, 2, dtype=torch.int64, device="cpu")
    powers = rope.base ** (dims.to(torch.float32) / head_size)
    if rope.type == "linear":
        return 1.0 / powers / rope.factor
    if rope.type == "llama3":
        return _llama3(1.0 / powers, rope)
    if rope.type == "yarn":
        return _yarn(powers, head_size, rope)
    return 1.0 / powers


def _llama3(frequencies: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Long waves divided by the factor, short ones kept, those between blended."""
    original = rope.original_max_position_embeddings
    low = rope.low_freq_factor
    high = rope.high_freq_factor
    waves = 2 * math.pi / frequencies
    scaled = torch.where(waves > original / low, frequencies / rope.factor, frequencies)
    smooth = (original / waves - low) / (high - low)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(waves < original / high) * ~(waves > original / low)
    return torch.where(between, blended, scaled)


def _yarn(powers: torch.Tensor, head_size: int, rope: Rope) -> torch.Tensor:
    """Dims that turn often within the original context kept, those that turn seldom divided by the
    factor."""

    def dim_of(turns: float) -> float:
        return (
            head_size * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi))
        ) / (2 * math.log(rope.base))

    low = dim_of(rope.beta_fast)
    high = dim_of(rope.beta_slow)
    if rope.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, head_size - 1)
    if low == high:
        high += 0.001  # as transformers does: no division by zero
    numbers = torch.arange(head_size // 2, dtype=torch.float32, device="cpu")
    kept = 1 - torch.clamp((numbers - low) / (high - low), 0, 1)
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def rotary_tables(
    positions_t: torch.Tensor, head_size: int, rope: Rope, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position's angles, times yarn's scaling: int64 [t] -> two [t, H]
    of `dtype`."""
    frequencies = inverse_frequencies(head_size, rope).to(positions_t.device, non_blocking=True)
    angles = positions_t.to(torch.float32)[:, None] * frequencies[None, :]
    angles = torch.cat([angles, angles], dim=-1)
    scaling = rope.attention_scaling
    return angles.cos().mul_(scaling).to(dtype), angles.sin().mul_(scaling).to(dtype)
