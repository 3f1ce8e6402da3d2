"""What a rank does in attention, whether with all heads at once or by groups of them.

attention.py calls these steps once, attention_chunks.py once for each group of heads.

Legend: T tokens of a microbatch, t this context-parallel rank's slice, s those of its all-to-all
group (all T without a second level), D hidden, N query and K key/value heads of this tp rank, n and
k those of one call, m query heads after the exchange, H head size, r or R rows of some weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional as F

from model.activation_memory.saved_attention import AttentionTape, join
from model.attention_backends.backend import Attend
from model.attention_backends.documents import PackedDocuments
from model.layer_ropes import LayerRope
from model.norm_over_heads import norm_over_heads
from model.pointwise import HeadSizes, rms_norm, rotate, split_heads
from model.positions import Positions
from model.products import joined_linear
from model.scoring import Scoring
from parallel.context import gather_keys
from parallel.layout import Layout
from parallel.ulysses import HeadSplit


class Linear(Protocol):
    """A linear layer: x [t, D], weight [r, D], bias [r] -> [t, r]."""

    def __call__(
        self, x_tD: torch.Tensor, weight_rD: torch.Tensor, bias_r: torch.Tensor | None, /
    ) -> torch.Tensor: ...


class Linears(Protocol):
    """Several linear layers of one input: x [t, D], weights [r, D], bias [R] -> [t, R]."""

    def __call__(
        self,
        x_tD: torch.Tensor,
        weights: Sequence[torch.Tensor],
        bias_R: torch.Tensor | None,
        /,
    ) -> torch.Tensor: ...


class Projections(NamedTuple):
    """This tp rank's weights before the attention, for all heads or for some.

    Where they are for some heads, those of q may be None, or those of k and v.
    """

    q_rD: torch.Tensor | None
    k_rD: torch.Tensor | None
    v_rD: torch.Tensor | None
    q_bias: torch.Tensor | None
    k_bias: torch.Tensor | None
    v_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    sinks: torch.Tensor | None
    """A logit for each query head [n]; it comes with q."""


@dataclass(frozen=True)
class AttentionCore:
    """The steps from a layer's normed input to the attention's output, without the weights."""

    head_size: int
    epsilon: float
    """Epsilon of the norms of q and k."""
    attend: Attend
    scoring: Scoring
    rope: LayerRope
    layout: Layout
    number: int
    """Number of the layer in the whole model."""
    first_head: int
    """Number of this tp rank's first query head in the whole model."""
    kv_uses: list[int] | None
    """How many query heads read each key/value head, where an uneven split makes them differ.

    None = `attend` pairs query head i with key/value head i // group, and that is right."""
    norms_all_heads: bool = False
    """Norms of q and k are over all heads of all tp ranks at once, not over each."""

    def project(
        self,
        x_tD: torch.Tensor,
        positions: Positions,
        weights: Projections,
        linears: Linears = joined_linear,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Make q [t, N, H], k [t, K, H] and v [t, K, H].

        Args:
            linears: by default one product, whose gradient of x needs no sum of three.
        """
        # All heads of q, k and v side by side.
        q_rD, k_rD, v_rD, q_bias, k_bias, v_bias, q_norm, k_norm, _ = weights
        assert q_rD is not None and k_rD is not None and v_rD is not None
        bias_R = None
        if q_bias is not None and k_bias is not None and v_bias is not None:
            bias_R = torch.cat([q_bias, k_bias, v_bias])
        qkv_tR = linears(x_tD, [q_rD, k_rD, v_rD], bias_R)
        # Cut the product into heads, norm and rotate them.
        H = self.head_size
        heads = HeadSizes(q_rD.shape[0] // H, k_rD.shape[0] // H, H)
        if self.norms_all_heads:
            assert q_norm is not None and k_norm is not None
            return self._norm_all_heads(qkv_tR, heads, (q_norm, k_norm), positions)
        tables = positions.tables[self.rope]
        return split_heads(qkv_tR, heads, (q_norm, k_norm), self.epsilon, *tables)

    def _norm_all_heads(
        self,
        qkv_tR: torch.Tensor,
        heads: HeadSizes,
        norms: tuple[torch.Tensor, torch.Tensor],
        positions: Positions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Norm q and k over all heads, cut q, k and v into heads, and rotate q and k."""
        q_tnH, k_tkH, v_tkH = heads.split(qkv_tR)

        def norm_and_rotate(x_tnH: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            normed = norm_over_heads(x_tnH.flatten(1), weight, self.epsilon, self.layout.tp)
            return rotate(normed.view(x_tnH.shape), *positions.tables[self.rope])

        q_norm, k_norm = norms
        # Each with memory of its own.
        return norm_and_rotate(q_tnH, q_norm), norm_and_rotate(k_tkH, k_norm), v_tkH.clone()

    def project_q(
        self,
        x_tD: torch.Tensor,
        positions: Positions,
        weights: Projections,
        linear: Linear = F.linear,
    ) -> torch.Tensor:
        """Make q [t, n, H], as many heads as the weights have."""
        # Groups of heads project q apart from k and v, which several groups may share.
        assert weights.q_rD is not None
        q_tr = linear(x_tD, weights.q_rD, weights.q_bias)
        return self._norm_and_rotate(q_tr, weights.q_norm, positions)

    def project_k(
        self,
        x_tD: torch.Tensor,
        positions: Positions,
        weights: Projections,
        linear: Linear = F.linear,
    ) -> torch.Tensor:
        """Make k [t, k, H], as many heads as the weights have."""
        assert weights.k_rD is not None
        k_tr = linear(x_tD, weights.k_rD, weights.k_bias)
        return self._norm_and_rotate(k_tr, weights.k_norm, positions)

    def project_v(
        self, x_tD: torch.Tensor, weights: Projections, linear: Linear = F.linear
    ) -> torch.Tensor:
        """Make v [t, k, H], as many heads as the weights have."""
        assert weights.v_rD is not None
        return linear(x_tD, weights.v_rD, weights.v_bias).view(x_tD.shape[0], -1, self.head_size)

    def _norm_and_rotate(
        self, x_tr: torch.Tensor, norm: torch.Tensor | None, positions: Positions
    ) -> torch.Tensor:
        # The rows are those of q or of k, so their shape says how many heads there are.
        x_tnH = x_tr.view(x_tr.shape[0], -1, self.head_size)
        if norm is not None:
            assert not self.norms_all_heads, "no group has all heads"
            x_tnH = rms_norm(x_tnH, norm, self.epsilon)
        return rotate(x_tnH, *positions.tables[self.rope])

    def gather(self, k_skH: torch.Tensor, v_skH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all tokens."""
        return gather_keys(k_skH, v_skH, self.layout.cp_gather)

    def pair(self, k_TkH: torch.Tensor, v_TkH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as the kernel pairs them with the query heads."""
        if self.kv_uses is None:
            return k_TkH, v_TkH
        return _repeat_heads(k_TkH, self.kv_uses), _repeat_heads(v_TkH, self.kv_uses)

    def sinks_here(self, sinks_n: torch.Tensor | None, split: HeadSplit) -> torch.Tensor | None:
        """Return the sinks of the query heads that this rank attends with after the exchange.

        Args:
            sinks_n: of the call's heads, in the order of the exchange that `split` describes.
        """
        if sinks_n is None:
            return None
        start, stop = split.query[self.layout.cp_a2a.rank]
        return sinks_n[start:stop]

    def measure_logits(
        self, q_smH: torch.Tensor, k_TkH: torch.Tensor, positions: Positions, first_head: int
    ) -> None:
        """Note the largest logits of what `attend_to` gets, where they are asked for.

        Args:
            first_head: number of the first query head among those of this tp rank.
        """
        if positions.logits is not None:
            head = self.first_head + first_head
            documents = positions.documents
            positions.logits.note(self.number, head, q_smH, k_TkH, documents, self.scoring)

    def attend_to(
        self,
        q_smH: torch.Tensor,
        k_TkH: torch.Tensor,
        v_TkH: torch.Tensor,
        calls: list[PackedDocuments],
        tape: AttentionTape | None,
        sinks_m: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend with the group's queries to the keys of all tokens -> [s, m, H].

        Args:
            sinks_m: `sinks_here`.
            calls: an attention call each, whose queries together are all of q.
            tape: keeps the calls' results, or has them.
        """

        def attend_in_parts(
            q_smH: torch.Tensor,
            k_TkH: torch.Tensor,
            v_TkH: torch.Tensor,
            sinks_m: torch.Tensor | None = None,
        ) -> list[torch.Tensor]:
            if len(calls) == 1:
                # All rows: even a slice of all of them copies the gradients once more.
                return [self.attend(q_smH, k_TkH, v_TkH, calls[0], self.scoring, sinks_m)]
            # Each range of queries attends to the keys up to its own end.
            return [
                self.attend(
                    q_smH[each.queries],
                    k_TkH[each.keys],
                    v_TkH[each.keys],
                    each,
                    self.scoring,
                    sinks_m,
                )
                for each in calls
            ]

        if tape is None:
            return join(attend_in_parts(q_smH, k_TkH, v_TkH, sinks_m))
        return tape.attend(attend_in_parts, q_smH, k_TkH, v_TkH, sinks_m)


def _repeat_heads(x_TkH: torch.Tensor, uses: list[int]) -> torch.Tensor:
    """Repeat each head as often as it is used.

    repeat_interleave adds up the gradients in no fixed order on a GPU.
    """
    heads = zip(x_TkH.split(1, dim=1), uses, strict=True)
    return torch.cat([head.expand(-1, count, -1) for head, count in heads], dim=1)
