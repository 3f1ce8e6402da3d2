"""Causal self-attention: heads split over tp, tokens over cp (Ulysses), documents kept apart.

    x_tD -> q_tNH, k_tKH, v_tKH -> (norms, rope) -> (seq_to_heads) -> attend -> (heads_to_seq) ->
    o_tNH -> o

In chunks (`head_chunks` > 1) the line is walked once per group of query heads, and again for each
group in backward, so that q, k and v of all heads never exist at once.

Legend: T tokens of a microbatch, t this context-parallel rank's slice, s those of its all-to-all
group (all T without a second level), D hidden, N query and K key/value heads of this tp rank, n and
k those of a chunk or round, m heads after the exchange, H head size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from model.activation_memory.saved_attention import AttentionTape, empty, join
from model.attention_backends.backend import Attend
from model.attention_backends.documents import PackedDocuments
from model.attention_chunks import attend_in_chunks
from model.config import ModelConfig
from model.parts import RMSNorm, Weight, enter_tensor_parallel, leave_tensor_parallel
from model.pointwise import HeadSizes, rms_norm, rotate, split_heads
from model.products import joined_linear
from parallel.context import gather_keys
from parallel.layout import Layout
from parallel.ulysses import HeadSplit, head_rounds, heads_to_seq, seq_to_heads

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(x [t, D], weight [r, D], bias [r]) -> [t, r]."""


class Positions(NamedTuple):
    """What a microbatch tells every layer."""

    cos_tH: torch.Tensor
    sin_tH: torch.Tensor
    documents: list[PackedDocuments]


class Projections(NamedTuple):
    """This tp rank's weights before the attention."""

    q_rD: torch.Tensor
    k_rD: torch.Tensor
    v_rD: torch.Tensor
    q_bias: torch.Tensor | None
    k_bias: torch.Tensor | None
    v_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layout: Layout, attend: Attend):
        super().__init__()
        D = config.hidden_size
        H = config.head_size
        tp = layout.tp
        heads = config.num_attention_heads
        kv_heads = config.num_kv_heads
        self.q = Weight(heads * H, D, config.add_qkv_bias)
        self.k = Weight(kv_heads * H, D, config.add_qkv_bias)
        self.v = Weight(kv_heads * H, D, config.add_qkv_bias)
        self.o = Weight(D, heads * H)
        self.q_norm = RMSNorm(H, config.norm_epsilon) if config.qk_layernorm else None
        self.k_norm = RMSNorm(H, config.norm_epsilon) if config.qk_layernorm else None
        self.head_size = H
        self.layout = layout
        self.attend = attend
        self.epsilon = config.norm_epsilon
        self.kv_rows: slice | None = None
        if kv_heads < tp.size:
            # The weights of all key/value heads are here; this rank's queries read one of them.
            head = tp.rank * kv_heads // tp.size
            self.kv_rows = slice(head * H, (head + 1) * H)
        self.split = HeadSplit.make(
            heads // tp.size, max(1, kv_heads // tp.size), layout.cp_a2a.size
        )
        # `attend` pairs query head i with key/value head i // group; an uneven split may need its
        # own pairing.
        pairing = self.split.kv_of_query(layout.cp_a2a.rank)
        uses = [pairing.count(head) for head in range(pairing[-1] + 1)]
        self.kv_uses = uses if len(set(uses)) > 1 else None

    def forward(
        self, x_tD: torch.Tensor, positions: Positions, head_chunks: int, tape: AttentionTape | None
    ) -> torch.Tensor:
        """Args:
        x_tD: normed; [t / tp, D] under Megatron-SP.
        head_chunks: groups of query heads, a number out of parallel/ulysses.py: chunk_counts.
        tape: keeps the attention's results, or has them.
        """
        x_tD = enter_tensor_parallel(x_tD, self.layout)
        weights = self._projections()
        if head_chunks > 1:
            o_tNH = attend_in_chunks(
                self, x_tD, positions, head_rounds(self.split, head_chunks), tape, weights
            )
        else:
            q_smH, *kv_skH = seq_to_heads(
                *self.project(x_tD, positions, weights), self.split, self.layout.cp_a2a
            )
            kv_TkH = self.gather(*kv_skH)
            o_smH = self.attend_to(q_smH, *kv_TkH, positions.documents, tape)
            if tape is not None and not tape.playing:
                empty(q_smH, *kv_TkH)
            o_tNH = heads_to_seq(o_smH, self.split, self.layout.cp_a2a)
        return leave_tensor_parallel(self.o(o_tNH.reshape(x_tD.shape[0], -1)), self.layout)

    def _projections(self) -> Projections:
        def rows(x: torch.Tensor | None) -> torch.Tensor | None:
            return x if x is None or self.kv_rows is None else x[self.kv_rows]

        return Projections(
            self.q.local_weight(),
            rows(self.k.local_weight()),
            rows(self.v.local_weight()),
            self.q.local_bias(),
            rows(self.k.local_bias()),
            rows(self.v.local_bias()),
            *(None if norm is None else norm.local_weight() for norm in (self.q_norm, self.k_norm)),
        )

    def project(
        self, x_tD: torch.Tensor, positions: Positions, weights: Projections
    ) -> tuple[torch.Tensor, ...]:
        """q [t, N, H], k [t, K, H] and v [t, K, H] by one product, whose gradient of x needs no sum
        of three."""
        bias_R = None
        if weights.q_bias is not None:
            bias_R = torch.cat([weights.q_bias, weights.k_bias, weights.v_bias])
        qkv_tR = joined_linear(x_tD, [weights.q_rD, weights.k_rD, weights.v_rD], bias_R)
        H = self.head_size
        heads = HeadSizes(weights.q_rD.shape[0] // H, weights.k_rD.shape[0] // H, H)
        return split_heads(
            qkv_tR,
            heads,
            (weights.q_norm, weights.k_norm),
            self.epsilon,
            positions.cos_tH,
            positions.sin_tH,
        )

    def project_q(
        self,
        x_tD: torch.Tensor,
        positions: Positions,
        weights: Projections,
        linear: Linear = F.linear,
    ) -> torch.Tensor:
        """-> [t, n, H], as many heads as the weights have."""
        return self._norm_and_rotate(
            linear(x_tD, weights.q_rD, weights.q_bias), weights.q_norm, positions
        )

    def project_k(
        self,
        x_tD: torch.Tensor,
        positions: Positions,
        weights: Projections,
        linear: Linear = F.linear,
    ) -> torch.Tensor:
        return self._norm_and_rotate(
            linear(x_tD, weights.k_rD, weights.k_bias), weights.k_norm, positions
        )

    def project_v(
        self, x_tD: torch.Tensor, weights: Projections, linear: Linear = F.linear
    ) -> torch.Tensor:
        return linear(x_tD, weights.v_rD, weights.v_bias).view(x_tD.shape[0], -1, self.head_size)

    def _norm_and_rotate(
        self, x_tr: torch.Tensor, norm: torch.Tensor | None, positions: Positions
    ) -> torch.Tensor:
        x_tnH = x_tr.view(x_tr.shape[0], -1, self.head_size)
        if norm is not None:
            x_tnH = rms_norm(x_tnH, norm, self.epsilon)
        return rotate(x_tnH, positions.cos_tH, positions.sin_tH)

    def gather(self, k_skH: torch.Tensor, v_skH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens, as the kernel pairs them with this rank's query heads."""
        k_TkH, v_TkH = gather_keys(k_skH, v_skH, self.layout.cp_gather)
        if self.kv_uses is not None:
            k_TkH, v_TkH = (_repeat_heads(x, self.kv_uses) for x in (k_TkH, v_TkH))
        return k_TkH, v_TkH

    def attend_to(
        self,
        q_smH: torch.Tensor,
        k_TkH: torch.Tensor,
        v_TkH: torch.Tensor,
        segments: list[PackedDocuments],
        tape: AttentionTape | None,
    ) -> torch.Tensor:
        """The queries of this rank's group of tokens against the keys of all tokens -> [s, m,
        H]."""

        def call(
            q_smH: torch.Tensor, k_TkH: torch.Tensor, v_TkH: torch.Tensor
        ) -> list[torch.Tensor]:
            if (
                len(segments) == 1
            ):  # all rows: even a slice of all of them copies the gradients once more
                return [self.attend(q_smH, k_TkH, v_TkH, segments[0])]
            return [
                self.attend(q_smH[part.queries], k_TkH[part.keys], v_TkH[part.keys], part)
                for part in segments
            ]

        return (
            join(call(q_smH, k_TkH, v_TkH))
            if tape is None
            else tape.attend(call, q_smH, k_TkH, v_TkH)
        )


def _repeat_heads(x_TkH: torch.Tensor, uses: list[int]) -> torch.Tensor:
    """Each head so many times; repeat_interleave adds up the gradients in no fixed order on a
    GPU."""
    heads = zip(x_TkH.split(1, dim=1), uses, strict=True)
    return torch.cat([head.expand(-1, count, -1) for head, count in heads], dim=1)
