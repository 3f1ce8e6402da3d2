"""What one rank holds in memory while it trains, in bytes, from numbers alone.

No groups and no tensors are made. Parameters are counted by model_size.py and cut as the sharding
table says; what a layer and the loss keep and hold is activation_bytes.py's.
"""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import ceil, prod

from data.units import show_bytes
from model.config import ModelConfig
from model.sharding import shardings_for
from parallel.config import LayoutConfig
from parallel.schedule import chunks_in_flight, layers_of_stage, stages_of_rank
from pretrain.config.config import Config
from pretrain.planner.activation_bytes import LayerMemory
from pretrain.planner.hardware import Hardware
from pretrain.planner.kept_bytes import count_messages, pinned_bytes
from pretrain.planner.model_size import ModelSize
from pretrain.planner.muon_cost import STEP_BYTES, MuonCost
from pretrain.planner.step_moments import GradientSizes, Moment, StepMoments
from pretrain.planner.workload import Workload

Parts = Counter[str]
"""How many of each part a stage or rank holds; parts are "layers", "embedding", "final_norm" and
"output", the first word of a parameter's name."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank needs."""

    parameters: int
    """Its shard of the master weights."""
    optimizer: int
    """The optimizer's moments and step counts of that shard."""
    gradients: int
    """Those of the shard, or of the whole stage where they are reduced once per step; 0 where most
    is held before the first of them is made."""
    gathered: int
    """Parameters in the compute dtype, put together for forward and backward."""
    activations: int
    """What backward needs of all microbatches in flight, before the logits."""
    loss: int
    """What backward needs of the logits."""
    buffers: int
    """The most that comes and goes beside it: temporaries, exchanges, gradients on their way."""
    messages: int = 0
    """What stages hand on: buffers for what neighbours send, and outputs that wait for a
    gradient."""
    copy: int = 0
    """The copy of parameters and moments that saves write, on a CPU. A GPU's is on the host, beside
    what is offloaded (`MemoryModel.copy_bytes`)."""
    host: int = 0
    """What is offloaded, in the host's memory and not in the device's."""

    @property
    def total(self) -> int:
        """All bytes on the device."""
        return sum(asdict(self).values()) - self.host

    def describe(self) -> str:
        """Write the total, and what it is made of."""
        parts = ", ".join(
            f"{name} {show_bytes(size)}"
            for name, size in asdict(self).items()
            if name != "host" and (size or name not in ("copy", "messages"))
        )
        beside = f" and {show_bytes(self.host)} of the host's" if self.host else ""
        return f"{show_bytes(self.total)} ({parts}){beside}"


class MemoryModel:
    """Estimates the memory of a model's ranks, on any layout that check_layout accepts."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        master_bytes: int = 4,
        compute_bytes: int = 2,
        on_gpu: bool = True,
        optimizer_on_host: bool = False,
        copied_values: int = 0,
        with_kernels: bool = True,
        measures_logits: bool = False,
        muon: MuonCost | None = None,
    ):
        """
        Args:
            master_bytes: size of a stored parameter, and of its gradient where it is summed.
            compute_bytes: size of an activation.
            on_gpu: with the GPU's kernels, and a host beside the device.
            optimizer_on_host: master weights, their gradients and moments live there
                (parallel/shard.py); on a GPU.
            with_kernels: count what a GPU's attention kernel takes beside its results.
            copied_values: values of each parameter that saves copy: none, the weight, or the weight
                and its moments.
            measures_logits: attention's largest logits are computed beside it; it takes time.
            muon: what it takes where it updates the hidden matrices; None = AdamW updates all.
        """
        self.config = config
        self.vocab_size = vocab_size
        self.size = ModelSize(config, vocab_size)
        self.master_bytes = master_bytes
        self.compute_bytes = compute_bytes
        self.on_gpu = on_gpu
        self.optimizer_on_host = optimizer_on_host and on_gpu
        self.copied_values = copied_values
        self.with_kernels = with_kernels
        self.measures_logits = measures_logits
        self.muon = muon
        # A layout search asks for the same parts of thousands of layouts.
        self._pieces = cache(self._find_pieces)
        self.count_elements = cache(self._count_elements)

    @staticmethod
    def of_run(
        config: Config, vocab_size: int, hardware: Hardware, *, with_kernels: bool = True
    ) -> "MemoryModel":
        """Return the model of a run's ranks on that hardware."""
        master = 8 if config.optimizer.fp64 else 4
        saves = config.checkpoint
        copied = 1 if saves.no_save_optim else 3
        return MemoryModel(
            config.model,
            vocab_size,
            master_bytes=master,
            compute_bytes=2 if config.optimizer.bf16 else master,
            on_gpu=not hardware.is_cpu,
            optimizer_on_host=config.optimizer.optimizer_cpu_offload,
            copied_values=copied if saves.save and saves.async_save else 0,
            with_kernels=with_kernels,
            measures_logits=config.optimizer.qk_clip or config.logging.log_max_attention_logit,
            muon=MuonCost.of_run(config, vocab_size, on_gpu=not hardware.is_cpu),
        )

    # ------------------------------------------------------------ parameters of a rank

    def _find_pieces(self, tp: int) -> dict[str, list[tuple[int, int]]]:
        """Return [rows, elements of a row] of a tp rank's tensors, by part."""
        shapes = self.size.shapes
        table = shardings_for(list(shapes), self.config, tp)
        found: dict[str, list[tuple[int, int]]] = {}
        for name, shape in shapes.items():
            rows, *row = [
                size // tp if dim == table[name].dim else size for dim, size in enumerate(shape)
            ]
            part = name.split(".")[0]
            found.setdefault(part, []).append((rows, prod(row)))
        return found

    def _count_elements(self, part: str, tp: int, shards: int = 1) -> int:
        """Count the parameters of a part on a tp rank, or in the largest of its shards.

        Each tensor is cut by rows.
        """
        return sum(ceil(rows / shards) * columns for rows, columns in self._pieces(tp)[part])

    def parts_of_stage(self, number: int, num_stages: int) -> Parts:
        """Count the parts that a pipeline stage holds."""
        is_first = number == 0
        is_last = number == num_stages - 1
        tied = not self.config.untie_embeddings_and_output_weights
        return Counter(
            layers=len(layers_of_stage(self.config.num_layers, number, num_stages)),
            final_norm=int(is_last),
            embedding=int(is_first or is_last and tied),
            output=int(is_last and not tied),
        )

    def parts_of_rank(self, layout: LayoutConfig, pp_rank: int) -> list[Parts]:
        """Count the parts that the stages of a pipeline rank hold, stage by stage."""
        pp = layout.pipeline_model_parallel_size
        per_rank = layout.stages_per_rank
        return [
            self.parts_of_stage(number, pp * per_rank)
            for number in stages_of_rank(layout.schedule, pp_rank, pp, per_rank)
        ]

    def count_parameters(self, layout: LayoutConfig, pp_rank: int) -> int:
        """Count the parameters of a pipeline rank's stages on one tp rank, before sharding."""
        tp = layout.tensor_model_parallel_size
        return sum(self._elements_of(parts, tp) for parts in self.parts_of_rank(layout, pp_rank))

    def _elements_of(self, parts: Parts, tp: int, shards: int = 1) -> int:
        return sum(count * self.count_elements(part, tp, shards) for part, count in held(parts))

    # ------------------------------------------------------------ memory of a rank

    def layer_memory(self, load: Workload) -> LayerMemory:
        """Return what the layers of a rank keep and hold."""
        rows = self.config.padded_vocab_size(self.vocab_size)
        return LayerMemory(
            self.config,
            rows // load.layout.tensor_model_parallel_size,
            load,
            compute_bytes=self.compute_bytes,
            on_gpu=self.on_gpu,
            with_kernels=self.with_kernels,
        )

    def estimate_worst(self, load: Workload) -> RankMemory:
        """Estimate the rank of the pipeline that needs most.

        The ranks between its ends hold less than one of them.
        """
        ends = {0, load.layout.pipeline_model_parallel_size - 1}
        estimates = [self.estimate_rank(load, pp_rank) for pp_rank in sorted(ends)]
        return max(estimates, key=lambda memory: memory.total)

    def estimate_host_of_node(self, load: Workload, processes: int) -> int:
        """Return the bytes of a host that `processes` consecutive ranks offload to at most."""
        if not (self.optimizer_on_host or load.memory.cpu_offloading_num_layers):
            return 0
        pp = load.layout.pipeline_model_parallel_size
        of_stage = [self.estimate_rank(load, pp_rank).host for pp_rank in range(pp)]
        return _most_of_node(load, processes, of_stage)

    def estimate_copies_of_node(self, load: Workload, processes: int) -> int:
        """Return the bytes of a host that the copies of `processes` consecutive ranks take."""
        pp = load.layout.pipeline_model_parallel_size
        of_stage = [self.copy_bytes(load, pp_rank) for pp_rank in range(pp)]
        return _most_of_node(load, processes, of_stage)

    def copy_bytes(self, load: Workload, pp_rank: int) -> int:
        """Return the bytes of a pipeline rank's copy of what saves write."""
        if not self.copied_values:
            return 0
        return self.saved_bytes(load, pp_rank, with_optimizer=self.copied_values > 1)

    def saved_bytes(self, load: Workload, pp_rank: int, *, with_optimizer: bool) -> int:
        """Return the bytes of a pipeline rank's state that a checkpoint holds."""
        parts = sum(self.parts_of_rank(load.layout, pp_rank), Counter())
        tp = load.layout.tensor_model_parallel_size
        weights = self.master_bytes * self._elements_of(parts, tp, load.shards)
        return weights + (self._optimizer_bytes(load, parts) if with_optimizer else 0)

    def _optimizer_bytes(self, load: Workload, parts: Parts) -> int:
        """Count what the optimizer keeps of the parts of a rank: moments and step counts."""
        tp = load.layout.tensor_model_parallel_size
        shard = self._elements_of(parts, tp, load.shards)
        tensors = sum(count * len(self._pieces(tp)[part]) for part, count in held(parts))
        size = 2 * self.master_bytes * shard + STEP_BYTES * tensors
        if self.muon is not None:
            size -= self.muon.of_rank(parts["layers"], tp, load.shards, self.master_bytes).saved
        return size

    def estimate_rank(self, load: Workload, pp_rank: int) -> RankMemory:
        """Estimate one pipeline rank: of its tp, cp and dp ranks the one with the most.

        Parameters may split unevenly.
        """
        layout = load.layout
        tp = layout.tensor_model_parallel_size
        stages = self.parts_of_rank(layout, pp_rank)
        parts = sum(stages, Counter())
        # Parameters: the shard that the optimizer updates, and what forward gathers of all shards.
        shard = self._elements_of(parts, tp, load.shards)
        whole = self.count_parameters(layout, pp_rank)
        # Activations: of each pair of stage and microbatch in flight, as many as the largest has.
        layers = self.layer_memory(load)
        in_flight = chunks_in_flight(
            layout.schedule,
            pp_rank,
            layout.pipeline_model_parallel_size,
            layout.stages_per_rank,
            load.num_microbatches,
        )
        offloaded = [
            min(stage["layers"], load.memory.cpu_offloading_num_layers) for stage in stages
        ]
        activations = in_flight * max(
            stage["layers"] * layers.kept.device + layers.tables - away * layers.moved
            for stage, away in zip(stages, offloaded, strict=True)
        )
        has_loss = any(stage["final_norm"] for stage in stages)
        loss = layers.kept_of_loss if has_loss else 0
        moments = StepMoments(
            layers,
            self._gradient_sizes(load, stages),
            gathered=self.compute_bytes * self._gathered(load, stages, whole),
            activations=activations,
            loss=loss,
            gradients=self.master_bytes * (whole if load.whole_gradients else shard),
            in_flight=in_flight,
        )
        most = moments.fullest(
            load.num_microbatches * layout.stages_per_rank,
            has_pipeline=layout.pipeline_model_parallel_size > 1,
        )
        if self.muon is not None:
            muon = self.muon.of_rank(parts["layers"], tp, load.shards, self.master_bytes)
            # The gradients' shards and Muon's buffers, when all else is gone.
            update = Moment(0, 0, 0, self.master_bytes * shard, muon.buffers)
            most = max(most, update, key=lambda moment: moment.total)
        memory = RankMemory(
            parameters=self.master_bytes * shard,
            optimizer=self._optimizer_bytes(load, parts),
            gradients=most.gradients,
            gathered=most.gathered,
            activations=most.activations,
            loss=most.loss,
            buffers=most.buffers,
            messages=layers.input * count_messages(load, pp_rank, in_flight),
            copy=0 if self.on_gpu else self.copy_bytes(load, pp_rank),
            host=in_flight * max(offloaded) * layers.on_host,
        )
        if self.optimizer_on_host:
            return self._with_optimizer_on_host(memory, load, parts)
        return memory

    def _around_layers(self, stages: list[Parts], tp: int) -> int:
        """Count the parameters that the largest stage has around its layers."""
        return max(self._elements_of(Counter({**stage, "layers": 0}), tp) for stage in stages)

    def _gathered(self, load: Workload, stages: list[Parts], whole: int) -> int:
        """Count the parameters that are put together at once."""
        layout = load.layout
        is_cast = self.compute_bytes != self.master_bytes
        if load.shards == 1 and not is_cast and not self.optimizer_on_host:
            return 0  # one rank uses its shard (parallel/one_rank.py)
        if layout.sharding_strategy != "optim_grads_params":
            return whole
        tp = layout.tensor_model_parallel_size
        per_rank = layout.stages_per_rank
        if per_rank > 1:  # torch gathers up to three stages
            return whole * min(3, per_rank) // per_rank
        # The parts around the layers, a layer and the next.
        num_layers = sum(stage["layers"] for stage in stages)
        two_layers = min(2, num_layers) * self.count_elements("layers", tp)
        return self._around_layers(stages, tp) + two_layers

    def _gradient_sizes(self, load: Workload, stages: list[Parts]) -> GradientSizes:
        """Count the gradients that are on their way at once."""
        tp = load.layout.tensor_model_parallel_size
        has_output = any(stage["output"] for stage in stages)
        return GradientSizes(
            layer=self.count_elements("layers", tp),
            around=self._around_layers(stages, tp),
            waiting=self.count_elements("output" if has_output else "embedding", tp),
            master_bytes=self.master_bytes,
            compute_bytes=self.compute_bytes,
            shards=1 if load.whole_gradients else load.shards,
            are_whole=load.whole_gradients,
            is_first_in_place=load.shards == 1 and not self.optimizer_on_host,
        )

    def _with_optimizer_on_host(
        self, memory: RankMemory, load: Workload, parts: Parts
    ) -> RankMemory:
        """Move the rank's shards and their moments to the host.

        A unit's shard passes through the device before it is gathered.
        """
        tp = load.layout.tensor_model_parallel_size
        pinned = {
            part: sum(
                pinned_bytes(self.master_bytes * ceil(rows / load.shards) * columns)
                for rows, columns in self._pieces(tp)[part]
            )
            for part, _ in held(parts)
        }
        shards = sum(parts[part] * size for part, size in pinned.items())
        return replace(
            memory,
            parameters=0,
            optimizer=0,
            gradients=memory.gradients if load.whole_gradients else 0,
            buffers=memory.buffers + 2 * max(pinned.values()),
            # The master weights and their gradients; Adam's moments are not pinned.
            host=memory.host + 2 * shards + memory.optimizer,
        )


def held(parts: Parts) -> list[tuple[str, int]]:
    """Return the parts that are there, with how many of each."""
    return [(part, count) for part, count in parts.items() if count]


def _most_of_node(load: Workload, processes: int, of_stage: list[int]) -> int:
    """Return the most bytes that consecutive ranks have together.

    Args:
        of_stage: bytes of a rank of each pipeline stage.
    """
    # Ranks of one pipeline stage are consecutive.
    tp, pp, cp = load.layout.sizes
    ranks_of_stage = tp * cp * load.data_parallel_size
    world = ranks_of_stage * pp
    of_ranks = [of_stage[rank // ranks_of_stage] for rank in range(world)]
    return max(sum(of_ranks[first : first + processes]) for first in range(0, world, processes))
