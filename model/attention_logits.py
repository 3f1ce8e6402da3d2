"""The largest attention logit of each query head: scale * (q . k), before any cap.

Kernels of attention keep their scores to themselves, so these are computed once more, by tiles that
are read and dropped: only pairs that are attended count, of one document, causal, inside the
window. In products it costs a half of attention's forward; a GPU takes longer, since it writes the
scores to its memory and reads them again (pretrain/planner/step_time.py).

Legend: n queries and s keys of a call, m query and k key/value heads, g = m / k query heads of a
key/value head, H head size; b queries of a block and c keys of a tile.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt

import torch

from model.attention_backends.documents import PackedDocuments
from model.attention_backends.tiled import wide_bmm
from model.scoring import Scoring

LEAST_QUERIES = 256
"""Queries of a block, whatever their documents are; a GPU may have more."""
LEAST_KEYS = 256
"""Keys of a tile, however many heads there are."""
KEYS_MULTIPLE_ON_GPU = 64
"""Keys of a tile come in multiples of this: each row of its scores begins at an aligned place, as
a GPU's fastest products ask of what they write."""
LEAST_SCORES = 1 << 22
"""Scores of a tile over all heads: 16 MiB in fp32."""
MOST_SCORES_ON_GPU = 1 << 25
"""Scores of a tile on a GPU: 128 MiB in fp32. At 3 TB/s it writes and reads them in 90 microseconds
(estimated, not measured), longer than a host needs for the three kernels of a tile; with tiles of
16 MiB it would wait for the host."""


@dataclass(frozen=True)
class TileSize:
    """Says how many queries and keys the scores of a tile are of, over all heads of a call."""

    queries: int
    keys: int

    @staticmethod
    def choose(
        queries: int, heads: int, head_size: int, itemsize: int, *, on_gpu: bool
    ) -> "TileSize":
        """Choose the tile of a call.

        On a GPU it grows with the attention's output, which does not exist yet when logits are
        measured: up to its size a tile makes no step's peak higher.

        Args:
            itemsize: bytes of an element of q.
        """
        if not on_gpu:
            keys = LEAST_SCORES // (heads * LEAST_QUERIES)
            return TileSize(LEAST_QUERIES, max(LEAST_KEYS, keys))
        # Scores are in at least fp32, and a mask of all heads may stand beside them.
        bytes_of_pair = heads * max(4, itemsize) + 1
        like_output = queries * heads * head_size * itemsize // bytes_of_pair
        least = LEAST_SCORES // heads
        pairs = min(max(least, like_output), MOST_SCORES_ON_GPU // heads)
        # About square: long blocks score pairs that are not attended, short ones read keys often.
        block = max(LEAST_QUERIES, isqrt(pairs) // LEAST_QUERIES * LEAST_QUERIES)
        keys = pairs // block // KEYS_MULTIPLE_ON_GPU * KEYS_MULTIPLE_ON_GPU
        return TileSize(block, max(LEAST_KEYS, keys))


class LargestLogits:
    """The largest logits of a step, by layer and query head of the whole model, on the device.

    A rank fills in its own layers and heads from its own tokens; the others stay at -inf. A maximum
    may be noted twice, so that forwards that run again change nothing.
    """

    def __init__(self, num_layers: int, num_heads: int, dtype: torch.dtype, device: torch.device):
        self.values_LN = torch.empty(num_layers, num_heads, dtype=dtype, device=device)
        self.clear()

    def clear(self) -> None:
        """Forget what was noted."""
        self.values_LN.fill_(float("-inf"))

    @torch.no_grad()
    def note(
        self,
        layer: int,
        first_head: int,
        q_smH: torch.Tensor,
        k_TkH: torch.Tensor,
        calls: Sequence[PackedDocuments],
        scoring: Scoring,
    ) -> None:
        """Measure attention calls of one layer.

        Args:
            first_head: number of the first query head among those of the whole model.
            calls: what `AttentionCore.attend_to` gets.
        """
        for call in calls:
            largest_m = largest_logits(q_smH[call.queries], k_TkH[call.keys], call, scoring)
            own_m = self.values_LN[layer, first_head : first_head + q_smH.shape[1]]
            torch.maximum(own_m, largest_m.to(own_m.dtype), out=own_m)


def largest_logits(
    q_nmH: torch.Tensor, k_skH: torch.Tensor, documents: PackedDocuments, scoring: Scoring
) -> torch.Tensor:
    """Return each query head's largest logit over the pairs of a call -> [m], at least fp32."""
    n, m, H = q_nmH.shape
    k = k_skH.shape[1]
    wide = torch.promote_types(q_nmH.dtype, torch.float32)
    largest_m = q_nmH.new_full((m,), float("-inf"), dtype=wide)
    size = TileSize.choose(n, m, H, q_nmH.itemsize, on_gpu=q_nmH.is_cuda)
    pairs = _SeenPairs(documents, scoring, q_nmH.device)
    k_kHs = k_skH.permute(1, 2, 0)
    for begin in range(0, n, size.queries):
        end = min(begin + size.queries, n)
        b = end - begin
        # [k, g b, H]: the query heads of a key/value head are rows of one product.
        q_krH = q_nmH[begin:end].unflatten(1, (k, m // k)).permute(1, 2, 0, 3).reshape(k, -1, H)
        for keys, is_hidden_bc in pairs.tiles(begin, end, size.keys):
            scores_mbc = wide_bmm(q_krH, k_kHs[..., keys]).view(m, b, -1)
            if is_hidden_bc is not None:
                scores_mbc.masked_fill_(is_hidden_bc, float("-inf"))
            torch.maximum(largest_m, scores_mbc.flatten(1).amax(1), out=largest_m)
            # Its memory is free before the next tile is made.
            del scores_mbc
    # The scale is above 0, so it may come last.
    return largest_m.mul_(scoring.factor(H))


class _SeenPairs:
    """Tells which keys of a call its queries see, without asking the device."""

    def __init__(self, documents: PackedDocuments, scoring: Scoring, device: torch.device):
        self.documents = documents
        self.scoring = scoring
        # A query's own key is this many rows further: keys came before the first query's own.
        self.earlier = documents.bounds_k[-1] - documents.bounds_q[-1]
        self.row_s = torch.arange(documents.bounds_k[-1], dtype=torch.int32, device=device)
        self.first_seen_n = self._first_seen_by_each()

    def _first_seen_by_each(self) -> torch.Tensor:
        """Return the row of the first key that each query sees [n]."""
        query_n = self.row_s[: self.documents.bounds_q[-1]]
        document_n = torch.searchsorted(self.documents.cu_q, query_n, right=True) - 1
        first_n = self.documents.cu_k[document_n]
        if self.scoring.window is None:
            return first_n
        in_window_n = query_n + (self.earlier - self.scoring.window + 1)
        return torch.maximum(first_n, in_window_n)

    def _first_seen(self, query: int) -> int:
        """Compute on the host what `first_seen_n` says of one query."""
        bounds = self.documents
        first = bounds.bounds_k[bisect_right(bounds.bounds_q, query) - 1]
        if self.scoring.window is None:
            return first
        return max(first, query + self.earlier - self.scoring.window + 1)

    def tiles(self, begin: int, end: int, size: int) -> Iterator[tuple[slice, torch.Tensor | None]]:
        """Yield the keys of each tile for queries [begin, end), and which of [b, c] are not seen.

        None = all are seen.

        Args:
            size: keys of a tile.
        """
        own = slice(begin + self.earlier, end + self.earlier)
        oldest_seen_by_all = self._first_seen(end - 1)
        for first in range(self._first_seen(begin), own.stop, size):
            keys = slice(first, min(first + size, own.stop))
            if first >= oldest_seen_by_all and keys.stop <= own.start + 1:
                yield keys, None
                continue
            key_c = self.row_s[keys]
            is_hidden_bc = key_c > self.row_s[own, None]
            is_hidden_bc |= key_c < self.first_seen_n[begin:end, None]
            yield keys, is_hidden_bc
