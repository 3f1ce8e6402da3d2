"""What a microbatch tells every layer of where its tokens are."""

from typing import NamedTuple

import torch

from model.attention_backends.documents import PackedDocuments


class Positions(NamedTuple):
    """Rotary tables of this rank's tokens, and the documents of its attention calls.

    Shapes: tables [t, H], for t tokens and heads of size H.
    """

    cos_tH: torch.Tensor
    sin_tH: torch.Tensor
    documents: list[PackedDocuments]
