"""The largest attention logit of each query head: scale * (q . k), before any cap.

Kernels of attention keep their scores to themselves, so these are computed once more, by tiles that
are read and dropped: only pairs that are attended count, of one document, causal, inside the
window. It costs a half of attention's forward in products, more where a device writes scores slower
than it multiplies, and the memory of a tile.

Legend: n queries and s keys of a call, m query and k key/value heads, g = m / k query heads of a
key/value head, H head size; b queries of a block and c keys of a tile; L layers and N query heads
of the whole model.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import torch

from model.attention_backends.documents import PackedDocuments
from model.attention_backends.tiled import wide_bmm
from model.scoring import Scoring

BLOCK_QUERIES = 256
"""Queries of a block, whatever their documents are."""
TILE_SCORES = 1 << 22
"""Scores of a tile over all heads: in fp32 16 MiB, which a data-center GPU keeps in its cache."""
LEAST_KEYS = 256
"""Keys of a tile, however many heads there are."""


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
    first_seen_n = _first_seen(n, documents, scoring, q_nmH.device)
    k_kHs = k_skH.permute(1, 2, 0)
    for begin in range(0, n, BLOCK_QUERIES):
        end = min(begin + BLOCK_QUERIES, n)
        b = end - begin
        # [k, g b, H]: the query heads of a key/value head are rows of one product.
        q_krH = q_nmH[begin:end].unflatten(1, (k, m // k)).permute(1, 2, 0, 3).reshape(k, -1, H)
        for keys, is_hidden_bc in _tiles(begin, end, m, first_seen_n, documents, scoring):
            scores_mbc = wide_bmm(q_krH, k_kHs[..., keys]).view(m, b, -1)
            if is_hidden_bc is not None:
                scores_mbc.masked_fill_(is_hidden_bc, float("-inf"))
            torch.maximum(largest_m, scores_mbc.flatten(1).amax(1), out=largest_m)
    # The scale is above 0, so it may come last.
    return largest_m.mul_(scoring.factor(H))


def _first_seen(
    n: int, documents: PackedDocuments, scoring: Scoring, device: torch.device
) -> torch.Tensor:
    """Return the row of the first key that each query sees [n], without asking the device."""
    query_n = torch.arange(n, dtype=torch.int32, device=device)
    document_n = torch.searchsorted(documents.cu_q, query_n, right=True) - 1
    first_n = documents.cu_k[document_n]
    if scoring.window is None:
        return first_n
    in_window_n = query_n + (_earlier_keys(documents) - scoring.window + 1)
    return torch.maximum(first_n, in_window_n)


def _tiles(
    begin: int,
    end: int,
    heads: int,
    first_seen_n: torch.Tensor,
    documents: PackedDocuments,
    scoring: Scoring,
) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Yield the keys of each tile for queries [begin, end), and which of [b, c] are not seen.

    None = all are seen.
    """
    earlier = _earlier_keys(documents)

    def first_seen(query: int) -> int:
        """Compute on the host what `first_seen_n` says of one query."""
        first = documents.bounds_k[bisect_right(documents.bounds_q, query) - 1]
        if scoring.window is None:
            return first
        return max(first, query + earlier - scoring.window + 1)

    size = max(LEAST_KEYS, TILE_SCORES // (heads * BLOCK_QUERIES))
    stop = end + earlier
    oldest_seen_by_all = first_seen(end - 1)
    for first in range(first_seen(begin), stop, size):
        last = min(first + size, stop)
        if first >= oldest_seen_by_all and last <= begin + earlier + 1:
            yield slice(first, last), None
            continue
        key_c = torch.arange(first, last, dtype=torch.int32, device=first_seen_n.device)
        own_b1 = torch.arange(begin + earlier, stop, dtype=torch.int32, device=key_c.device)[
            :, None
        ]
        is_hidden_bc = (key_c > own_b1) | (key_c < first_seen_n[begin:end, None])
        yield slice(first, last), is_hidden_bc


def _earlier_keys(documents: PackedDocuments) -> int:
    """Count the keys before the first query's own: a query's own key is this many rows further."""
    return documents.bounds_k[-1] - documents.bounds_q[-1]
