"""What a microbatch tells every layer of where its tokens are."""

from typing import NamedTuple

import torch

from model.attention_backends.documents import PackedDocuments
from model.attention_logits import LargestLogits
from model.key_cache import KeyCache
from model.layer_ropes import LayerRope


class RotaryTables(NamedTuple):
    """Cosines and sines of the angles by which the heads of t tokens are turned."""

    cos_tH: torch.Tensor
    sin_tH: torch.Tensor

    @staticmethod
    def without_turning(
        positions_t: torch.Tensor, head_size: int, dtype: torch.dtype
    ) -> "RotaryTables":
        """Return tables of the angle 0, which leave a head as it is, bit for bit."""
        # Views of one number: they take no memory.
        shape = (positions_t.shape[0], head_size)
        one = torch.ones((), dtype=dtype, device=positions_t.device)
        return RotaryTables(one.expand(shape), torch.zeros_like(one).expand(shape))


class Positions:
    """Rotary tables of this rank's tokens, and the documents of its attention calls.

    It is a plain class on purpose: FSDP2 looks for gradients in whatever tuples and dataclasses a
    layer is given, and would walk through the bounds of all documents, twice in each layer.
    """

    def __init__(
        self,
        tables: dict[LayerRope, RotaryTables],
        documents: list[PackedDocuments],
        cache: KeyCache | None = None,
        logits: LargestLogits | None = None,
    ):
        """
        Args:
            tables: those that the layers of this stage use.
            cache: keeps the keys and values while a model generates; None in training.
            logits: gets the largest attention logits, where they are measured.
        """
        self.tables = tables
        self.documents = documents
        self.cache = cache
        self.logits = logits

    def without_logits(self) -> "Positions":
        """Return the same, for a pass that measures no logits."""
        return Positions(self.tables, self.documents, self.cache)
