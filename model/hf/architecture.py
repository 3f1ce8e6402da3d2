"""What an architecture of transformers is to us: one object, which import and export both read.

The rows are in architectures.py. tools/CONVERTING.md says how one is added.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from model.config import ModelConfig

VOCABULARY_ROWS = ("embedding.weight", "output.weight")
"""Parameters with a row per token, whose padded rows an export leaves out."""
_TOP_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)")
"""Our name of a layer's parameter: the layer's number, and what it is of the layer."""

Windows = Literal["none", "same", "by_layer", "switched"]
"""Where an architecture has sliding windows: nowhere; in all layers or none, told by sliding_window
alone (same); in the layers that layer_types names (by_layer), there only if use_sliding_window is
on (switched)."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Pairs one of our settings with the key of config.json that holds it."""

    ours: str
    """A field of ModelConfig."""
    theirs: str
    """A key of config.json, and an attribute of transformers' configuration object."""
    read: Callable[[Any], Any] | None = None
    """Makes our value of transformers' configuration object; by default both are the same."""
    write: Callable[[ModelConfig], Any] | None = None
    """Makes the key's value of our settings; by default both are the same."""
    can_write: Callable[[ModelConfig], bool] = lambda config: True
    """Tells whether the key can hold our value."""
    values: tuple[Any, ...] = ()
    """Values of the key that are built; by default all that transformers' class accepts."""
    is_above_zero: bool = False
    """The key must be a finite number above 0, or null where transformers accepts that."""
    is_by_layer: bool = False
    """The key must be a list with an item for each layer; transformers passes over further ones."""

    def our_value(self, parsed: Any) -> Any:
        """Read our setting from transformers' configuration object."""
        return self.read(parsed) if self.read else getattr(parsed, self.theirs)

    def their_value(self, config: ModelConfig) -> Any:
        """Return what config.json says of our setting."""
        return self.write(config) if self.write else getattr(config, self.ours)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Describes an architecture of transformers in our names and theirs."""

    model_type: str
    """Its name in config.json, by which transformers finds its classes."""
    class_name: str
    """Its causal language model in transformers."""
    layer_names: Mapping[str, str]
    """A layer's parameters: our name -> theirs, after `layers.N.` and `model.layers.N.`. Weights
    are copied as they are: rotary embeddings use the same half-split form."""
    fixed: Mapping[str, Any]
    """Our settings that it always has -> their value, or a function that makes it of the
    hidden_size. They tell architectures apart."""
    settings: tuple[Setting, ...]
    """Our settings that a key of config.json holds."""
    windows: Windows = "none"
    has_two_ropes: bool = False
    """Layers with a window have a rotary embedding of their own: window_rotary_base."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys of config.json that would change the numbers -> the values that are built. An export
    writes the first."""
    harmless: frozenset[str] = frozenset()
    """Keys that change no number of this architecture, though they do of others."""
    older: frozenset[str] = frozenset()
    """Keys of older files that transformers' configuration class translates into the others."""

    def huggingface_name(self, name: str) -> str:
        """Translate layers.7.attention.q.weight to model.layers.7.self_attn.q_proj.weight."""
        match = LAYER_NAME.fullmatch(name)
        if match:
            return f"model.layers.{match[1]}.{self.layer_names[match[2]]}"
        return _TOP_NAMES[name]

    def our_name(self, name: str) -> str:
        """Translate model.layers.7.self_attn.q_proj.weight to layers.7.attention.q.weight.

        Folders of a base model, without a head, leave the prefix `model.` out.

        Raises:
            KeyError: a name that we do not have.
        """
        # A number with a leading zero would name the same layer twice.
        match = re.fullmatch(r"(?:model\.)?layers\.(0|[1-9]\d*)\.(.+)", name)
        if match:
            return f"layers.{match[1]}.{self._our_layer_names[match[2]]}"
        return _OUR_TOP_NAMES[name if name.startswith(("model.", "lm_head.")) else f"model.{name}"]

    @cached_property
    def _our_layer_names(self) -> dict[str, str]:
        """A layer's parameters: their name -> ours."""
        return {theirs: ours for ours, theirs in self.layer_names.items()}

    def fixed_settings(self, hidden_size: int) -> dict[str, Any]:
        """Return our settings that it always has."""
        return {
            name: value(hidden_size) if callable(value) else value
            for name, value in self.fixed.items()
        }


def part_of(name: str) -> str:
    """Return what a parameter is of its layer, or of the model: attention.q.weight of any layer."""
    match = LAYER_NAME.fullmatch(name)
    return match[2] if match else name


_OUR_TOP_NAMES = {theirs: ours for ours, theirs in _TOP_NAMES.items()}
