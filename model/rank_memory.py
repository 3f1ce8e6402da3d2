"""What one rank holds in memory while it trains, in bytes, from numbers alone: no groups, no tensors.

Shapes of parameters come from the modules themselves (made on the meta device) and from the sharding
table; what backward needs is read off the forward path of gpt.py, line by line.

Legend as in gpt.py, with W the widest of fp32 and the compute dtype, b bytes of the compute dtype.
"""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from math import ceil, prod

import torch

from model.config import ModelConfig
from model.gpt import GPTStage
from model.sharding import shardings_for
from parallel.config import LayoutConfig
from parallel.layout import single_process_layout
from parallel.schedule import chunks_in_flight, layers_of_stage, stages_of_rank
from parallel.ulysses import HeadSplit

GIB = 2**30


def show_bytes(size: int) -> str:
    """A size for people: in GiB, or below one in MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: int
    """Its shard of the master weights."""
    optimizer: int
    """Moments and step counts of that shard."""
    gradients: int
    """The shard's, or the whole stage's where they are reduced once per step."""
    gathered: int
    """Parameters in the compute dtype, put together for forward and backward."""
    activations: int
    """What backward needs of all microbatches in flight, before the logits."""
    loss: int
    """What backward needs of the logits."""
    buffers: int
    """The most that comes and goes beside it: temporary results, exchanges, gradients on their way."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def describe(self) -> str:
        return f"{show_bytes(self.total)} ({', '.join(f'{n} {show_bytes(size)}' for n, size in asdict(self).items())})"


@dataclass(frozen=True)
class Load:
    """What a rank is to train: one layout, one length, one batch."""

    layout: LayoutConfig
    data_parallel_size: int
    seq_length: int
    micro_batch_size: int
    num_microbatches: int
    recompute: str | None
    offloaded_layers: int = 0
    """Of each stage: layers whose inputs recompute keeps in host memory (model/memory.py)."""

    @property
    def shards(self) -> int:
        """Ranks that share the parameters of a stage."""
        return self.data_parallel_size * self.layout.context_parallel_size

    @property
    def tokens(self) -> int:
        """t: of a microbatch on one context-parallel rank."""
        return self.seq_length * self.micro_batch_size // self.layout.context_parallel_size

    @property
    def whole_gradients(self) -> bool:
        """Are gradients kept whole until the last microbatch? (parallel/shard.py, parallel/pipeline.py)"""
        return self.layout.pipeline_model_parallel_size > 1 or (
            self.layout.sharding_strategy == "optim" and self.num_microbatches > 1)


class MemoryModel:
    """The memory of one model's ranks, on any layout that check_layout accepts."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, master_bytes: int = 4, compute_bytes: int = 2,
                 on_gpu: bool = True):
        """Args:
            master_bytes: of a stored parameter, and of its gradient where it is summed.
            compute_bytes: of an activation.
            on_gpu: with the GPU's kernels: norms that keep only their input, attention that reads grouped heads as
                they are. The CPU's are made of single operations.
        """
        self.config, self.vocab_size = config, vocab_size
        self.master_bytes, self.compute_bytes, self.on_gpu = master_bytes, compute_bytes, on_gpu
        self._by_tp: dict[int, dict[str, list[tuple[int, int]]]] = {}
        self._elements: dict[tuple[str, int, int], int] = {}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shapes by name, of one layer and what stands around the layers."""
        stage = GPTStage(replace(self.config, num_layers=1), self.vocab_size,
                         single_process_layout(torch.device("cpu")), attend=None)
        return {name: tuple(parameter.shape) for name, parameter in stage.named_parameters()}

    def _pieces(self, tp: int) -> dict[str, list[tuple[int, int]]]:
        """By part ("layers", "embedding", "final_norm", "output"): [rows, elements of a row] of a tp rank's tensors."""
        if tp not in self._by_tp:
            table = shardings_for(list(self.shapes), self.config, tp)
            found: dict[str, list[tuple[int, int]]] = {}
            for name, shape in self.shapes.items():
                local = [size // tp if dim == table[name].dim else size for dim, size in enumerate(shape)]
                found.setdefault(name.split(".")[0], []).append((local[0], prod(local[1:])))
            self._by_tp[tp] = found
        return self._by_tp[tp]

    def elements(self, part: str, tp: int, shards: int = 1) -> int:
        """Parameters of a part on a tp rank, or in the largest of its shards (each tensor is cut by rows)."""
        if (part, tp, shards) not in self._elements:
            self._elements[part, tp, shards] = sum(ceil(rows / shards) * columns for rows, columns in
                                                   self._pieces(tp)[part])
        return self._elements[part, tp, shards]

    def parts_of_stage(self, number: int, num_stages: int) -> Counter:
        """How many of each part a pipeline stage holds."""
        is_first, is_last = number == 0, number == num_stages - 1
        tied = not self.config.untie_embeddings_and_output_weights
        return Counter(layers=len(layers_of_stage(self.config.num_layers, number, num_stages)), final_norm=int(is_last),
                       embedding=int(is_first or is_last and tied), output=int(is_last and not tied))

    def parts_of_rank(self, layout: LayoutConfig, pp_rank: int) -> list[Counter]:
        """How many of each part the stages of a pipeline rank hold, stage by stage."""
        pp, per_rank = layout.pipeline_model_parallel_size, layout.stages_per_rank
        return [self.parts_of_stage(number, pp * per_rank)
                for number in stages_of_rank(layout.schedule, pp_rank, pp, per_rank)]

    def whole(self, layout: LayoutConfig, pp_rank: int) -> int:
        """Parameters of a pipeline rank's stages on one tp rank, before they are sharded."""
        return sum(count * self.elements(part, layout.tensor_model_parallel_size)
                   for stage in self.parts_of_rank(layout, pp_rank) for part, count in stage.items() if count)

    def worst(self, load: Load) -> Memory:
        """The rank of the pipeline that needs most. The ranks between its ends hold less than one of them."""
        pp = load.layout.pipeline_model_parallel_size
        return max((self.of_rank(load, rank) for rank in sorted({0, pp - 1})), key=lambda memory: memory.total)

    def of_rank(self, load: Load, pp_rank: int) -> Memory:
        """One pipeline rank; among its tp, cp and dp ranks the one with the most (parameters may split unevenly)."""
        layout, (tp, pp, _) = load.layout, load.layout.sizes
        per_rank = layout.stages_per_rank
        stages = self.parts_of_rank(layout, pp_rank)
        parts = sum(stages, Counter())
        shard = sum(count * self.elements(part, tp, load.shards) for part, count in parts.items() if count)
        whole = self.whole(layout, pp_rank)
        tensors = sum(count * len(self._pieces(tp)[part]) for part, count in parts.items() if count)
        layer = self.elements("layers", tp)
        roots = [sum(stage[part] * self.elements(part, tp) for part in stage if part != "layers" and stage[part])
                 for stage in stages]

        in_flight = chunks_in_flight(layout.schedule, pp_rank, pp, per_rank, load.num_microbatches)
        activations = in_flight * max(self._saved_of_stage(load, stage["layers"]) for stage in stages)
        if load.recompute == "full":
            activations += self.saved_per_layer(load)
        has_loss = any(stage["final_norm"] for stage in stages)
        loss = self.saved_of_loss(load) if has_loss else 0
        gathered = whole
        if layout.sharding_strategy == "optim_grads_params":
            # One stage per rank: the parts around the layers, a layer and the next. Several: torch gathers up to three.
            gathered = (max(roots) + min(2, parts["layers"]) * layer if per_rank == 1 else
                        whole * min(3, per_rank) // per_rank)
        buffers = self._working_set(load, has_loss)
        if not load.whole_gradients:
            # The output's gradient waits for the embedding's; a layer's is copied to be sent while the next is made.
            waiting = self.elements("output" if parts["output"] else "embedding", tp)
            on_the_way = 2 * self.master_bytes * layer + self.compute_bytes * (layer + waiting)
            at_the_end = (self.master_bytes + self.compute_bytes) * max(roots)
            buffers = max(buffers + on_the_way, at_the_end - activations - loss)
        return Memory(
            parameters=self.master_bytes * shard, optimizer=2 * self.master_bytes * shard + 4 * tensors,
            gradients=self.master_bytes * (whole if load.whole_gradients else shard),
            gathered=self.compute_bytes * gathered, activations=activations, loss=loss, buffers=buffers)

    # ------------------------------------------------------------ activations, as gpt.py makes them

    def heads(self, layout: LayoutConfig) -> tuple[int, int, int, int]:
        """N, K, m, k: query and key/value heads of a tp rank, and the most of a rank after the exchange."""
        tp = layout.tensor_model_parallel_size
        query, kv = self.config.num_attention_heads // tp, max(1, self.config.num_kv_heads // tp)
        return query, kv, *_most_heads(query, kv, layout.context_levels[0])

    def _norm(self, elements: int, rows: int) -> int:
        """An RMSNorm's input and what its backward needs beside it; its output is the next operation's input."""
        wide = max(4, self.compute_bytes)
        if self.on_gpu:
            return self.compute_bytes * elements + wide * rows
        return 2 * wide * elements + wide * rows  # the input widened, the normalized input

    def saved_per_layer(self, load: Load) -> int:
        """Bytes that one layer keeps of a microbatch for its backward, without recompute."""
        layout, config, b = load.layout, self.config, self.compute_bytes
        (tp, _, _), (a2a, gather) = layout.sizes, layout.context_levels
        D, H, F, t = config.hidden_size, config.head_size, config.ffn_hidden_size // tp, load.tokens
        N, K, m, k = self.heads(layout)
        between = self.tokens_between(load)
        norms = 2 * self._norm(between * D, between)
        if config.qk_layernorm:
            norms += self._norm(t * N * H, t * N) + self._norm(t * K * H, t * K)
        s, T = t * a2a, t * a2a * gather
        repeated = m if not self.on_gpu else k
        queries = s * (m + 2 * k) if a2a > 1 else s * m  # what the exchange brought is one tensor
        keys = 2 * T * repeated if gather > 1 or a2a == 1 or repeated > k else 0
        out = s * m + (t * N if a2a > 1 or gather > 1 or not self.on_gpu else 0)  # and as the projection reads it
        return norms + b * (2 * t * D + H * (queries + keys + out) + 4 * t * F) + max(4, b) * s * m

    def tokens_between(self, load: Load) -> int:
        """Tokens of a microbatch on one rank between the tensor-parallel parts."""
        layout = load.layout
        return load.tokens // (layout.tensor_model_parallel_size if layout.sequence_parallel else 1)

    def _saved_of_stage(self, load: Load, num_layers: int) -> int:
        """Bytes that a stage's layers keep of a microbatch: of each layer everything, or its input."""
        layer = self.saved_per_layer(load)
        if load.recompute == "full":
            layer = self.compute_bytes * self.tokens_between(load) * self.config.hidden_size
            num_layers = max(0, num_layers - load.offloaded_layers)
        tables = 2 * self.compute_bytes * load.tokens * self.config.head_size
        return num_layers * layer + tables + 8 * load.tokens

    def saved_of_loss(self, load: Load) -> int:
        """Bytes that final norm, logits and loss keep: the softmax in W bytes, the input of the projection."""
        t, D, between = load.tokens, self.config.hidden_size, self.tokens_between(load)
        return (self._norm(between * D, between) + self.compute_bytes * t * D + 10 * t
                + max(4, self.compute_bytes) * t * self._local_vocabulary(load))

    def _local_vocabulary(self, load: Load) -> int:
        return self.config.padded_vocab_size(self.vocab_size) // load.layout.tensor_model_parallel_size

    def _working_set(self, load: Load, has_loss: bool) -> int:
        """The largest of the temporary results: backward of an MLP, of an attention, the logits with their gradient."""
        b, (tp, _, _), (a2a, gather) = self.compute_bytes, load.layout.sizes, load.layout.context_levels
        D, H, F, t = self.config.hidden_size, self.config.head_size, self.config.ffn_hidden_size // tp, load.tokens
        _, _, m, k = self.heads(load.layout)
        mlp = b * t * (3 * F + 2 * D)
        copies = 3 if a2a > 1 else 1  # the gradients, what is sent of them, what is received
        attention = b * t * a2a * H * (copies * (m + 2 * k) + m) + (4 * b * t * a2a * gather * k * H) * (gather > 1)
        wide = max(4, b)
        logits = t * self._local_vocabulary(load) * (wide + (b if b < wide else 0)) if has_loss else 0
        return max(mlp, attention, logits)


@cache
def _most_heads(query: int, kv: int, a2a: int) -> tuple[int, int]:
    """Query and key/value heads of the rank that gets most of each in the exchange."""
    split = HeadSplit.make(query, kv, a2a)
    return tuple(max(stop - start for start, stop in ranges) for ranges in (split.query, split.kv))
