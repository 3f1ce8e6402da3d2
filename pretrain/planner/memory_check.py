"""Do the phases that are still to come fit into the memory of a device and of its host, and which
settings would fit?

The estimate is pretrain/planner/rank_bytes.py's. Beyond the device's memory a phase is refused before
anything is allocated; where an error of the estimate could be what is missing (planner/auto_layout.py:
MARGIN), it is warned of.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data.units import GIB, show_bytes
from model import compiled
from model.activation_memory.settings import KEEPS_INPUT_ONLY, Recompute
from parallel.layout import host_memory, launched_local_world_size
from parallel.ulysses import HeadSplit, chunk_counts
from pretrain.config.config import Config
from pretrain.planner.auto_layout import Device, load_of, memory_model
from pretrain.planner.check_layout import check_phase_layout
from pretrain.planner.check_phases import check_phase_memory
from pretrain.planner.hardware import CPU
from pretrain.planner.layout_search import with_sizes
from pretrain.planner.rank_bytes import Memory, MemoryModel
from pretrain.schedule.phases import Phase

LEANER: tuple[Recompute | None, ...] = (None, "selective", "attention_kept", "full")
"""Levels of recompute, each of which keeps less than those before it."""
LESS = 0.85
"""After the estimate was wrong: settings are named that are estimated to need at most so much of
it."""
TILES = (2, 4, 8, 16, 32)
LOSS_CHUNKS = (1024, 512, 256)
FACTORS = (2, 4, 8, 16, 32)
"""Values that are tried for mlp_tiles, loss_chunk_tokens, and as multiples of cp and of the
processes."""
LARGE_LOSS_CHUNKS = (8192, 4096)
"""Tokens that a GPU prefers for loss_chunk_tokens: each chunk reads and writes the weight's fp32
gradient once."""
LARGEST_LOGITS = 2 * GIB
"""Bytes of a chunk's logits beyond which a larger chunk is not worth its memory."""


@dataclass(frozen=True)
class Machine:
    """What each process has, or shares with the others of its node."""

    device: Device
    local_processes: int
    host_bytes: int
    """Of a node."""
    host_limit: str
    """What bounds it, in words."""
    is_fused: bool = True
    """Do its GPUs run pointwise parts as fused kernels? Without them a chunk of the loss holds fp32
    logits as well."""

    @staticmethod
    def here(config: Config) -> "Machine":
        given = config.memory.cpu_offloading_host_memory
        name = (
            f"cpu_offloading_host_memory = {given:g}"
            if given
            else f"the machine's {show_bytes(host_memory())}"
        )
        device = Device.here(config.layout)
        is_fused = device.hardware is CPU or compiled.obstacle() is None
        return Machine(
            device,
            launched_local_world_size(),
            int(given * GIB) if given else host_memory(),
            name,
            is_fused,
        )


@dataclass(frozen=True)
class MemoryReport:
    """What the check found, a line each."""

    lines: list[str]
    warnings: list[str]
    problems: list[str]


def check_memory(
    phases: list[Phase],
    config: Config,
    world_size: int,
    vocab_size: int,
    clock: int,
    machine: Machine | None = None,
) -> MemoryReport:
    """Every phase that is not over, with all its settings.

    A CPU is checked only with --device-memory-gib: its memory is not the process's alone.
    """
    machine = machine or Machine.here(config)
    report = MemoryReport([], [], [])
    model = memory_model(config, vocab_size, machine.device.hardware)
    if not model.on_gpu and config.layout.device_memory_gib is None:
        return report
    for phase in (phase for phase in phases if phase.end > clock):
        search = Search(phase, config, world_size, model, machine)
        memory = search.memory
        where = f"phase {phase.name!r}: "
        report.lines.append(
            f"phase {phase.name}: estimated memory of a process {memory.describe()}"
        )
        report.problems.extend(where + problem for problem in search.host_problems())
        needs = f"seq_length = {phase.seq_length}: needs {memory.describe()}"
        if memory.total > machine.device.memory_bytes:
            nearest = search.nearest(machine.device.usable) or ["a smaller model", "more processes"]
            has = f"{show_bytes(machine.device.memory_bytes)} of {machine.device.hardware.name} memory"
            report.problems.append(
                f"{where}{needs} (estimated), and a process has {has}. "
                f"Fix: {'; or '.join(nearest)}. To try it all the same: --device-memory-gib."
            )
        elif memory.total > machine.device.usable:
            report.warnings.append(
                f"{where}{needs}, which is more than {machine.device.describe()}"
            )
    return report


def memory_filter(
    config: Config, world_size: int, vocab_size: int | None
) -> Callable[[Phase], bool] | None:
    """Whether a phase fits into this machine's memory; None where that is not checked or known."""
    if vocab_size is None:
        return None
    machine = Machine.here(config)
    model = memory_model(config, vocab_size, machine.device.hardware)
    if not model.on_gpu and config.layout.device_memory_gib is None:
        return None

    def fits(phase: Phase) -> bool:
        search = Search(phase, config, world_size, model, machine)
        return search.memory.total <= machine.device.memory_bytes and not search.host_problems()

    return fits


def choose_loss_chunks(
    phases: list[Phase],
    config: Config,
    world_size: int,
    vocab_size: int,
    machine: Machine | None = None,
) -> list[Phase]:
    """Give each phase that leaves it open the largest chunk of the loss that its GPU has memory
    for."""
    machine = machine or Machine.here(config)
    model = memory_model(config, vocab_size, machine.device.hardware)
    if not model.on_gpu or not machine.is_fused:
        return phases
    rows = config.model.padded_vocab_size(vocab_size)

    def fits(phase: Phase) -> bool:
        needed = Search(phase, config, world_size, model, machine).memory.total
        return needed <= machine.device.usable

    def with_chunk(phase: Phase) -> Phase:
        columns = rows // phase.layout.tensor_model_parallel_size
        for tokens in LARGE_LOSS_CHUNKS:
            larger = with_memory(phase, loss_chunk_tokens=tokens)
            if tokens * columns * model.compute_bytes <= LARGEST_LOGITS and fits(larger):
                return larger
        return phase

    return [
        with_chunk(phase) if phase.memory.loss_chunk_tokens is None else phase for phase in phases
    ]


@dataclass(frozen=True)
class Search:
    """One phase, and the settings near it."""

    phase: Phase
    config: Config
    world_size: int
    model: MemoryModel
    machine: Machine

    @property
    def memory(self) -> Memory:
        return self._memory_of(self.phase, self.world_size)

    def _memory_of(self, phase: Phase, world_size: int) -> Memory:
        return self.model.worst(load_of(phase, world_size))

    def _host_of_node(self, phase: Phase, world_size: int) -> int:
        return self.model.host_of_node(load_of(phase, world_size), self.machine.local_processes)

    def host_problems(self) -> list[str]:
        """What is offloaded takes more than the host has."""
        count = self.machine.local_processes
        has = self.machine.host_bytes
        taken = self._host_of_node(self.phase, self.world_size)
        layers = self.phase.memory.cpu_offloading_num_layers
        if taken <= has:
            return []
        fits = [
            n
            for n in range(layers)
            if self._host_of_node(
                with_memory(self.phase, cpu_offloading_num_layers=n), self.world_size
            )
            <= has
        ]
        name = f"cpu_offloading_num_layers = {layers}" if layers else "optimizer_cpu_offload = True"
        fix = (
            f"at most {max(fits)} layers"
            if fits
            else "fewer processes on a node, or no --optimizer-cpu-offload"
        )
        return [
            f"{name}: takes {show_bytes(taken)} of a node's memory with {count} processes on it, beyond "
            f"{self.machine.host_limit}. Fix: {fix}, or more --cpu-offloading-host-memory where the node has it."
        ]

    def nearest(self, limit: int, count: int = 6) -> list[str]:
        """Changes after which a process needs at most `limit` bytes, those that cost least time
        first, in words."""
        found: list[str] = []
        offered: list[set[str]] = []
        for group in (*self._memory_settings(), *self._other_settings()):
            for what, phase, world in group:
                words = set(what.split(", "))
                if any(less <= words for less in offered):
                    continue  # a part of these changes is enough
                if check_phase_layout(
                    phase, self.config, world, self.model.vocab_size
                ) or check_phase_memory(phase, self.config.model.attention_backend):
                    continue
                memory = self._memory_of(phase, world)
                if (
                    memory.total <= limit
                    and self._host_of_node(phase, world) <= self.machine.host_bytes
                ):
                    found.append(f"{what} ({show_bytes(memory.total)})")
                    offered.append(words)
                    break  # the nearest of its group
            if len(found) == count:
                break
        return found

    def _memory_settings(self) -> Iterator[list[tuple[str, Phase, int]]]:
        """Groups of changes of the same kind, each from small to large; a level of recompute also
        with the others."""
        settings = self.phase.memory
        smaller = [{"loss_chunk_tokens": n} for n in LOSS_CHUNKS if n < settings.loss_tokens]
        tiles = [{"mlp_tiles": n} for n in TILES if n > settings.mlp_tiles]
        chunks = [
            {"attention_head_chunks": n}
            for n in self._head_chunks()
            if n > settings.attention_head_chunks
        ]
        for group in (smaller, tiles, chunks):
            yield [self._changed(change) for change in group]
        most = {
            name: value
            for group in (chunks, tiles, smaller)
            if group
            for name, value in group[-1].items()
        }
        present = settings.recompute_granularity
        for level in LEANER[LEANER.index(present) :]:
            if level == present:
                yield [self._changed(most)] if len(most) > 1 else []
            else:
                yield [
                    self._changed({"recompute_granularity": level} | extra)
                    for extra in ({}, *tiles, *chunks, most)
                ]
        for level in KEEPS_INPUT_ONLY:
            base = {} if level == present else {"recompute_granularity": level}
            counts = range(settings.cpu_offloading_num_layers + 1, self.config.model.num_layers + 1)
            if self.model.on_gpu:
                yield [
                    self._changed(base | extra | {"cpu_offloading_num_layers": n})
                    for extra in ({}, most)
                    for n in counts
                ]

    def _other_settings(self) -> Iterator[list[tuple[str, Phase, int]]]:
        phase = self.phase
        world = self.world_size
        if phase.micro_batch_size > 1:
            yield [("micro_batch_size 1", dataclasses.replace(phase, micro_batch_size=1), world)]
        if phase.layout.sharding_strategy != "optim_grads_params":
            layout = dataclasses.replace(
                phase.layout,
                use_distributed_optimizer=None,
                data_parallel_sharding_strategy="optim_grads_params",
            )
            yield [
                (
                    "data_parallel_sharding_strategy optim_grads_params",
                    dataclasses.replace(phase, layout=layout),
                    world,
                )
            ]
        yield [self._with_cp(factor, world) for factor in FACTORS]
        yield [(f"{world * factor} processes", phase, world * factor) for factor in FACTORS]
        yield [self._with_cp(factor, world * factor) for factor in FACTORS]

    def _with_cp(self, factor: int, world: int) -> tuple[str, Phase, int]:
        tp, pp, cp = self.phase.layout.sizes
        layout = with_sizes(
            self.phase.layout, self.config.model.num_attention_heads, tp, pp, cp * factor
        )
        what = f"context_parallel_size {cp * factor}"
        if layout.context_levels[1] > 1:
            what += " in two levels of {} x {}".format(*layout.context_levels)
        return (
            what + (f", {world} processes" if world != self.world_size else ""),
            dataclasses.replace(self.phase, layout=layout),
            world,
        )

    def _head_chunks(self) -> list[int]:
        tp = self.phase.layout.tensor_model_parallel_size
        model = self.config.model
        return chunk_counts(
            HeadSplit.make(
                model.num_attention_heads // tp,
                max(1, model.num_kv_heads // tp),
                self.phase.layout.context_levels[0],
            )
        )

    def _changed(self, change: dict) -> tuple[str, Phase, int]:
        return (
            ", ".join(f"{name} {value}" for name, value in change.items()),
            with_memory(self.phase, **change),
            self.world_size,
        )


def with_memory(phase: Phase, **changes) -> Phase:
    return dataclasses.replace(phase, memory=dataclasses.replace(phase.memory, **changes))


def describe_out_of_memory(
    phase: Phase,
    rank: int,
    figures: dict[str, int],
    config: Config,
    world_size: int,
    vocab_size: int,
    machine: Machine,
) -> str:
    """What to say when the device's memory was not enough all the same.

    Args:
        figures: bytes by name, as torch counts them (allocated, at most, reserved).
    """
    search = Search(
        phase,
        config,
        world_size,
        memory_model(config, vocab_size, machine.device.hardware),
        machine,
    )
    memory = search.memory
    counted = ", ".join(f"{name} {show_bytes(size)}" for name, size in figures.items())
    nearest = search.nearest(min(machine.device.usable, int(LESS * memory.total)), count=3)
    return (
        f"out of memory in phase {phase.name!r} on rank {rank} (process {os.getpid()}): {counted}; estimated were "
        f"{memory.describe()} of {show_bytes(machine.device.memory_bytes)}. To try: "
        f"{'; or '.join(nearest) or 'more processes'}."
    )
