"""The GPT: the whole forward path of one pipeline stage.

    tokens_t -> embedding -> x_tD -> layers -> final norm -> loss

Modules are made with their full shapes on the meta device; build.py cuts them (model/sharding.py),
shards them (parallel/shard.py) and fills them (model/init.py).

Legend: T tokens of a microbatch, t this context-parallel rank's slice, D hidden, F MLP width of
this tp rank, v this tp rank's part of the vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from model.activation_memory.offload import Host
from model.activation_memory.recompute import run_layer
from model.activation_memory.saved_attention import AttentionTape
from model.activation_memory.settings import MemorySettings
from model.attention import Attention
from model.attention_backends.backend import Attend
from model.attention_backends.documents import PackedDocuments, pack_documents
from model.attention_logits import LargestLogits
from model.config import ModelConfig
from model.key_cache import KeyCache
from model.layer_ropes import LayerRope
from model.loss import IGNORED_LABEL, LossSettings, fused_loss, score
from model.mlp import MLP, gated_mlp_gradients
from model.parts import (
    RMSNorm,
    Weight,
    enter_tensor_parallel,
    gradient_before_entering,
    gradient_before_leaving,
    leave_tensor_parallel,
)
from model.positions import Positions, RotaryTables
from model.products import linear
from model.rope import rotary_tables
from parallel.context import group_pieces
from parallel.layout import Layout
from parallel.schedule import layers_of_stage
from parallel.tensor import vocab_parallel_embedding


class Microbatch(Protocol):
    """What a stage reads of a microbatch: this rank's slice of it."""

    tokens: torch.Tensor  # int64 [t]
    labels: torch.Tensor  # int64 [t], IGNORED_LABEL where there is no target
    positions: torch.Tensor  # int64 [t], restarting per document
    cu_seqlens: torch.Tensor  # int32 [documents + 1] on the host, over all T tokens

    @property
    def source_runs(self) -> Sequence[tuple[int, int, int, int]]:
        """List which source gave which tokens of the slice: begin, end, source, targets."""
        ...


class Layer(nn.Module):
    """One transformer layer: a = x + attention(norm(x)), then a + mlp(norm(a)).

    The norms may come after the attention and the MLP instead, or as well (norm_placement). A
    factor on what is added is residual_multiplier.
    """

    def __init__(self, config: ModelConfig, layout: Layout, attend: Attend, number: int):
        """
        Args:
            number: of the layer in the whole model, from 0.
        """
        super().__init__()
        D = config.hidden_size
        before = config.has_norms_before
        after = config.has_norms_after
        self.attention_norm = RMSNorm(D, config) if before else None
        self.attention = Attention(config, layout, attend, number)
        self.attention_post_norm = RMSNorm(D, config) if after else None
        self.mlp_norm = RMSNorm(D, config) if before else None
        self.mlp = MLP(D, config.ffn_hidden_size, config.activation_func)
        self.mlp_post_norm = RMSNorm(D, config) if after else None
        self.residual_multiplier = config.residual_multiplier
        self.layout = layout

    def forward(
        self, x_tD: torch.Tensor, positions: Positions, settings: MemorySettings, host: Host | None
    ) -> torch.Tensor:
        return run_layer(self, x_tD, positions, settings, host)

    def after_attention(
        self,
        x_tD: torch.Tensor,
        positions: Positions,
        settings: MemorySettings,
        tape: AttentionTape | None,
    ) -> torch.Tensor:
        """Compute the first half of the layer: x + attention(norm(x))."""
        added_tD = self.attention(
            _normed(self.attention_norm, x_tD), positions, settings.attention_head_chunks, tape
        )
        return self._add(x_tD, _normed(self.attention_post_norm, added_tD))

    def after_mlp(self, a_tD: torch.Tensor, settings: MemorySettings) -> torch.Tensor:
        """Compute the second half of the layer: a + mlp(norm(a))."""
        return self._add(a_tD, self._added_by_mlp(a_tD, settings))

    def _added_by_mlp(self, a_tD: torch.Tensor, settings: MemorySettings) -> torch.Tensor:
        x_tD = enter_tensor_parallel(_normed(self.mlp_norm, a_tD), self.layout)
        added_tD = leave_tensor_parallel(self.mlp(x_tD, settings.mlp_tiles), self.layout)
        return _normed(self.mlp_post_norm, added_tD)

    def _add(self, stream_tD: torch.Tensor, added_tD: torch.Tensor) -> torch.Tensor:
        """Add to the residual stream."""
        return torch.add(stream_tD, added_tD, alpha=self.residual_multiplier)

    def mlp_gradient(
        self, a_tD: torch.Tensor, grad_tD: torch.Tensor, settings: MemorySettings
    ) -> torch.Tensor:
        """Backward of `after_mlp`, from its input; parameters get their gradients.

        The result takes the place of `grad_tD`, which nothing else reads: the next layer, the final
        norm or the next stage made it for this one.
        """
        a_tD = a_tD.requires_grad_()
        grad_added_tD = grad_tD
        if self.residual_multiplier != 1.0:
            grad_added_tD = grad_tD * self.residual_multiplier
        if self.mlp_post_norm is None:
            self._mlp_gradient_without_result(a_tD, grad_added_tD, settings)
        else:
            # The norm after the MLP reads its result: all of it is made again.
            with torch.enable_grad():
                added_tD = self._added_by_mlp(a_tD, settings)
            edge = get_gradient_edge(added_tD)
            del added_tD  # only its place in the graph is needed from here on
            torch.autograd.backward(edge, grad_added_tD)
        assert a_tD.grad is not None
        return grad_tD.add_(a_tD.grad)

    def _mlp_gradient_without_result(
        self, a_tD: torch.Tensor, grad_tD: torch.Tensor, settings: MemorySettings
    ) -> None:
        """Add the gradients of the MLP and of its norm to `a_tD.grad` and the parameters'.

        Args:
            grad_tD: the gradient of what the MLP adds.
        """
        assert self.mlp_norm is not None
        with torch.enable_grad():
            normed_tD = self.mlp_norm(a_tD)
            weights = self.mlp.local_weights()
        edges = [get_gradient_edge(x) for x in (normed_tD, *weights)]
        x_tD = enter_tensor_parallel(normed_tD.detach(), self.layout)
        del normed_tD  # only its place in the graph is needed from here on
        grad_partial_tD = gradient_before_leaving(grad_tD, self.layout)
        grad_x, *grad_weights = gated_mlp_gradients(
            grad_partial_tD, x_tD, weights, settings.mlp_tiles, self.mlp.activation
        )
        # Their memory is not held while the norm is worked on.
        del x_tD, grad_partial_tD
        grad_normed = gradient_before_entering(grad_x, self.layout)
        del grad_x
        torch.autograd.backward(edges, [grad_normed, *grad_weights])


def _normed(norm: RMSNorm | None, x: torch.Tensor) -> torch.Tensor:
    """Apply a norm that the layer may not have."""
    return x if norm is None else norm(x)


class GPTStage(nn.Module):
    """The layers of one pipeline stage, with the embedding on the first and the loss on the last.

    A tied embedding exists on both ends under the same name; the trainer sums its two gradients.
    `rope` and `memory` are the current phase's.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, layout: Layout, attend: Attend, number: int = 0
    ):
        """Make the stage's modules on the meta device.

        Args:
            number: of the stage, one of `layout.stages`.
        """
        super().__init__()
        rows = config.padded_vocab_size(vocab_size)
        self.is_first = number == 0
        self.is_last = number == layout.num_stages - 1
        self.tied = not config.untie_embeddings_and_output_weights
        self.layout = layout
        self.head_size = config.head_size
        self.vocab_size = vocab_size
        self.softcap = config.final_logit_softcapping
        if self.is_first or (self.is_last and self.tied):
            self.embedding = Weight(rows, config.hidden_size)
        # Keyed by the global layer number, so that a parameter has one name in every layout.
        numbers = layers_of_stage(config.num_layers, number, layout.num_stages)
        self.layers = nn.ModuleDict({str(i): Layer(config, layout, attend, i) for i in numbers})
        if self.is_last:
            self.final_norm = RMSNorm(config.hidden_size, config)
            if not self.tied:
                self.output = Weight(rows, config.hidden_size)
        self.embedding_multiplier = config.embedding_multiplier
        self.logits_divisor = config.logits_divisor
        self.rope = config.rope
        self.window_rope = config.window_rope
        self.rope_kinds = tuple(dict.fromkeys(config.layer_ropes[i] for i in numbers))
        self.memory = MemorySettings()
        self.host = Host(layout.device)
        self.microbatches: Sequence[Microbatch] = ()
        self.loss_scale: torch.Tensor | float = 1.0
        self.next_microbatch = 0
        self.scores: list[torch.Tensor] | None = None
        self.source_losses: torch.Tensor | None = None
        self.largest_logits: LargestLogits | None = None

    def begin_step(
        self,
        microbatches: Sequence[Microbatch],
        num_targets: torch.Tensor | int,
        scores: list[torch.Tensor] | None = None,
        source_losses: torch.Tensor | None = None,
        largest_logits: LargestLogits | None = None,
    ) -> None:
        """Set what `forward` looks up: this rank's slices, and the targets of the global batch.

        Args:
            num_targets: a number, or an int64 scalar on the device, which is not waited for.
            scores: the last stage appends, per microbatch, fp64 [3]: sum of its slice's target
                losses in nats, its targets, and how many of those had the largest logit.
            source_losses: fp64 [sources]; the last stage adds the sum of the target losses in nats
                of its slice's tokens of each source, where there are no scores.
            largest_logits: get those of this stage's layers and heads over its slices.
        """
        self.microbatches = microbatches
        self.next_microbatch = 0
        self.scores = scores
        self.source_losses = source_losses
        self.largest_logits = largest_logits
        if isinstance(num_targets, torch.Tensor):
            self.loss_scale = num_targets.clamp(min=1).double().reciprocal()
        else:
            self.loss_scale = 1 / max(1, num_targets)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the step's next microbatch through this stage.

        Every schedule sends the microbatches through a stage in order, so a counter on the host
        names them; an index in a tensor would have to be read back from the GPU each time.

        Args:
            x: [t, D] ([t / tp, D] under Megatron-SP) from the previous stage; unread on the first
                stage.
        Returns:
            the same for the next stage, or on the last one the scalar sum of target losses in nats
            divided by the global number of targets (a rank without targets returns 0, with a
            gradient of 0).
        """
        microbatch = self.microbatches[self.next_microbatch]
        self.next_microbatch += 1
        x_tD = self.hidden(x, microbatch)
        if not self.is_last:
            return x_tD
        inputs = *self.head_inputs(x_tD), microbatch.labels
        settings = LossSettings(
            self.layout.tp, self.vocab_size, self.memory.loss_tokens, self.softcap
        )
        if self.scores is None:
            return self._loss(microbatch, *inputs, settings)
        loss, hits = score(*inputs, settings)
        targets = (microbatch.labels != IGNORED_LABEL).sum()
        self.scores.append(torch.stack([value.double() for value in (loss, targets, hits)]))
        return loss * self.loss_scale

    def _loss(
        self,
        microbatch: Microbatch,
        x_tD: torch.Tensor,
        weight_vD: torch.Tensor,
        labels_t: torch.Tensor,
        settings: LossSettings,
    ) -> torch.Tensor:
        """Compute the scaled loss, and add up the losses of each source where that is asked for."""
        losses_t = None
        if self.source_losses is not None:
            dtype = torch.promote_types(x_tD.dtype, torch.float32)
            losses_t = torch.empty(labels_t.shape, dtype=dtype, device=labels_t.device)
        loss = fused_loss(x_tD, weight_vD, labels_t, self.loss_scale, settings, losses_t)
        if self.source_losses is not None and losses_t is not None:
            # A sum for each run, in a fixed order: scattered adds of a GPU would come in any.
            for begin, end, source, _ in microbatch.source_runs:
                self.source_losses[source] += losses_t[begin:end].sum(dtype=torch.float64)
        return loss

    def hidden(
        self, x: torch.Tensor, microbatch: Microbatch, cache: KeyCache | None = None
    ) -> torch.Tensor:
        """Run the embedding (first stage) and the layers -> [t, D] ([t / tp, D] by Megatron-SP).

        Args:
            cache: gets the keys and values of all documents.
        """
        if self.is_first:
            x = self._embed(microbatch.tokens)
        # What every layer needs: the documents of this rank's queries, and the rotary tables.
        gather = self.layout.cp_gather
        pieces = group_pieces(int(microbatch.cu_seqlens[-1]), gather.rank, gather.size)
        documents = pack_documents(microbatch.cu_seqlens, pieces, x.device)
        positions = self.make_positions(microbatch.positions, documents, x.dtype, cache)
        positions.logits = self.largest_logits
        self.host.begin()
        for number, layer in enumerate(self.layers.values()):
            offload = number < self.memory.cpu_offloading_num_layers
            x = layer(x, positions, self.memory, self.host if offload else None)
        self.host.finish_sending()  # not beside the loss
        return x

    def hidden_of_next(self, tokens_b: torch.Tensor, cache: KeyCache) -> torch.Tensor:
        """Run the next token of each cached sequence through the layers of a whole model -> [b, D].

        The cache keeps their keys and values. Every rank of cp has the same tokens; without
        Megatron-SP.
        """
        places = cache.begin_step()
        x_bD = self._embed(tokens_b)
        positions = self.make_positions(places.positions_b, [], x_bD.dtype, cache)
        for layer in self.layers.values():
            x_bD = layer(x_bD, positions, self.memory, None)
        cache.end_step()
        return x_bD

    def _embed(self, tokens_t: torch.Tensor) -> torch.Tensor:
        """Look tokens up and enter the residual stream: [t, D] ([t / tp, D] by Megatron-SP)."""
        # Each tp rank finds the tokens of its rows: their sum is the embedding.
        x_tD = vocab_parallel_embedding(tokens_t, self.embedding.local_weight(), self.layout.tp)
        x_tD = leave_tensor_parallel(x_tD, self.layout)
        return x_tD if self.embedding_multiplier == 1.0 else x_tD * self.embedding_multiplier

    def make_positions(
        self,
        positions_t: torch.Tensor,
        documents: list[PackedDocuments],
        dtype: torch.dtype,
        cache: KeyCache | None = None,
    ) -> Positions:
        """Return what the layers are told of where their tokens are."""
        tables = {kind: self._tables(kind, positions_t, dtype) for kind in self.rope_kinds}
        return Positions(tables, documents, cache)

    def _tables(
        self, kind: LayerRope, positions_t: torch.Tensor, dtype: torch.dtype
    ) -> RotaryTables:
        """Make the tables that some layers turn their heads by."""
        if kind == "none":
            return RotaryTables.without_turning(positions_t, self.head_size, dtype)
        rope = self.rope if kind == "main" else self.window_rope
        assert rope is not None
        return RotaryTables(*rotary_tables(positions_t, self.head_size, rope, dtype))

    def head_inputs(self, x_tD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the output projection reads [t, D], and its weight [v, D]."""
        x_tD = self.final_norm(x_tD)
        if self.logits_divisor != 1.0:
            # Here, and not [t, v] logits: the product is linear.
            x_tD = x_tD / self.logits_divisor
        x_tD = enter_tensor_parallel(x_tD, self.layout)
        return x_tD, (self.embedding if self.tied else self.output).local_weight()

    def logits(self, x_tD: torch.Tensor) -> torch.Tensor:
        """Compute this tp rank's columns of all tokens' logits: [t, D] -> [t, v].

        Columns that pad the vocabulary are -inf. For generation and comparisons: the loss never
        holds the logits at once.
        """
        x_tD, weight_vD = self.head_inputs(x_tD)
        logits_tv = linear(x_tD, weight_vD)
        if self.softcap is not None:
            logits_tv = (logits_tv / self.softcap).tanh() * self.softcap
        columns = (
            torch.arange(logits_tv.shape[1], device=x_tD.device)
            + self.layout.tp.rank * logits_tv.shape[1]
        )
        return logits_tv.masked_fill(columns >= self.vocab_size, float("-inf"))
