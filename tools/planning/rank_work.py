"""At which shapes a machine is measured: those of one rank of a run, and nothing else of it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from model.config import ModelConfig
from pretrain.planner.model_size import ATTENTION_OUTPUT, MLP, QKV, ModelSize

LAYERS = 2
"""Layers that run together; one alone would find its weights in a cache."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Says at which shapes a machine is measured, and for how long."""

    layers: int
    """Layers of a rank."""
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocabulary_rows: int
    """Rows of the output projection on this rank."""
    loss_tokens: int
    """Tokens whose logits are there at once."""
    tokens: int
    """Tokens that a process has at once."""
    document_tokens: int
    """Tokens of each of their documents; the last one may be shorter."""
    dtype: Literal["bfloat16", "float32"]
    attention_backend: str
    gathered_elements: int
    """Elements of a layer's parameters, which are gathered and reduced."""
    around_elements: int
    """The same of the parameters around the layers."""
    exchanged_elements: int
    """Elements of a layer's activations, which are traded."""
    buffer_bytes: int = 64 << 20
    """Size of what is copied."""
    seconds: float = 0.5
    """Time for each measurement."""

    @property
    def config(self) -> ModelConfig:
        """The model whose layers run: at the run's shapes, with Llama's parts."""
        return ModelConfig(
            num_layers=LAYERS,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
        )

    @property
    def units(self) -> list[tuple[int, int]]:
        """Elements of the units that are gathered and reduced, and how many there are."""
        return [(self.gathered_elements, self.layers), (self.around_elements, 1)]

    @property
    def layer_shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of the weights of one layer's products."""
        shapes = ModelSize(self.config, self.vocabulary_rows).shapes
        names = (*QKV, *ATTENTION_OUTPUT, *MLP)
        return [(rows, row) for rows, row in (shapes[f"layers.0.{n}.weight"] for n in names)]

    @property
    def layer_product_flops(self) -> int:
        """FLOPs of one layer's products: a forward, and a backward of two."""
        return sum(6 * self.tokens * rows * columns for rows, columns in self.layer_shapes)

    def bounds(self, tokens: int) -> np.ndarray:
        """Return where the documents of some tokens begin, and the end: int32 [documents + 1]."""
        starts = np.arange(0, tokens, self.document_tokens, dtype=np.int32)
        return np.append(starts, np.int32(tokens))

    @property
    def layer_attention_flops(self) -> int:
        """FLOPs of one layer's attention, the causal half; a backward counts as two forwards."""
        config = self.config
        lengths = np.diff(self.bounds(self.tokens))
        pairs = int((lengths * (lengths + 1) // 2).sum())
        return 3 * 4 * config.num_attention_heads * config.head_size * pairs
