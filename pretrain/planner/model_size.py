"""How large a model is: its parameters by part, and the floating-point operations of a step.

Everything that counts parameters reads them here. Shapes are those of the modules themselves, made
on the meta device, so that a new parameter is counted everywhere at once.
"""

from dataclasses import replace
from functools import cached_property
from math import prod

from data.document_cost import DocumentCost, count_windows
from model.build import parameter_shapes
from model.config import ModelConfig
from model.hf.architecture import VOCABULARY_ROWS

QKV = ("attention.q", "attention.k", "attention.v")
"""The layer's projections before its attention kernel."""
ATTENTION_OUTPUT = ("attention.o",)
"""The layer's projection after its attention kernel."""
MLP = ("mlp.gate", "mlp.up", "mlp.down")
"""The layer's products after its attention."""
KERNEL_TILE = 128
"""Queries, and keys, that attention kernels take together."""
HALF_EMPTY_PAIRS = 5 * KERNEL_TILE**2 // 12
"""Pairs that kernels compute for each document, beyond those that grow with its length.

A causal document of n tiles takes n (n + 1) / 2 of them. Let its length be l tiles, and n = l + u,
where u is what rounding up adds. Then it takes l^2 / 2 tiles, which are its pairs, and beyond them
l (u + 1/2) + (u^2 + u) / 2. Lengths have no pattern, so that u lies anywhere between 0 and 1
whatever l is: u is 1/2 on average, and u^2 is 1/3. That leaves l, which is the same for all samples
of as many tokens, and 5/12 of a tile for each document."""


class ModelSize:
    """Counts a model's parameters and a step's floating-point operations."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        self.config = config
        self.vocab_size = vocab_size

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, of one layer and what stands around the layers, padded rows included."""
        one_layer = replace(self.config, num_layers=1)
        shapes = parameter_shapes(one_layer, self.vocab_size)
        return {name: tuple(shape) for name, shape in shapes.items()}

    @property
    def num_parameters(self) -> int:
        """All weights, the padded rows of the vocabulary left out."""
        layer = 0
        around = 0
        for name, (rows, *row) in self.shapes.items():
            if name.startswith("layers."):
                layer += rows * prod(row)
            else:
                around += (self.vocab_size if name in VOCABULARY_ROWS else rows) * prod(row)
        return self.config.num_layers * layer + around

    def layer_weights(self, *modules: str) -> int:
        """Count the weights of a layer's modules, for example of QKV."""
        return sum(prod(self.shapes[f"layers.0.{module}.weight"]) for module in modules)

    def step_flops(self, tokens: int, causal_pairs: float) -> float:
        """Count the model FLOPs of forward and backward, without what is recomputed.

        Args:
            causal_pairs: pairs of tokens of which one sees the other: the sum over documents of
                length * (length + 1) / 2.
        """
        return self.document_cost.per_token * tokens + self.pair_flops * causal_pairs

    @property
    def pair_flops(self) -> float:
        """FLOPs of forward and backward for a pair of tokens that all layers see."""
        return self.config.num_layers * self.document_cost.per_pair

    @cached_property
    def document_cost(self) -> DocumentCost:
        """What documents add to a step, in FLOPs of forward and backward (`step_flops`)."""
        config = self.config
        layer = self.layer_weights(*QKV, *ATTENTION_OUTPUT, *MLP)
        weights = config.num_layers * layer + self.vocab_size * config.hidden_size
        # Two products per pair, of queries with keys and of scores with values, each with a
        # multiplication and an addition; a backward is two forwards.
        per_pair = 3.0 * 4 * config.num_attention_heads * config.head_size
        return DocumentCost(
            per_token=6.0 * weights,
            per_document=config.num_layers * per_pair * HALF_EMPTY_PAIRS,
            per_pair=per_pair,
            windows=count_windows(config.windows),
        )


def document_cost_of(config: ModelConfig, vocab_size: int) -> DocumentCost:
    """Make the cost of documents for a model, in FLOPs."""
    return ModelSize(config, vocab_size).document_cost
