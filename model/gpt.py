"""The GPT: the whole forward path of one pipeline stage.

    tokens_t -> embedding -> x_tD -> layers -> final norm -> logits_tv -> loss

Modules are made with their full shapes on the meta device; build.py cuts them (model/sharding.py),
shards them (parallel/shard.py) and fills them (model/init.py).

Legend: T tokens of a microbatch, t this context-parallel rank's slice, s those of its all-to-all group
(all T without a second level), D hidden, F MLP width of this tp rank, N query and K key/value heads of
this tp rank, m heads after the exchange, H head size, V vocabulary, v this tp rank's part.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.kernels import Attend, Segments, make_segments
from model.memory import run_layer
from model.rope import rotary_tables, rotate
from parallel.collectives import copy_to, gather_sequence, reduce_from, scatter_sequence
from parallel.context import gather_keys, group_pieces
from parallel.layout import Layout
from parallel.schedule import layers_of_stage
from parallel.tensor import (
    local_part,
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
    vocab_parallel_first_choices,
)
from parallel.ulysses import HeadSplit, heads_to_seq, seq_to_heads

IGNORED_LABEL = -100
"""torch's own convention for a token without a target."""


class Microbatch(Protocol):
    """What a stage reads of a microbatch: this rank's slice of it."""

    tokens: torch.Tensor  # int64 [t]
    labels: torch.Tensor  # int64 [t], IGNORED_LABEL where there is no target
    positions: torch.Tensor  # int64 [t], restarting per document
    cu_seqlens: torch.Tensor  # int32 [documents + 1] on the host, over all T tokens


class Weight(nn.Module):
    """A weight [out, in] with an optional bias [out]; called, it is a linear layer over this tp rank's part."""

    def __init__(self, rows: int, columns: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, device="meta"))
        self.bias = nn.Parameter(torch.empty(rows, device="meta")) if bias else None
        self.partial_gradient = False

    def local_weight(self) -> torch.Tensor:
        return local_part(self.weight, self.partial_gradient)

    def local_bias(self) -> torch.Tensor | None:
        return None if self.bias is None else local_part(self.bias, self.partial_gradient)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.local_weight(), self.local_bias())


class RMSNorm(nn.Module):
    """Root mean square layer normalization (arXiv 1910.07467) over the last dim, statistics in fp32."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta"))
        self.epsilon = epsilon
        self.partial_gradient = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = local_part(self.weight, self.partial_gradient)
        return F.rms_norm(x, weight.shape, weight, self.epsilon)


def enter_tensor_parallel(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """All tokens of this cp rank, for a part of the weights: gathered over tp where tokens are split over it."""
    return gather_sequence(x, layout.tp) if layout.sequence_parallel else copy_to(x, layout.tp)


def leave_tensor_parallel(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Sum the tp ranks' partial results; each keeps all tokens, or its part of them."""
    return scatter_sequence(x, layout.tp) if layout.sequence_parallel else reduce_from(x, layout.tp)


class Attention(nn.Module):
    """Causal self-attention: heads split over tp, tokens over cp (Ulysses), documents kept apart."""

    def __init__(self, config: ModelConfig, layout: Layout, attend: Attend):
        super().__init__()
        D, H, tp = config.hidden_size, config.head_size, layout.tp
        heads, kv_heads = config.num_attention_heads, config.num_kv_heads
        self.q = Weight(heads * H, D, config.add_qkv_bias)
        self.k = Weight(kv_heads * H, D, config.add_qkv_bias)
        self.v = Weight(kv_heads * H, D, config.add_qkv_bias)
        self.o = Weight(D, heads * H)
        self.q_norm = RMSNorm(H, config.norm_epsilon) if config.qk_layernorm else None
        self.k_norm = RMSNorm(H, config.norm_epsilon) if config.qk_layernorm else None
        self.head_size, self.layout, self.attend = H, layout, attend
        self.kv_rows: slice | None = None
        if kv_heads < tp.size:
            # The weights of all key/value heads are here; this rank's queries read one of them.
            head = tp.rank * kv_heads // tp.size
            self.kv_rows = slice(head * H, (head + 1) * H)
        self.split = HeadSplit.make(heads // tp.size, max(1, kv_heads // tp.size), layout.cp_a2a.size)
        # `attend` pairs query head i with key/value head i // group; an uneven split may need its own pairing.
        pairing = self.split.kv_of_query(layout.cp_a2a.rank)
        regular = [i * (pairing[-1] + 1) // len(pairing) for i in range(len(pairing))]
        self.kv_pairing = None if pairing == regular and len(pairing) % (pairing[-1] + 1) == 0 else pairing

    def _project_kv(self, weight: Weight, x_tD: torch.Tensor) -> torch.Tensor:
        if self.kv_rows is None:
            return weight(x_tD)
        bias = weight.local_bias()
        return F.linear(x_tD, weight.local_weight()[self.kv_rows], None if bias is None else bias[self.kv_rows])

    def forward(self, x_tD: torch.Tensor, cos_tH: torch.Tensor, sin_tH: torch.Tensor,
                segments: list[Segments]) -> torch.Tensor:
        x_tD = enter_tensor_parallel(x_tD, self.layout)
        t, H = x_tD.shape[0], self.head_size
        q_tNH = self.q(x_tD).view(t, -1, H)
        k_tKH = self._project_kv(self.k, x_tD).view(t, -1, H)
        v_tKH = self._project_kv(self.v, x_tD).view(t, -1, H)
        if self.q_norm is not None:
            q_tNH, k_tKH = self.q_norm(q_tNH), self.k_norm(k_tKH)
        q_tNH, k_tKH = rotate(q_tNH, cos_tH, sin_tH), rotate(k_tKH, cos_tH, sin_tH)

        o_smH = self._attend(*seq_to_heads(q_tNH, k_tKH, v_tKH, self.split, self.layout.cp_a2a), segments)
        o_tNH = heads_to_seq(o_smH, self.split, self.layout.cp_a2a)
        return leave_tensor_parallel(self.o(o_tNH.reshape(t, -1)), self.layout)

    def _attend(self, q_smH: torch.Tensor, k_skH: torch.Tensor, v_skH: torch.Tensor,
                segments: list[Segments]) -> torch.Tensor:
        """The queries of this rank's group of tokens against the keys of all tokens -> [s, m, H]."""
        k_TkH, v_TkH = gather_keys(k_skH, v_skH, self.layout.cp_gather)
        if self.kv_pairing is not None:
            index = torch.tensor(self.kv_pairing, device=k_TkH.device)
            k_TkH, v_TkH = k_TkH.index_select(1, index), v_TkH.index_select(1, index)
        parts = [self.attend(q_smH[part.queries], k_TkH[part.keys], v_TkH[part.keys], part) for part in segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)), its width split over tp."""

    def __init__(self, config: ModelConfig, layout: Layout):
        super().__init__()
        self.gate = Weight(config.ffn_hidden_size, config.hidden_size)
        self.up = Weight(config.ffn_hidden_size, config.hidden_size)
        self.down = Weight(config.hidden_size, config.ffn_hidden_size)
        self.layout = layout

    def forward(self, x_tD: torch.Tensor) -> torch.Tensor:
        x_tD = enter_tensor_parallel(x_tD, self.layout)
        return leave_tensor_parallel(self.down(F.silu(self.gate(x_tD)) * self.up(x_tD)), self.layout)


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, layout: Layout, attend: Attend):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config, layout, attend)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = MLP(config, layout)

    def forward(self, x_tD, cos_tH, sin_tH, segments):
        x_tD = x_tD + self.attention(self.attention_norm(x_tD), cos_tH, sin_tH, segments)
        return x_tD + self.mlp(self.mlp_norm(x_tD))


class GPTStage(nn.Module):
    """The layers of one pipeline stage, with the embedding on the first and the loss on the last.

    A tied embedding exists on both ends under the same name; the trainer sums its two gradients.
    `rope`, `recompute` and `offloaded_layers` are the current phase's.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, layout: Layout, attend: Attend, number: int = 0):
        """Args: number: of the stage, one of `layout.stages`."""
        super().__init__()
        rows = config.padded_vocab_size(vocab_size)
        self.is_first, self.is_last = number == 0, number == layout.num_stages - 1
        self.tied = not config.untie_embeddings_and_output_weights
        self.layout, self.head_size, self.vocab_size = layout, config.head_size, vocab_size
        if self.is_first or (self.is_last and self.tied):
            self.embedding = Weight(rows, config.hidden_size)
        # Keyed by the global layer number, so that a parameter has one name in every layout.
        self.layers = nn.ModuleDict({str(i): Layer(config, layout, attend)
                                     for i in layers_of_stage(config.num_layers, number, layout.num_stages)})
        if self.is_last:
            self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
            if not self.tied:
                self.output = Weight(rows, config.hidden_size)
        self.rope, self.recompute = config.rope, config.recompute_granularity
        self.offloaded_layers = config.cpu_offloading_num_layers
        self.microbatches: Sequence[Microbatch] = ()
        self.num_targets, self.next_microbatch = 1, 0
        self.scores: list[torch.Tensor] | None = None

    def begin_step(self, microbatches: Sequence[Microbatch], num_targets: int,
                   scores: list[torch.Tensor] | None = None) -> None:
        """Set what `forward` looks up: this rank's slices and the target count of the whole global batch.

        Args:
            scores: the last stage appends, per microbatch, fp64 [3]: sum of its slice's target losses in nats, its
                targets, and how many of those were the model's first choice.
        """
        self.microbatches, self.num_targets = microbatches, max(1, num_targets)
        self.next_microbatch, self.scores = 0, scores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The step's next microbatch through this stage.

        Every schedule sends the microbatches through a stage in order, so a counter on the host names
        them; an index in a tensor would have to be read back from the GPU each time.

        Args:
            x: [t, D] ([t / tp, D] under Megatron-SP) from the previous stage; unread on the first stage.
        Returns:
            the same for the next stage, or on the last one the scalar sum of target losses in nats divided
            by the global number of targets (a rank without targets returns 0, with a gradient of 0).
        """
        microbatch = self.microbatches[self.next_microbatch]
        self.next_microbatch += 1
        x_tD = self.hidden(x, microbatch)
        if not self.is_last:
            return x_tD
        logits_tv = self.logits(x_tD)
        losses_t = vocab_parallel_cross_entropy(logits_tv, microbatch.labels, self.layout.tp, IGNORED_LABEL)
        if self.scores is not None:
            hits_t = vocab_parallel_first_choices(logits_tv, self.layout.tp) == microbatch.labels
            targets = (microbatch.labels != IGNORED_LABEL).sum()
            self.scores.append(torch.stack([losses_t.sum(dtype=torch.float64), targets.double(),
                                            hits_t.sum(dtype=torch.float64)]))
        return losses_t.sum() / self.num_targets

    def hidden(self, x: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        """Embedding (first stage) and layers: -> [t, D], under Megatron-SP [t / tp, D]."""
        if self.is_first:
            x = vocab_parallel_embedding(microbatch.tokens, self.embedding.local_weight(), self.layout.tp)
            x = leave_tensor_parallel(x, self.layout)
        tables = rotary_tables(microbatch.positions, self.head_size, self.rope, x.dtype)
        gather = self.layout.cp_gather
        pieces = group_pieces(int(microbatch.cu_seqlens[-1]), gather.rank, gather.size)
        inputs = (*tables, make_segments(microbatch.cu_seqlens, pieces, x.device))
        for number, layer in enumerate(self.layers.values()):
            x = run_layer(layer, x, inputs, self.recompute, offload=number < self.offloaded_layers)
        return x

    def logits(self, x_tD: torch.Tensor) -> torch.Tensor:
        """Final norm and output projection: what `hidden` gives -> this tp rank's columns [t, v], padding at -inf."""
        tp = self.layout.tp
        x_tD = enter_tensor_parallel(self.final_norm(x_tD), self.layout)
        logits_tv = (self.embedding if self.tied else self.output)(x_tD)
        real = self.vocab_size - tp.rank * logits_tv.shape[1]
        if real < logits_tv.shape[1]:
            padded = torch.arange(logits_tv.shape[1], device=x_tD.device) >= real
            logits_tv = logits_tv.masked_fill(padded, float("-inf"))
        return logits_tv
