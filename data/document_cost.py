"""What a document costs to compute: by its tokens, and by the pairs of tokens that attention sees.

Packed samples have the same number of tokens, and a long document in one of them has many times the
pairs of many short ones. The coefficients come from the model (pretrain/planner/model_size.py),
which this folder does not know.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numba
import numpy as np

NO_WINDOW = np.iinfo(np.int64).max
"""Stands for the window of a layer that sees its whole document, where numbers are needed."""


@dataclass(frozen=True)
class DocumentCost:
    """Computes the cost of documents from their lengths, in any one unit, usually FLOPs."""

    per_token: float
    per_document: float
    per_pair: float
    """Cost of a pair of tokens of which one sees the other, in one layer."""
    windows: tuple[tuple[int | None, int], ...]
    """Each window, and the number of layers that have it. A window is the number of tokens that a
    token sees, itself included; None = its document up to itself."""

    def of_documents(self, lengths: np.ndarray) -> np.ndarray:
        """Compute the cost of each document -> float64 [documents].

        Args:
            lengths: tokens of each, int64 [documents]; of a document that a sample cuts, the tokens
                in the sample.
        """
        # Each document is a sample of its own.
        begins = np.arange(len(lengths) + 1)
        return self.of_samples(lengths, begins)

    def of_samples(self, lengths: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """Add up the costs of the documents of each sample -> float64 [samples].

        Args:
            lengths: tokens of each document, sample after sample.
            begins: int64 [samples + 1]: where each sample begins in `lengths`.
        """
        costs = np.empty(len(begins) - 1)
        _add_costs(
            np.ascontiguousarray(lengths, dtype=np.int64),
            np.ascontiguousarray(begins, dtype=np.int64),
            (self.per_token, self.per_document, self.per_pair),
            self._limits,
            self._layers,
            costs,
        )
        return costs

    @cached_property
    def _limits(self) -> np.ndarray:
        """Tokens of each window, int64 [windows]."""
        limits = [NO_WINDOW if window is None else window for window, _ in self.windows]
        return np.array(limits, dtype=np.int64)

    @cached_property
    def _layers(self) -> np.ndarray:
        """How many layers have each window, float64 [windows]."""
        return np.array([count for _, count in self.windows], dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """Return the coefficients as JSON has them."""
        return asdict(self)

    @staticmethod
    def from_json(stored: dict[str, Any]) -> "DocumentCost":
        """Read what `to_json` returned, whether or not it was written as JSON meanwhile."""
        return DocumentCost(
            per_token=stored["per_token"],
            per_document=stored["per_document"],
            per_pair=stored["per_pair"],
            windows=tuple((window, count) for window, count in stored["windows"]),
        )


def count_windows(windows: Sequence[int | None]) -> tuple[tuple[int | None, int], ...]:
    """Count the layers that have each window, in the order in which windows first appear."""
    return tuple((window, windows.count(window)) for window in dict.fromkeys(windows))


@numba.njit(nogil=True, cache=True)
def _add_costs(lengths, begins, coefficients, limits, layers, costs):
    """Fill costs[i] with the sum over documents [begins[i], begins[i + 1])."""
    per_token, per_document, per_pair = coefficients
    for sample in range(len(costs)):
        tokens = 0
        pairs = 0.0
        for document in range(begins[sample], begins[sample + 1]):
            length = lengths[document]
            tokens += length
            for i in range(len(limits)):
                # Token t of a document, counted from 1, sees t tokens until the window is full, and
                # then as many as the window has.
                growing = float(min(length, limits[i]))
                full = float(length) - growing
                pairs += layers[i] * (growing * (growing + 1.0) / 2.0)
                if full > 0.0:
                    pairs += layers[i] * (full * limits[i])
        documents = begins[sample + 1] - begins[sample]
        costs[sample] = per_token * tokens + per_document * documents + per_pair * pairs
