"""What a layer and the loss keep for their backward and hold while it runs, in bytes.

Everything is computed from numbers alone, read off the forward path line by line:
activation_memory/recompute.py says what each level of recompute keeps; attention_chunks.py, mlp.py,
loss.py and pointwise.py what is there at a time. A tensor of [t, D] in the compute dtype counts
where it is made; what has one number per row (a norm's scale, a label) is left out where it only
passes.

Legend: t tokens of a rank, s those that it attends to with its heads within a cp group, T those of
all groups, u tokens between the tensor-parallel parts (t, or t / tp under Megatron-SP), D hidden,
H head size, F inner width of a tp rank's MLP, v vocabulary rows of a tp rank, N K m k heads (see
head_counts.py), b bytes of the compute dtype, W of the wider of it and fp32.
"""

from functools import cached_property
from math import ceil

from model.attention_backends.tiled import bytes_at_work
from model.config import ModelConfig
from model.pointwise import BLOCK_ELEMENTS
from pretrain.planner.head_counts import HeadCounts
from pretrain.planner.kept_bytes import KeptBytes, PeakCandidate, pinned_bytes
from pretrain.planner.loss_bytes import LossBytes
from pretrain.planner.workload import Workload


class LayerMemory:
    """Estimates one rank's layers and loss under one workload."""

    def __init__(
        self,
        config: ModelConfig,
        vocabulary_rows: int,
        load: Workload,
        *,
        compute_bytes: int,
        on_gpu: bool,
        with_kernels: bool = True,
    ):
        """
        Args:
            vocabulary_rows: v: rows of the embedding on this tp rank.
            on_gpu: with the GPU's kernels, whose norms make nothing wide.
            with_kernels: count what a GPU's attention kernel takes beside its results.
        """
        layout = load.layout
        self.settings = load.memory
        self.load = load
        self.on_gpu = on_gpu
        self.with_kernels = with_kernels
        self.b = compute_bytes
        self.W = max(4, compute_bytes)
        self.v = vocabulary_rows
        self.a2a, self.gathers = layout.context_levels
        self.D = config.hidden_size
        self.H = config.head_size
        self.F = config.ffn_hidden_size // layout.tensor_model_parallel_size
        self.config = config
        self.tied = not config.untie_embeddings_and_output_weights
        self.t = load.tokens
        self.u = load.tokens_between
        self.s = self.t * self.a2a
        self.T = self.t * self.a2a * self.gathers
        self.heads = HeadCounts.make(config, layout, load.memory.attention_head_chunks)
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

    @property
    def _stream(self) -> int:
        """The input of a half of a layer, where something in it keeps that."""
        is_kept = self.config.has_norms_before or self.u == self.t
        return self.input if is_kept else 0

    @property
    def _normed(self) -> int:
        """What a half's projections keep of their input, beside `_stream`."""
        if self.config.has_norms_before:
            return self._scales + self.read
        # They read the stream itself, gathered over tp under Megatron-SP.
        return self.read if self.u < self.t else 0

    @property
    def _before_norm_after(self) -> int:
        """What the norm after a half keeps: what that half adds."""
        return self.input + self._scales if self.config.has_norms_after else 0

    @property
    def _multiplied(self) -> int:
        """The gradient of what a half adds, where it is not the stream's own."""
        return self.input if self.config.residual_multiplier != 1.0 else 0

    @cached_property
    def _exchanged(self) -> int:
        """q, k and v of all heads, as the kernel reads them."""
        heads = self.heads
        # After an exchange they are views of the one tensor that came.
        queries = self.s * (heads.m + 2 * heads.k) if self.a2a > 1 else self.s * heads.m
        keys = 2 * self.T * heads.k if self.gathers > 1 or self.a2a == 1 else 0
        copied = 2 * self.T * heads.paired
        return self.b * self.H * (queries + keys + copied)

    @property
    def _results(self) -> int:
        """The kernel's output."""
        return self.b * self.s * self.heads.m * self.H

    @property
    def _log_sums(self) -> int:
        """The log-sum-exp that the kernel keeps beside its output."""
        return self.W * self.s * self.heads.m

    @property
    def _to_project(self) -> int:
        """What the output projection reads, where it is not the kernel's own output."""
        is_copy = self.a2a > 1 or self.gathers > 1 or self.chunks > 1
        return self.b * self.t * self.heads.N * self.H if is_copy else 0

    @property
    def _attention_inputs(self) -> int:
        """From the layer's norm to the kernel, without the layer's input."""
        if self.chunks > 1:
            return self._normed
        return self._normed + self._head_norms + self._exchanged

    @property
    def _head_norms(self) -> int:
        """What qk-norm keeps: q, k and v as they were before it, and a number per normed row."""
        if not self.config.qk_layernorm:
            return 0
        heads = self.heads
        joined = self.b * self.H * self.t * (heads.N + 2 * heads.K)
        rows = 2 if self.config.norms_all_heads else heads.N + heads.K
        return joined + self.W * self.t * rows

    @property
    def _attention(self) -> int:
        """All that an attention keeps, without the layer's input."""
        kernel = self._results + self._log_sums
        return self._attention_inputs + kernel + self._to_project + self._before_norm_after

    @property
    def _mlp(self) -> int:
        """What the second half keeps beside its input."""
        projections = 2 * self.b * self.t * self.F if self.settings.mlp_tiles == 1 else 0
        return self._normed + projections + self._before_norm_after

    @cached_property
    def kept(self) -> KeptBytes:
        """What a layer keeps of a microbatch."""
        level = self.settings.recompute_granularity
        if level is None:
            return KeptBytes(2 * self._stream + self._attention + self._mlp)
        if level == "selective":
            return KeptBytes(self._stream + self.input + self._attention)
        if level == "full":
            return KeptBytes(self.input, self.input)
        # attention_kept: the log-sum-exp stays on the device.
        return KeptBytes(self.input + self._results + self._log_sums, self.input + self._results)

    @property
    def moved(self) -> int:
        """The part of an offloaded layer's `kept` that leaves the device; on a CPU nothing does."""
        return self.kept.host if self.on_gpu else 0

    @property
    def on_host(self) -> int:
        """Bytes of pinned memory that an offloaded layer takes."""
        if not self.moved:
            return 0
        outputs = self.kept.host - self.input
        return pinned_bytes(self.input) + self.chunks * pinned_bytes(outputs // self.chunks)

    @property
    def tables(self) -> int:
        """What a microbatch keeps once for all layers: cosines and sines, tokens."""
        # Layers without rope have tables of one number; a stage may have fewer kinds of layers.
        kinds = set(self.config.layer_ropes) - {"none"}
        return 2 * len(kinds) * self.b * self.t * self.H + 8 * self.t

    @property
    def kept_of_loss(self) -> int:
        """The final norm's input, and the gradients of the projection's input and weight."""
        return self.input + self._scales + self.read + self.b * self.v * self.D

    # ------------------------------------------------------------ while backward runs

    def working_set(self, *, has_loss: bool, with_gradients: bool = False) -> int:
        """Return the most that there is beside what all layers and the loss keep.

        It is below 0 where that is never there at once.

        Args:
            with_gradients: count the gradients of the parameters at work, and that of a tied
                embedding, which waits for its other half.
        """
        of_layers = self.layers_working_set(has_loss=has_loss, with_gradients=with_gradients)
        return max(of_layers, self.loss_working_set) if has_loss else of_layers

    def layers_working_set(self, *, has_loss: bool, with_gradients: bool = False) -> int:
        """Return the same while a layer's backward runs."""
        loss = self.kept_of_loss if has_loss else 0
        waiting = self.b * self.v * self.D if has_loss and self.tied else 0
        return max(
            point.made - point.freed - loss + with_gradients * (point.gradients + waiting)
            for point in self.peak_candidates
        )

    @property
    def loss_working_set(self) -> int:
        """The same while the loss computes, and while its gradients are multiplied by the scale."""
        return max(self.loss_at_work, self.read + self.b * self.v * self.D)

    @cached_property
    def peak_candidates(self) -> list[PeakCandidate]:
        """The points of a layer's backward at which most is held."""
        points = [self._mlp_backward(), *self._attention_backward()]
        if self.config.has_norms_before:
            points.append(self._norm_backward())
        if self.config.has_norms_after:
            points.append(self._norm_after_backward())
        return points

    @property
    def loss_at_work(self) -> int:
        """What the loss holds beside `kept_of_loss`: the normed input, and what LossBytes says."""
        loss = LossBytes(
            tokens=self.t,
            chunk=self.settings.loss_tokens,
            hidden=self.D,
            vocabulary=self.v,
            value=self.b,
            wide=self.W,
            is_capped=bool(self.config.final_logit_softcapping),
            on_gpu=self.on_gpu,
        )
        return self.read + loss.at_work

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
        if level == "attention_kept":
            outputs = self._to_project + self._before_norm_after
            return self._attention_inputs + outputs + self._fetched
        return 0

    @property
    def _fetched(self) -> int:
        """Two offloaded layers, back on the device: the one at work and the next, on its way."""
        return 2 * self.moved if self.settings.cpu_offloading_num_layers else 0

    def _mlp_backward(self) -> PeakCandidate:
        tiles = self.settings.mlp_tiles
        b = self.b
        D = self.D
        F = self.F
        rows = ceil(self.t / tiles)
        # The hidden values and the gradients of gate and up; gate and up where they are made
        # again.
        at_once = b * rows * F * (5 if tiles > 1 or self._recomputes_mlp else 3)
        made = at_once + self.input + self.read  # the gradients of the output and of x
        made += self._multiplied
        freed = 0
        if self.config.has_norms_after:
            made += self.input  # the gradient of what the norm reads
            if self._recomputes_mlp:
                made += self._normed  # x, whose gradient has a place of its own
            else:
                freed = self._before_norm_after
        if self.u < self.t:
            made += self.read  # the gradient, gathered over tp
        if self._recomputes_mlp:
            made += self._recomputed + self._scales  # the normed input is where its gradient comes
        if self._recomputes_attention:
            made += self.input  # a, the second half's input
        gradients = 3 * b * D * F
        # In fp32 the tiles' sums are the gradients themselves.
        sums = 3 * self.W * D * F if tiles > 1 and b < self.W else 0
        return PeakCandidate(freed, made + sums, gradients)

    def _norm_after_backward(self) -> PeakCandidate:
        """Backward of the norm after the second half, before that of the MLP."""
        made = 2 * self.input + self._multiplied + self._wide_norm + self._recomputed
        if self._recomputes_mlp:
            made += self._mlp
        if self._recomputes_attention:
            made += self.input
        return PeakCandidate(0, made, 0)

    @property
    def _wide_norm(self) -> int:
        """What a norm's backward widens: on a CPU blocks of rows."""
        return 0 if self.on_gpu else 3 * self.W * min(self.u * self.D, max(BLOCK_ELEMENTS, self.D))

    def _norm_backward(self) -> PeakCandidate:
        """Backward of the second half's norm."""
        made = 2 * self.input + self.read + self._multiplied + self._wide_norm + self._recomputed
        if self._recomputes_attention:
            made += self.input
        freed = 0 if self._recomputes_mlp else self._mlp - self._normed
        return PeakCandidate(freed, made, 0)

    def _attention_backward(self) -> list[PeakCandidate]:
        D = self.D
        H = self.H
        heads = self.heads
        # The gradients of the output and of a; where the MLP is recomputed, the second is in the
        # place of the first.
        residual = (1 if self._recomputes_mlp else 2) * self.input
        freed = self._to_project + self._before_norm_after
        if not self._recomputes_mlp:
            freed += self._mlp + self._stream
        if self._recomputes_mlp and not self._recomputes_attention:
            freed += self.input
        weights = self.b * D * H * (2 * heads.N + 2 * heads.K)
        made = residual + self._recomputed
        if self.chunks > 1:
            return [PeakCandidate(freed, made + self._chunk_at_work, weights)]

        # The kernel, with the gradients of q, k and v in rows of H.
        rows = self.s * heads.m + 2 * self.T * heads.k
        kernel = self.s * heads.m * H * self.b + self._kernel_gradients(heads.m, heads.k)
        if self.gathers > 1:  # those of the earlier and of the own keys, put together
            kernel += rows * H * self.b
        # The gradients, what is sent of them and what arrives; then what that is put together to.
        exchange = self.b * H * (3 * self.s * (heads.m + 2 * heads.k) if self.a2a > 1 else 0)
        gathered = self.b * H * (rows + 2 * self.T * heads.k) if self.gathers > 1 else 0
        # The gradients of q, k and v, turned back, side by side; a GPU's kernel writes them there
        # at once. By then what the kernel kept is free.
        joined = self.b * H * self.t * (heads.N + 2 * heads.K)
        turned = 0 if self.on_gpu else self.b * H * self.t * (heads.N + heads.K)
        joining = 2 * joined + turned - self._exchanged - self._results - self._log_sums
        # The projection of q, k and v, with their weights joined to one.
        joined_weight = self.b * H * D * (heads.N + 2 * heads.K)
        projecting = 2 * self.read + joined + joined_weight
        most = max(kernel, exchange, gathered, joining, projecting)
        return [PeakCandidate(freed, made + most, weights)]

    def _kernel_gradients(self, m: int, k: int) -> int:
        """Return the gradients of m heads of q and k of keys and values, with the kernel's work.

        Those of a part of the documents are there with those of all. On a GPU the kernel sums up
        q's in fp32; beside that FlashAttention 2 makes the gradients of grouped keys and values for
        each query head (cuDNN's own work is not known), or cuDNN reads a padded copy of the
        output's gradient.
        """
        of_q = self.s * m * self.H
        of_kv = 2 * self.T * k * self.H
        gradients = 2 * self.b * (of_q + of_kv)
        if self.config.attn_logit_softcapping and not self.on_gpu:
            gradients += bytes_at_work(m, self.s, self.T, self.W) + (self.W - self.b) * of_kv
        if not self.on_gpu or not self.with_kernels:
            return gradients
        ungrouped = 2 * self.b * self.T * m * self.H if m > k else 0
        return gradients + 4 * of_q + max(ungrouped, self.b * of_q)

    @property
    def _chunk_at_work(self) -> int:
        """Backward of one group of heads: its q, its keys and values, and their gradients."""
        b = self.b
        H = self.H
        heads = self.heads
        m = heads.m // self.chunks
        k = heads.round_k
        sides = 2 if self.a2a > 1 else 1  # before and after the exchange
        of_results = b * self.t * heads.N * H
        # Where several groups read the same keys, their gradients are summed up.
        is_shared = m < k * heads.N // heads.K
        keys = 2 * self.T * k * H * (b * sides + self.W * is_shared)
        queries = self.s * m * H * b * 2 * sides  # with the gradient of their results
        kernel = self._kernel_gradients(m, k)
        of_x = self.read + max(kernel, 2 * b * self.T * k * H)
        return of_x + of_results + keys + queries
