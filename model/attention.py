"""Causal self-attention: heads split over tp, tokens over cp (Ulysses), documents kept apart.

    x_tD -> q_tNH, k_tKH, v_tKH -> (norms, rope) -> (seq_to_heads) -> attend -> (heads_to_seq) ->
    o_tNH -> o

In chunks (`head_chunks` > 1) the line is walked once per group of query heads, and again for each
group in backward, so that q, k and v of all heads never exist at once.

While a model generates, the keys and values of a prompt are kept after the exchange, and each token
after it attends to those (key_cache.py).

Legend: see attention_core.py.
"""

import torch
from torch import nn

from model.activation_memory.saved_attention import AttentionTape, free_storage
from model.attention_backends.backend import Attend
from model.attention_chunks import attend_in_chunks
from model.attention_core import AttentionCore, Projections
from model.config import ModelConfig
from model.key_cache import KeyCache
from model.parts import RMSNorm, Weight, enter_tensor_parallel, leave_tensor_parallel
from model.positions import Positions
from model.products import linears_side_by_side
from parallel.layout import Layout
from parallel.tensor import local_part
from parallel.ulysses import HeadSplit, gather_heads, head_rounds, heads_to_seq, seq_to_heads


class Attention(nn.Module):
    """A layer's attention: projections, exchange, kernel, exchange back, output projection."""

    def __init__(self, config: ModelConfig, layout: Layout, attend: Attend, number: int):
        """
        Args:
            number: of the layer in the whole model, from 0.
        """
        super().__init__()
        D = config.hidden_size
        H = config.head_size
        tp = layout.tp
        heads = config.num_attention_heads
        kv_heads = config.num_kv_heads
        self.q = Weight(heads * H, D, bias=config.add_qkv_bias)
        self.k = Weight(kv_heads * H, D, bias=config.add_qkv_bias)
        self.v = Weight(kv_heads * H, D, bias=config.add_qkv_bias)
        self.o = Weight(D, heads * H)
        self.norms_all_heads = config.norms_all_heads
        self.q_norm = self.k_norm = None
        if config.qk_layernorm:
            self.q_norm = RMSNorm(heads * H if self.norms_all_heads else H, config)
            self.k_norm = RMSNorm(kv_heads * H if self.norms_all_heads else H, config)
        self.sinks = nn.Parameter(torch.empty(heads, device="meta")) if config.has_sinks else None
        self.layout = layout
        self.number = number
        self.kv_rows: slice | None = None
        if kv_heads < tp.size:
            # The weights of all key/value heads are here; this rank's queries read one of them.
            head = tp.rank * kv_heads // tp.size
            self.kv_rows = slice(head * H, (head + 1) * H)
        kv_heads_here = max(1, kv_heads // tp.size)
        self.split = HeadSplit.make(heads // tp.size, kv_heads_here, layout.cp_a2a.size)
        # `attend` pairs query head i with key/value head i // group; an uneven split may need its
        # own pairing.
        pairing = self.split.kv_of_query(layout.cp_a2a.rank)
        uses = [pairing.count(head) for head in range(pairing[-1] + 1)]
        kv_uses = uses if len(set(uses)) > 1 else None
        self.core = AttentionCore(
            head_size=H,
            epsilon=config.norm_epsilon,
            attend=attend,
            scoring=config.scorings[number],
            rope=config.layer_ropes[number],
            layout=layout,
            number=number,
            first_head=tp.rank * (heads // tp.size),
            kv_uses=kv_uses,
            norms_all_heads=self.norms_all_heads,
        )

    def forward(
        self, x_tD: torch.Tensor, positions: Positions, head_chunks: int, tape: AttentionTape | None
    ) -> torch.Tensor:
        """Attend over each token's document: [t, D] -> [t, D].

        Args:
            x_tD: [t, D], or [t / tp, D] under Megatron-SP, as the result.
            head_chunks: groups of query heads, a number out of parallel/ulysses.py: chunk_counts.
            tape: keeps the attention's results, or has them.
        """
        x_tD = enter_tensor_parallel(x_tD, self.layout)
        weights = self._projections()
        if positions.cache is not None and positions.cache.places is not None:
            o_tNH = self._attend_to_cache(x_tD, positions, positions.cache, weights)
        elif head_chunks > 1 and positions.cache is None:  # a cache takes all heads at once
            rounds = head_rounds(self.split, head_chunks)
            o_tNH = attend_in_chunks(self.core, x_tD, positions, rounds, tape, weights)
        else:
            o_tNH = self._attend_at_once(x_tD, positions, tape, weights)
        return leave_tensor_parallel(self.o(o_tNH.reshape(x_tD.shape[0], -1)), self.layout)

    def _attend_at_once(
        self,
        x_tD: torch.Tensor,
        positions: Positions,
        tape: AttentionTape | None,
        weights: Projections,
    ) -> torch.Tensor:
        """Attend with all heads of this rank -> [t, N, H]."""
        core = self.core
        axis = self.layout.cp_a2a
        # No name holds the projections beside what the exchange brings.
        q_smH, k_skH, v_skH = seq_to_heads(
            *core.project(x_tD, positions, weights), self.split, axis
        )
        k_TkH, v_TkH = core.gather(k_skH, v_skH)
        if positions.cache is not None:
            positions.cache.fill(self.number, k_TkH, v_TkH)
        k_TkH, v_TkH = core.pair(k_TkH, v_TkH)
        core.measure_logits(q_smH, k_TkH, positions, self.split.query[axis.rank][0])
        sinks_m = core.sinks_here(weights.sinks, self.split)
        o_smH = core.attend_to(q_smH, k_TkH, v_TkH, positions.documents, tape, sinks_m)
        if tape is not None and not tape.playing:
            # The tape keeps the output; q, k and v are made again before it is played.
            free_storage(q_smH, k_TkH, v_TkH)
        return heads_to_seq(o_smH, self.split, axis)

    def _attend_to_cache(
        self, x_bD: torch.Tensor, positions: Positions, cache: KeyCache, weights: Projections
    ) -> torch.Tensor:
        """Attend with the next token of each sequence to those that are kept -> [b, N, H].

        Every rank of cp has these tokens, attends with its heads, and gets those of the others.
        """
        axis = self.layout.cp_a2a
        q0, q1 = self.split.query[axis.rank]
        k0, k1 = self.split.kv[axis.rank]
        q_bNH, k_bKH, v_bKH = self.core.project(x_bD, positions, weights, linears_side_by_side)
        assert cache.places is not None
        o_bmH = cache.layers[self.number].attend(
            q_bNH[:, q0:q1],
            k_bKH[:, k0:k1],
            v_bKH[:, k0:k1],
            cache.places,
            self.core.sinks_here(weights.sinks, self.split),
        )
        return gather_heads(o_bmH, self.split, axis)

    def _projections(self) -> Projections:
        """Gather this rank's weights, of the key/value heads only those that its queries read."""

        def rows(x: torch.Tensor | None) -> torch.Tensor | None:
            return x if x is None or self.kv_rows is None else x[self.kv_rows]

        k_norm = None if self.k_norm is None else self.k_norm.local_weight()
        return Projections(
            q_rD=self.q.local_weight(),
            k_rD=rows(self.k.local_weight()),
            v_rD=rows(self.v.local_weight()),
            q_bias=self.q.local_bias(),
            k_bias=rows(self.k.local_bias()),
            v_bias=rows(self.v.local_bias()),
            q_norm=None if self.q_norm is None else self.q_norm.local_weight(),
            # A norm of a single head is the same for all heads.
            k_norm=rows(k_norm) if self.norms_all_heads else k_norm,
            sinks=None if self.sinks is None else local_part(self.sinks),
        )
