"""Keys and values of the tokens before, kept while a model generates.

After the exchange over context parallelism a rank has the keys and values of all tokens for its
heads: those are kept, so that the cache of a sequence is split over tp and cp as its attention is.
A layer with a window of W tokens keeps the last W of each sequence in a ring: the token at position
p lies in slot p % W. Other layers have a slot for every position.

Legend: b sequences, C slots of a layer, c those in use; T tokens of packed texts; m query and k
key/value heads of this rank, g query heads that read one key/value head, H head size.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch.nn import functional as F

from model.config import ModelConfig
from model.scoring import Scoring
from model.windows import Window
from parallel.ulysses import HeadSplit


class Places:
    """Says where the next token of each sequence goes, and which slots are seen, for all layers."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.lengths = list(lengths)
        """Tokens of each sequence before the next one."""
        self.device = device
        self.positions_b = torch.tensor(self.lengths, dtype=torch.int64, device=device)
        self._slots: dict[int, int | torch.Tensor] = {}
        self._masks: dict[int, torch.Tensor | None] = {}

    def slots_of(self, capacity: int) -> int | torch.Tensor:
        """Return the slot of each sequence's next token [b], or the one that all of them take."""
        if capacity not in self._slots:
            slots = [length % capacity for length in self.lengths]
            is_one = len(set(slots)) == 1
            self._slots[capacity] = slots[0] if is_one else torch.tensor(slots, device=self.device)
        return self._slots[capacity]

    def used_of(self, capacity: int) -> int:
        """Count the slots that are in use once the next tokens are there."""
        return min(capacity, max(self.lengths) + 1)

    def mask_of(self, capacity: int) -> torch.Tensor | None:
        """Say which slots each sequence sees [b, 1, 1, c]; None where all see all of them."""
        if capacity not in self._masks:
            used = self.used_of(capacity)
            # A ring that has gone round is full, and all of it is seen.
            is_full = min(self.lengths) + 1 >= used
            slots = torch.arange(used, device=self.device)
            mask = None if is_full else slots <= self.positions_b[:, None]
            self._masks[capacity] = mask if mask is None else mask[:, None, None, :]
        return self._masks[capacity]


class LayerCache:
    """Keys and values of one layer: [b, k, C, H] each."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        scoring: Scoring,
        padding: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ):
        """
        Args:
            shape: sequences, key/value heads, slots, head size.
            padding: query heads of other ranks before and after this rank's, that read the same
                key/value heads.
        """
        # Numbers, also where nothing is kept yet: masked slots count 0 times what they hold.
        self.keys_bkCH = torch.zeros(shape, dtype=dtype, device=device)
        self.values_bkCH = torch.zeros(shape, dtype=dtype, device=device)
        self.scoring = scoring
        self.padding = padding

    @property
    def capacity(self) -> int:
        """Tokens of a sequence that are kept at most."""
        return self.keys_bkCH.shape[2]

    def fill(self, k_TkH: torch.Tensor, v_TkH: torch.Tensor, edges: Sequence[int]) -> None:
        """Keep the tokens of packed texts, each as far as this layer looks back.

        Args:
            edges: where each text begins, and the end of the last.
        """
        for row, (begin, end) in enumerate(pairwise(edges)):
            kept = min(end - begin, self.capacity)
            slots = torch.arange(end - begin - kept, end - begin, device=k_TkH.device)
            slots %= self.capacity
            for cache, x_TkH in ((self.keys_bkCH, k_TkH), (self.values_bkCH, v_TkH)):
                cache[row, :, slots] = x_TkH[end - kept : end].transpose(0, 1)

    def attend(
        self,
        q_bmH: torch.Tensor,
        k_bkH: torch.Tensor,
        v_bkH: torch.Tensor,
        places: Places,
        sinks_m: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Keep the next token of each sequence, and attend with it to what is kept -> [b, m, H].

        Args:
            sinks_m: a logit for each query head, one more term in the sum of its softmax.
        """
        slots = places.slots_of(self.capacity)
        rows: slice | torch.Tensor = slice(None)
        if isinstance(slots, torch.Tensor):
            rows = torch.arange(len(slots), device=slots.device)
        self.keys_bkCH[rows, :, slots] = k_bkH
        self.values_bkCH[rows, :, slots] = v_bkH

        # The query heads of one key/value head are rows of one product.
        used = places.used_of(self.capacity)
        keys_bkcH = self.keys_bkCH[:, :, :used]
        values_bkcH = self.values_bkCH[:, :, :used]
        q_bkgH = self._by_key_head(q_bmH, 1)
        mask = places.mask_of(self.capacity)
        if sinks_m is None and self.scoring.softcap is None:
            scale = self.scoring.factor(q_bmH.shape[2])
            out = F.scaled_dot_product_attention(
                q_bkgH, keys_bkcH, values_bkcH, attn_mask=mask, scale=scale
            )
        else:
            sinks_kg1 = None if sinks_m is None else self._by_key_head(sinks_m[:, None], 0)
            out = self._attend_as_written(q_bkgH, keys_bkcH, values_bkcH, mask, sinks_kg1)
        before, _ = self.padding
        return out.flatten(1, 2)[:, before : before + q_bmH.shape[1]]

    def _by_key_head(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Split the dim of this rank's query heads into [k, g]; heads of other ranks are 0."""
        padded = F.pad(x, (0, 0, *self.padding)) if any(self.padding) else x
        return padded.unflatten(dim, (self.keys_bkCH.shape[1], -1))

    def _attend_as_written(
        self,
        q_bkgH: torch.Tensor,
        keys_bkcH: torch.Tensor,
        values_bkcH: torch.Tensor,
        mask: torch.Tensor | None,
        sinks_kg1: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute what model/scoring.py says, for scores that torch's SDPA does not have."""
        wide = torch.promote_types(q_bkgH.dtype, torch.float32)
        scores_bkgc = (q_bkgH @ keys_bkcH.transpose(-1, -2)).to(wide)
        scores_bkgc *= self.scoring.factor(q_bkgH.shape[3])
        cap = self.scoring.softcap
        if cap is not None:
            scores_bkgc = scores_bkgc.div_(cap).tanh_().mul_(cap)
        if mask is not None:
            scores_bkgc = scores_bkgc.masked_fill_(~mask, float("-inf"))
        if sinks_kg1 is not None:
            column = sinks_kg1.to(wide).expand(*scores_bkgc.shape[:3], 1)
            scores_bkgc = torch.cat([scores_bkgc, column], dim=3)
        shares_bkgc = scores_bkgc.softmax(dim=3)[..., : keys_bkcH.shape[2]]
        return shares_bkgc.to(values_bkcH.dtype) @ values_bkcH

    def keep(self, rows_b: torch.Tensor) -> None:
        """Go on with some of the sequences, in this order."""
        self.keys_bkCH = self.keys_bkCH[rows_b]
        self.values_bkCH = self.values_bkCH[rows_b]


class KeyCache:
    """Keys and values of every layer, for sequences that grow together."""

    def __init__(
        self,
        config: ModelConfig,
        split: HeadSplit,
        rank: int,
        lengths: Sequence[int],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """
        Args:
            split: of the heads of a tp rank over the ranks of an all-to-all.
            rank: this one's number among them.
            lengths: tokens of each prompt.
            capacity: tokens that the longest sequence will have at most.
        """
        k0, k1 = split.kv[rank]
        self.layers = {
            number: LayerCache(
                (
                    len(lengths),
                    k1 - k0,
                    slots_of_window(scoring.window, capacity),
                    config.head_size,
                ),
                scoring,
                split.query_padding(rank),
                dtype,
                device,
            )
            for number, scoring in enumerate(config.scorings)
        }
        self.device = device
        self.lengths = list(lengths)
        self.places: Places | None = None
        """Where the next token goes; None while prompts are read."""

    def fill(self, number: int, k_TkH: torch.Tensor, v_TkH: torch.Tensor) -> None:
        """Keep the prompts, packed one after the other, in layer `number`."""
        edges = [0, *accumulate(self.lengths)]
        self.layers[number].fill(k_TkH, v_TkH, edges)

    def begin_step(self) -> Places:
        """Take one more token of each sequence from here on."""
        self.places = Places(self.lengths, self.device)
        return self.places

    def end_step(self) -> None:
        """Count the token that every layer has kept."""
        self.lengths = [length + 1 for length in self.lengths]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the sequences, in this order."""
        rows_b = torch.tensor(rows, device=self.device)
        for layer in self.layers.values():
            layer.keep(rows_b)
        self.lengths = [self.lengths[row] for row in rows]


def slots_of_window(window: Window, capacity: int) -> int:
    """Return how many tokens of a sequence a layer keeps."""
    return capacity if window is None else min(window, capacity)


def cache_bytes(
    config: ModelConfig, kv_heads: int, sequences: int, capacity: int, dtype: torch.dtype
) -> int:
    """Count the bytes of the cache on a rank that attends with `kv_heads` key/value heads."""
    slots = sum(slots_of_window(scoring.window, capacity) for scoring in config.scorings)
    return 2 * slots * sequences * kv_heads * config.head_size * dtype.itemsize
