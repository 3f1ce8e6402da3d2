"""What one rank holds in memory while it trains, in bytes, from numbers alone: no groups, no
tensors.

Shapes of parameters come from the modules themselves (made on the meta device) and from the
sharding table; what a layer and the loss keep and hold is activation_bytes.py's.
"""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import ceil, prod

import torch

from data.units import show_bytes
from model.config import ModelConfig
from model.gpt import GPTStage
from model.sharding import shardings_for
from parallel.config import LayoutConfig
from parallel.layout import single_process_layout
from parallel.schedule import chunks_in_flight, layers_of_stage, stages_of_rank
from pretrain.planner.activation_bytes import LayerMemory, Load, pinned_bytes


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
    """The most that comes and goes beside it: temporary results, exchanges, gradients on their
    way."""
    host: int = 0
    """In the host's memory, not the device's: what is offloaded."""

    @property
    def total(self) -> int:
        """On the device."""
        return sum(asdict(self).values()) - self.host

    def describe(self) -> str:
        parts = ", ".join(
            f"{name} {show_bytes(size)}" for name, size in asdict(self).items() if name != "host"
        )
        beside = f" and {show_bytes(self.host)} of the host's" if self.host else ""
        return f"{show_bytes(self.total)} ({parts}){beside}"


class MemoryModel:
    """The memory of one model's ranks, on any layout that check_layout accepts."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        master_bytes: int = 4,
        compute_bytes: int = 2,
        on_gpu: bool = True,
        optimizer_on_host: bool = False,
    ):
        """Args:
        master_bytes: of a stored parameter, and of its gradient where it is summed.
        compute_bytes: of an activation.
        on_gpu: with the GPU's kernels, and a host beside the device.
        optimizer_on_host: master weights, their gradients and moments live there
            (parallel/shard.py); on a GPU.
        """
        self.optimizer_on_host = optimizer_on_host and on_gpu
        self.config = config
        self.vocab_size = vocab_size
        self.master_bytes = master_bytes
        self.compute_bytes = compute_bytes
        self.on_gpu = on_gpu
        self._by_tp: dict[int, dict[str, list[tuple[int, int]]]] = {}
        self._elements: dict[tuple[str, int, int], int] = {}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shapes by name, of one layer and what stands around the layers."""
        stage = GPTStage(
            replace(self.config, num_layers=1),
            self.vocab_size,
            single_process_layout(torch.device("cpu")),
            attend=None,
        )
        return {name: tuple(parameter.shape) for name, parameter in stage.named_parameters()}

    def _pieces(self, tp: int) -> dict[str, list[tuple[int, int]]]:
        """By part ("layers", "embedding", "final_norm", "output"): [rows, elements of a row] of a
        tp rank's tensors."""
        if tp not in self._by_tp:
            table = shardings_for(list(self.shapes), self.config, tp)
            found: dict[str, list[tuple[int, int]]] = {}
            for name, shape in self.shapes.items():
                local = [
                    size // tp if dim == table[name].dim else size for dim, size in enumerate(shape)
                ]
                found.setdefault(name.split(".")[0], []).append((local[0], prod(local[1:])))
            self._by_tp[tp] = found
        return self._by_tp[tp]

    def elements(self, part: str, tp: int, shards: int = 1) -> int:
        """Parameters of a part on a tp rank, or in the largest of its shards (each tensor is cut by
        rows)."""
        if (part, tp, shards) not in self._elements:
            self._elements[part, tp, shards] = sum(
                ceil(rows / shards) * columns for rows, columns in self._pieces(tp)[part]
            )
        return self._elements[part, tp, shards]

    def parts_of_stage(self, number: int, num_stages: int) -> Counter:
        """How many of each part a pipeline stage holds."""
        is_first = number == 0
        is_last = number == num_stages - 1
        tied = not self.config.untie_embeddings_and_output_weights
        return Counter(
            layers=len(layers_of_stage(self.config.num_layers, number, num_stages)),
            final_norm=int(is_last),
            embedding=int(is_first or is_last and tied),
            output=int(is_last and not tied),
        )

    def parts_of_rank(self, layout: LayoutConfig, pp_rank: int) -> list[Counter]:
        """How many of each part the stages of a pipeline rank hold, stage by stage."""
        pp = layout.pipeline_model_parallel_size
        per_rank = layout.stages_per_rank
        return [
            self.parts_of_stage(number, pp * per_rank)
            for number in stages_of_rank(layout.schedule, pp_rank, pp, per_rank)
        ]

    def whole(self, layout: LayoutConfig, pp_rank: int) -> int:
        """Parameters of a pipeline rank's stages on one tp rank, before they are sharded."""
        return sum(
            count * self.elements(part, layout.tensor_model_parallel_size)
            for stage in self.parts_of_rank(layout, pp_rank)
            for part, count in stage.items()
            if count
        )

    def worst(self, load: Load) -> Memory:
        """The rank of the pipeline that needs most. The ranks between its ends hold less than one
        of them."""
        pp = load.layout.pipeline_model_parallel_size
        return max(
            (self.of_rank(load, rank) for rank in sorted({0, pp - 1})),
            key=lambda memory: memory.total,
        )

    def host_of_node(self, load: Load, processes: int) -> int:
        """Bytes of the host's memory that as many consecutive ranks take, where they take most."""
        if not (self.optimizer_on_host or load.memory.cpu_offloading_num_layers):
            return 0
        tp, pp, cp = load.layout.sizes
        of_stage = tp * cp * load.data_parallel_size
        world = tp * cp * load.data_parallel_size * pp
        of_rank = [self.of_rank(load, pp_rank).host for pp_rank in range(pp)]
        return max(
            sum(of_rank[rank // of_stage] for rank in range(first, min(first + processes, world)))
            for first in range(0, world, processes)
        )

    def of_rank(self, load: Load, pp_rank: int) -> Memory:
        """One pipeline rank; among its tp, cp and dp ranks the one with the most (parameters may
        split unevenly)."""
        layout, (tp, pp, _) = load.layout, load.layout.sizes
        per_rank = layout.stages_per_rank
        stages = self.parts_of_rank(layout, pp_rank)
        parts = sum(stages, Counter())
        shard = sum(
            count * self.elements(part, tp, load.shards) for part, count in parts.items() if count
        )
        whole = self.whole(layout, pp_rank)
        tensors = sum(count * len(self._pieces(tp)[part]) for part, count in parts.items() if count)
        layer = self.elements("layers", tp)
        roots = [
            sum(
                stage[part] * self.elements(part, tp)
                for part in stage
                if part != "layers" and stage[part]
            )
            for stage in stages
        ]

        layers = self.layer(load)
        in_flight = chunks_in_flight(layout.schedule, pp_rank, pp, per_rank, load.num_microbatches)
        offloaded = [
            min(stage["layers"], load.memory.cpu_offloading_num_layers) for stage in stages
        ]
        activations = in_flight * max(
            stage["layers"] * layers.kept.device + layers.tables - away * layers.moved
            for stage, away in zip(stages, offloaded, strict=True)
        )
        has_loss = any(stage["final_norm"] for stage in stages)
        loss = layers.kept_of_loss if has_loss else 0
        gathered = whole
        if layout.sharding_strategy == "optim_grads_params":
            # One stage per rank: the parts around the layers, a layer and the next. Several: torch
            # gathers up to three.
            gathered = (
                max(roots) + min(2, parts["layers"]) * layer
                if per_rank == 1
                else whole * min(3, per_rank) // per_rank
            )
        buffers = layers.working_set(has_loss)
        if not load.whole_gradients:
            # The output's gradient waits for the embedding's; a layer's is copied to be sent while
            # the next is made.
            waiting = self.elements("output" if parts["output"] else "embedding", tp)
            on_the_way = 2 * self.master_bytes * layer + self.compute_bytes * (layer + waiting)
            at_the_end = (self.master_bytes + self.compute_bytes) * max(roots)
            buffers = max(buffers + on_the_way, at_the_end - activations - loss)
        memory = Memory(
            parameters=self.master_bytes * shard,
            optimizer=2 * self.master_bytes * shard + 4 * tensors,
            gradients=self.master_bytes * (whole if load.whole_gradients else shard),
            gathered=self.compute_bytes * gathered,
            activations=activations,
            loss=loss,
            buffers=max(0, buffers),
            host=in_flight * max(offloaded) * layers.on_host,
        )
        return (
            self._with_optimizer_on_host(memory, load, parts) if self.optimizer_on_host else memory
        )

    def _with_optimizer_on_host(self, memory: Memory, load: Load, parts: Counter) -> Memory:
        """The shards of this rank and their moments are on the host; a unit's shard passes before
        it is gathered."""
        tp = load.layout.tensor_model_parallel_size
        pinned = {
            part: sum(
                pinned_bytes(self.master_bytes * ceil(rows / load.shards) * columns)
                for rows, columns in self._pieces(tp)[part]
            )
            for part, count in parts.items()
            if count
        }
        shards = sum(parts[part] * size for part, size in pinned.items())
        return replace(
            memory,
            parameters=0,
            optimizer=0,
            gradients=memory.gradients if load.whole_gradients else 0,
            buffers=memory.buffers + 2 * max(pinned.values()),
            host=memory.host + 2 * shards + memory.optimizer,
        )

    def layer(self, load: Load) -> LayerMemory:
        """What the layers of a rank keep and hold."""
        rows = (
            self.config.padded_vocab_size(self.vocab_size) // load.layout.tensor_model_parallel_size
        )
        return LayerMemory(self.config, rows, load, self.compute_bytes, self.on_gpu)
