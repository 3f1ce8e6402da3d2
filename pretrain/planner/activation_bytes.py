"""What a layer and the loss keep for their backward and hold while it runs, in bytes, from numbers
alone.

Read off the forward path line by line: memory.py says what each level of recompute keeps,
attention_backend.py, attention_chunks.py, mlp.py, loss.py and pointwise.py what is there at a time. A
tensor of [t, D] in the compute dtype counts where it is made; what has the size of a row's number
(a norm's scale, a label) is left out where it only passes.

Legend as in attention_backend.py and mlp.py; u tokens between the tensor-parallel parts (t, or t / tp under
Megatron-SP), W bytes of the widest of fp32 and the compute dtype, b bytes of the compute dtype, c
tokens of a tile or chunk.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil

from model.activation_memory.settings import MemorySettings
from model.config import ModelConfig
from model.pointwise import BLOCK
from parallel.config import LayoutConfig
from parallel.ulysses import HeadSplit, chunk_counts, head_rounds


@dataclass(frozen=True)
class Load:
    """What a rank is to train: one layout, one length, one batch."""

    layout: LayoutConfig
    data_parallel_size: int
    seq_length: int
    micro_batch_size: int
    num_microbatches: int
    memory: MemorySettings = MemorySettings()

    @property
    def shards(self) -> int:
        """Ranks that share the parameters of a stage."""
        return self.data_parallel_size * self.layout.context_parallel_size

    @property
    def tokens(self) -> int:
        """t: of a microbatch on one context-parallel rank."""
        return self.seq_length * self.micro_batch_size // self.layout.context_parallel_size

    @property
    def tokens_between(self) -> int:
        """u: of a microbatch on one rank between the tensor-parallel parts."""
        return self.tokens // (
            self.layout.tensor_model_parallel_size if self.layout.sequence_parallel else 1
        )

    @property
    def whole_gradients(self) -> bool:
        """Are gradients kept whole until the last microbatch? (parallel/shard.py,
        parallel/pipeline.py)"""
        return self.layout.pipeline_model_parallel_size > 1 or (
            self.layout.sharding_strategy == "optim" and self.num_microbatches > 1
        )


def pinned_bytes(size: int) -> int:
    """What a tensor takes in pinned memory, which torch's allocator for the host hands out in
    powers of two."""
    return 2 ** (size - 1).bit_length() if size else 0


@dataclass(frozen=True)
class Kept:
    """Bytes that wait for backward."""

    device: int
    host: int = 0
    """Where the layer is offloaded: what waits in the host's memory instead; else what could."""


@dataclass(frozen=True)
class Moment:
    """A point of the step at which much is held, beside what all layers and microbatches in flight
    keep."""

    freed: int
    """Of what the layer that is worked on kept: no longer there."""
    made: int
    gradients: int
    """Of parameters, before FSDP2 takes them."""


class LayerMemory:
    """One rank's layers and loss under one load."""

    def __init__(
        self,
        config: ModelConfig,
        vocabulary_rows: int,
        load: Load,
        compute_bytes: int,
        on_gpu: bool,
    ):
        """Args:
        vocabulary_rows: v: of the embedding, on this tp rank.
        on_gpu: with the GPU's kernels, whose norms make nothing wide.
        """
        layout = load.layout
        self.settings = load.memory
        self.load = load
        self.on_gpu = on_gpu
        self.b, self.W, self.v = compute_bytes, max(4, compute_bytes), vocabulary_rows
        tp, (self.a2a, self.gathers) = layout.tensor_model_parallel_size, layout.context_levels
        self.D = config.hidden_size
        self.H = config.head_size
        self.F = config.ffn_hidden_size // tp
        self.has_qk_norm = config.qk_layernorm
        self.tied = not config.untie_embeddings_and_output_weights
        self.t = load.tokens
        self.u = load.tokens_between
        self.s = self.t * self.a2a
        self.T = self.t * self.a2a * self.gathers
        self.heads = Heads.of(config, layout, load.memory.attention_head_chunks)
        self.chunks = load.memory.attention_head_chunks

    # ------------------------------------------------------------ kept between forward and backward

    @property
    def input(self) -> int:
        """[u, D]: a layer's input, or that of its second half."""
        return self.b * self.u * self.D

    @property
    def read(self) -> int:
        """[t, D]: what projections read or write."""
        return self.b * self.t * self.D

    @property
    def _scales(self) -> int:
        """A norm's number per row."""
        return self.W * self.u

    @cached_property
    def _exchanged(self) -> int:
        """q, k and v of all heads, as the kernel reads them."""
        heads = self.heads
        H = self.H
        queries = (
            self.s * (heads.m + 2 * heads.k) if self.a2a > 1 else self.s * heads.m
        )  # one tensor came
        keys = 2 * self.T * heads.k if self.gathers > 1 or self.a2a == 1 else 0
        return self.b * H * (queries + keys + 2 * self.T * heads.paired)

    @property
    def _results(self) -> int:
        """The kernel's output."""
        return self.b * self.s * self.heads.m * self.H

    @property
    def _log_sums(self) -> int:
        return self.W * self.s * self.heads.m

    @property
    def _to_project(self) -> int:
        """The attention's result as its output projection reads it, where it is not the kernel's
        own."""
        is_copy = self.a2a > 1 or self.gathers > 1 or self.chunks > 1
        return self.b * self.t * self.heads.N * self.H if is_copy else 0

    @property
    def _attention_inputs(self) -> int:
        """From the layer's norm to the kernel, without the layer's input."""
        if self.chunks > 1:
            return self._scales + self.read
        return self._scales + self.read + self._head_norms + self._exchanged

    @property
    def _head_norms(self) -> int:
        if not self.has_qk_norm:
            return 0
        heads = self.heads
        joined = self.b * self.H * self.t * (heads.N + 2 * heads.K)
        return joined + self.W * self.t * (heads.N + heads.K)

    @property
    def _attention(self) -> int:
        """All that an attention keeps, without the layer's input."""
        return self._attention_inputs + self._results + self._log_sums + self._to_project

    @property
    def _mlp(self) -> int:
        """What the second half keeps beside its input."""
        projections = 2 * self.b * self.t * self.F if self.settings.mlp_tiles == 1 else 0
        return self._scales + self.read + projections

    @cached_property
    def kept(self) -> Kept:
        """Of a layer and microbatch."""
        level = self.settings.recompute_granularity
        if level is None:
            return Kept(2 * self.input + self._attention + self._mlp)
        if level == "selective":
            return Kept(2 * self.input + self._attention)
        if level == "full":
            return Kept(self.input, self.input)
        return Kept(self.input + self._results + self._log_sums, self.input + self._results)

    @property
    def moved(self) -> int:
        """Of an offloaded layer's `kept`, what leaves the device; on a CPU nothing does."""
        return self.kept.host if self.on_gpu else 0

    @property
    def on_host(self) -> int:
        """Of an offloaded layer."""
        if not self.moved:
            return 0
        outputs = self.kept.host - self.input
        return pinned_bytes(self.input) + self.chunks * pinned_bytes(outputs // self.chunks)

    @property
    def tables(self) -> int:
        """Of a microbatch, for all layers: cosines and sines, tokens."""
        return 2 * self.b * self.t * self.H + 8 * self.t

    @property
    def kept_of_loss(self) -> int:
        """The final norm's input, and the gradients of the projection's input and weight."""
        return self.input + self._scales + self.read + self.b * self.v * self.D

    # ------------------------------------------------------------ at work

    def working_set(self, has_loss: bool, with_gradients: bool = False) -> int:
        """The most that there is beside what all layers and the loss keep; below 0 where that is
        never there at once.

        Args:
            with_gradients: count the gradients of the parameters that are worked on, and that of a
                tied embedding, which waits for its other half.
        """
        loss = self.kept_of_loss if has_loss else 0
        waiting = self.b * self.v * self.D if has_loss and self.tied else 0
        found = [
            moment.made - moment.freed - loss + with_gradients * (moment.gradients + waiting)
            for moment in self.moments
        ]
        if has_loss:
            found += [self.loss_at_work, self.read + self.b * self.v * self.D]
        return max(found)

    @cached_property
    def moments(self) -> list[Moment]:
        """When a layer is worked on, in its backward."""
        return [self._mlp_backward(), *self._attention_backward(), self._norm_backward()]

    @property
    def loss_at_work(self) -> int:
        """Beside `kept_of_loss`: the normed input, a chunk's logits, the sum of the weight's
        gradient."""
        b = self.b
        W = self.W
        rows = min(self.t, self.settings.loss_tokens)
        # Fused kernels put the gradient in the logits' place. Without them there are wide logits,
        # and beside them what the product wrote or reads in the compute dtype.
        logit = b if self.on_gpu else W + (b if b < W else 0)
        chunk = rows * self.v * logit
        sums = W * self.v * self.D if b < W else 0
        return self.read + chunk + sums

    @property
    def _recomputes_mlp(self) -> bool:
        return self.settings.recompute_granularity is not None

    @property
    def _recomputes_attention(self) -> bool:
        return self.settings.recompute_granularity in ("full", "attention_kept")

    @property
    def _recomputed(self) -> int:
        """What backward makes again of a layer's first half."""
        level = self.settings.recompute_granularity
        if level == "full":
            return self._attention + self._fetched
        return (
            self._attention_inputs + self._to_project + self._fetched
            if level == "attention_kept"
            else 0
        )

    @property
    def _fetched(self) -> int:
        """Of two offloaded layers: the one at work and the next, on its way."""
        return 2 * self.moved if self.settings.cpu_offloading_num_layers else 0

    def _mlp_backward(self) -> Moment:
        tiles = self.settings.mlp_tiles
        b = self.b
        D = self.D
        F = self.F
        rows = ceil(self.t / tiles)
        # The hidden values, their gradient and those of gate and up; gate and up where they are
        # made again.
        at_once = b * rows * F * (6 if tiles > 1 or self._recomputes_mlp else 4)
        made = at_once + self.input + self.read  # the gradients of the output and of x
        if self.u < self.t:
            made += self.read  # the gradient, gathered
        if self._recomputes_mlp:
            made += self._recomputed + self._scales  # the normed input is where its gradient comes
            made += self.input if self._recomputes_attention else 0  # a
        gradients = 3 * b * D * F
        sums = 3 * self.W * D * F if tiles > 1 else 0
        return Moment(0, made + sums, gradients)

    def _norm_backward(self) -> Moment:
        """Of the second half's norm."""
        wide = 0 if self.on_gpu else 4 * self.W * min(self.u * self.D, max(BLOCK, self.D))
        made = 2 * self.input + self.read + wide
        freed = 0 if self._recomputes_mlp else self._mlp - self._scales - self.read
        return Moment(
            freed, made + self._recomputed + (self.input if self._recomputes_attention else 0), 0
        )

    def _attention_backward(self) -> list[Moment]:
        D = self.D
        H = self.H
        heads = self.heads
        # Of the output's gradient and a's; where the MLP is recomputed, the second is in the place
        # of the first.
        residual = (1 if self._recomputes_mlp else 2) * self.input
        freed = self._to_project + (0 if self._recomputes_mlp else self._mlp + self.input)
        if self._recomputes_mlp and not self._recomputes_attention:
            freed += self.input
        weights = self.b * D * H * (2 * heads.N + 2 * heads.K)
        if self.chunks > 1:
            return [Moment(freed, residual + self._recomputed + self._chunk_at_work, weights)]
        made = residual + self._recomputed
        rows = self.s * heads.m + 2 * self.T * heads.k  # of the gradients of q, k and v
        kernel = self.s * heads.m * H * self.b + self._kernel_gradients(heads.m, heads.k)
        if self.gathers > 1:  # of the earlier and of the own keys, put together
            kernel += rows * H * self.b
        # The gradients, what is sent of them and what arrives; then what that is put together to.
        exchange = self.b * H * (3 * self.s * (heads.m + 2 * heads.k) if self.a2a > 1 else 0)
        gathered = self.b * H * (rows + 2 * self.T * heads.k) if self.gathers > 1 else 0
        joined = self.b * H * self.t * (heads.N + 2 * heads.K)
        # The gradients of q, k and v, turned back, side by side; a GPU's kernel writes them there
        # at once.
        turned = 0 if self.on_gpu else self.b * H * self.t * (heads.N + heads.K)
        # By then what the kernel kept is free.
        joining = 2 * joined + turned - self._exchanged - self._results - self._log_sums
        projecting = (
            2 * self.read + joined + self.b * H * D * (heads.N + 2 * heads.K)
        )  # and the joined weight
        return [Moment(freed, made + max(kernel, exchange, gathered, joining, projecting), weights)]

    def _kernel_gradients(self, m: int, k: int) -> int:
        """The gradients of m heads of q and k of keys and values, with what the kernel works with.

        Those of a part of the documents are there with those of all. On a GPU the kernel sums up
        q's in fp32; beside that FlashAttention 2 makes the gradients of grouped keys and values for
        each query head (cuDNN's own work is not known), or cuDNN reads a padded copy of the
        output's gradient.
        """
        of_q = self.s * m * self.H
        of_kv = 2 * self.T * k * self.H
        gradients = 2 * self.b * (of_q + of_kv)
        if not self.on_gpu:
            return gradients
        ungrouped = 2 * self.b * self.T * m * self.H if m > k else 0
        return gradients + 4 * of_q + max(ungrouped, self.b * of_q)

    @property
    def _chunk_at_work(self) -> int:
        """Backward of one group of heads: its q and that of its keys and values, and their
        gradients."""
        b = self.b
        H = self.H
        heads = self.heads
        m = heads.m // self.chunks
        k = heads.round_k
        sides = 2 if self.a2a > 1 else 1  # before and after the exchange
        of_results = b * self.t * heads.N * H
        is_shared = (
            m < k * heads.N // heads.K
        )  # several groups read the same keys: their gradients are summed up
        keys = 2 * self.T * k * H * (b * sides + self.W * is_shared)
        queries = self.s * m * H * b * 2 * sides  # with the gradient of their results
        kernel = self._kernel_gradients(m, k)
        of_x = self.read + max(kernel, 2 * b * self.T * k * H)
        return of_x + of_results + keys + queries


@dataclass(frozen=True)
class Heads:
    """Of a tp rank, and the most of a rank after the exchange."""

    N: int
    K: int
    m: int
    k: int
    paired: int
    """Key/value heads that are copied for the kernel, one per query head, where heads split
    unevenly."""
    round_k: int

    @staticmethod
    def of(config: ModelConfig, layout: LayoutConfig, chunks: int = 1) -> "Heads":
        tp = layout.tensor_model_parallel_size
        query = config.num_attention_heads // tp
        kv = max(1, config.num_kv_heads // tp)
        return _heads(query, kv, layout.context_levels[0], chunks)


@cache
def _heads(query: int, kv: int, a2a: int, chunks: int) -> Heads:
    split = HeadSplit.make(query, kv, a2a)
    m, k = (max(stop - start for start, stop in ranges) for ranges in (split.query, split.kv))
    paired = 0
    for rank in range(a2a):
        pairing = split.kv_of_query(rank)
        regular = [i * (pairing[-1] + 1) // len(pairing) for i in range(len(pairing))]
        if pairing != regular or len(pairing) % (pairing[-1] + 1):
            paired = max(paired, len(pairing))
    round_k = k
    if chunks > 1 and chunks in chunk_counts(split):
        round_k = max(
            stop - start for each in head_rounds(split, chunks) for start, stop in each.kv_split.kv
        )
    return Heads(query, kv, m, k, paired, round_k)
