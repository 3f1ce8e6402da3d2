"""The layouts that a phase of `layout: auto` could have, and the fastest of them that fits.

Memory is estimated by rank_bytes.py, time by step_time.py.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from data.units import show_bytes
from model.activation_memory.settings import KEEPS_INPUT_ONLY, Recompute
from parallel.config import LayoutConfig, ShardingStrategy
from pretrain.config.config import Config
from pretrain.planner.at_fault import Situation, layouts_that_work
from pretrain.planner.check_layout import check_phase_layout
from pretrain.planner.documents import UNKNOWN_DOCUMENTS, PhaseDocuments
from pretrain.planner.hardware import Hardware
from pretrain.planner.layout_search import is_inside_node, sizes_of_world, with_sizes
from pretrain.planner.machine import Device
from pretrain.planner.rank_bytes import MemoryModel, RankMemory
from pretrain.planner.step_time import StepTime, estimate_step
from pretrain.planner.workload import Workload
from pretrain.schedule.phases import Phase

EQUAL_TIME_FACTOR = 1.02
"""Step times within this factor of the fastest are no difference: the simpler layout is taken."""
STRATEGIES: tuple[ShardingStrategy, ...] = ("optim_grads", "optim", "optim_grads_params")
"""Sharding strategies, the first where the estimate sees no difference."""
RECOMPUTE_LEVELS: tuple[Recompute | None, ...] = (None, "selective", "full", "attention_kept")
"""Levels of recompute, in the same way."""
assert set(STRATEGIES) == set(get_args(ShardingStrategy))
SIZE_FIELDS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
}
"""Short names of the sizes -> fields of the layout."""
CHOSEN_FIELDS = (
    *SIZE_FIELDS.values(),
    "cp_comm_type",
    "hierarchical_context_parallel_sizes",
    "data_parallel_sharding_strategy",
)
"""Fields of the layout that a choice sets."""
ALL_OPEN = (*SIZE_FIELDS.values(), "data_parallel_sharding_strategy", "recompute_granularity")
"""All settings that a choice may be asked for."""
WORLD_FACTORS = (2, 4, 8, 16, 32)
"""Multiples of the world that are tried where nothing fits."""


@dataclass(frozen=True)
class Candidate:
    """A legal layout of a phase with what it is estimated to need."""

    phase: Phase
    dp: int
    memory: RankMemory
    step: StepTime

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.step.total

    @property
    def simplicity(self) -> tuple[int, ...]:
        """Rank among equally fast layouts: the smallest is taken."""
        return (
            *self.phase.layout.sizes,
            RECOMPUTE_LEVELS.index(self.phase.memory.recompute_granularity),
            STRATEGIES.index(self.phase.layout.sharding_strategy),
        )

    def describe(self) -> str:
        """Write the layout with all that was chosen."""
        layout = self.phase.layout
        level = self.phase.memory.recompute_granularity
        recompute = f" recompute {level}" if level else ""
        return f"{layout.describe()} dp {self.dp} {layout.sharding_strategy}{recompute}"

    def settled(self) -> Phase:
        """Return the phase with this layout as its own."""
        return dataclasses.replace(self.phase, predicted_bytes=self.memory.total)


@dataclass(frozen=True)
class LayoutChoice:
    """The layout that is taken, and what would be next."""

    best: Candidate
    next_best: Candidate | None
    """The fastest that fits with other sizes."""
    leaves_node: bool = False
    """Does its tp or its all-to-all leave a node, for want of another layout?"""

    def describe(self) -> str:
        """Write both with their memory, and how much slower the next is."""
        text = f"{self.best.describe()}, {show_bytes(self.best.memory.total)} per rank"
        if self.leaves_node:
            text += "; nothing fits whose tp and all-to-all stay inside a node"
        if self.next_best is None:
            return f"{text}; nothing else fits"
        slower = self.next_best.seconds / self.best.seconds
        return (
            f"{text}; next {self.next_best.describe()}, "
            f"{show_bytes(self.next_best.memory.total)}, {slower:.2f} of its time"
        )


def choose_layout(
    phase: Phase, config: Config, world_size: int, vocab_size: int, device: Device
) -> LayoutChoice:
    """Choose the fastest layout that fits, and the next.

    Raises:
        ValueError: none is legal, or none fits: with the memory of the one that needs least and
        what would help.
    """
    # Every legal layout is estimated, so that a refusal can name the one that needs least.
    model = MemoryModel.of_run(config, vocab_size, device.hardware)
    found = find_candidates(phase, config, world_size, model, device)
    if not found.legal:
        raise ValueError(_none_is_legal(phase, config, world_size, vocab_size))
    if not found.fitting:
        least = min(
            found.legal, key=lambda candidate: (candidate.memory.total, candidate.simplicity)
        )
        changes = _what_would_fit(phase, config, world_size, model, device)
        raise ValueError(
            f"phase {phase.name!r}: layout = auto: nothing fits {world_size} processes with "
            f"{device.describe()} each. The least is {least.describe()} with "
            f"{least.memory.describe()}. Fix: {'; or '.join(changes) or 'a smaller model'}."
        )
    return _choose_best(found)


@dataclass(frozen=True)
class FoundCandidates:
    """The layouts of a phase that are considered."""

    legal: list[Candidate]
    fitting: list[Candidate]
    """Those of them that fit into memory."""
    leave_node: bool
    """Are there some among them whose tp or all-to-all leaves a node?"""


def find_candidates(
    phase: Phase,
    config: Config,
    world_size: int,
    model: MemoryModel,
    device: Device,
    documents: PhaseDocuments = UNKNOWN_DOCUMENTS,
    *,
    across_nodes: bool = False,
) -> FoundCandidates:
    """Find the layouts of a phase that can be used, and those that fit.

    Where nothing fits whose tp and all-to-all stay inside a node, those that leave one are found.

    Args:
        documents: of the phase; without them every sample is one document.
        across_nodes: tp and the all-to-all may leave a node anyway.
    """
    node_size = device.hardware.devices_per_node
    legal: list[Candidate] = []
    # In one node nothing leaves it.
    is_one_node = world_size <= node_size
    for limit in (None,) if across_nodes or is_one_node else (node_size, None):
        legal = list(
            candidates(
                phase,
                config,
                world_size,
                model,
                device.hardware,
                documents,
                node_size=limit,
            )
        )
        fitting = [candidate for candidate in legal if candidate.memory.total <= device.usable]
        if fitting:
            return FoundCandidates(legal, fitting, limit is None and not is_one_node)
    return FoundCandidates(legal, [], not is_one_node)


def candidates(
    phase: Phase,
    config: Config,
    world_size: int,
    model: MemoryModel,
    hardware: Hardware,
    documents: PhaseDocuments = UNKNOWN_DOCUMENTS,
    *,
    node_size: int | None = None,
) -> Iterator[Candidate]:
    """Yield every legal layout that keeps what the phase gives.

    Args:
        documents: of the phase; without them every sample is one document.
        node_size: processes of a node, which neither tp nor an all-to-all leaves unless the phase
            gives its size; None = they may.
    """
    strategies = _strategies(phase)
    levels = _recompute_levels(phase)
    for layout in _layouts(phase, config, world_size, node_size):
        # Where the sizes alone are refused, no strategy and no recompute helps.
        plain = dataclasses.replace(phase, layout=layout).with_memory(recompute_granularity=None)
        if not layout.combination_problems() and check_phase_layout(
            plain, config, world_size, model.vocab_size
        ):
            continue
        for strategy in strategies:
            has_pipeline = layout.pipeline_model_parallel_size > 1
            if has_pipeline and strategy == "optim_grads" and "optim" in strategies:
                continue  # the same as optim there
            sharded = dataclasses.replace(
                layout, use_distributed_optimizer=None, data_parallel_sharding_strategy=strategy
            )
            for level in levels:
                changed = dataclasses.replace(phase, layout=sharded)
                changed = changed.with_memory(recompute_granularity=level)
                if not check_phase_layout(changed, config, world_size, model.vocab_size):
                    yield estimate(changed, world_size, model, hardware, documents)


def _strategies(phase: Phase) -> tuple[ShardingStrategy, ...]:
    """Return the sharding strategies that the phase leaves to choose from."""
    if "data_parallel_sharding_strategy" in phase.auto:
        return STRATEGIES
    return (phase.layout.sharding_strategy,)


def _recompute_levels(phase: Phase) -> tuple[Recompute | None, ...]:
    """Return the levels of recompute that the phase leaves to choose from."""
    if "recompute_granularity" not in phase.auto:
        return (phase.memory.recompute_granularity,)
    # Layers can be offloaded only under levels that keep little but their input.
    if phase.memory.cpu_offloading_num_layers:
        return tuple(level for level in RECOMPUTE_LEVELS if level in KEEPS_INPUT_ONLY)
    return RECOMPUTE_LEVELS


def _layouts(
    phase: Phase, config: Config, world_size: int, node_size: int | None
) -> Iterator[LayoutConfig]:
    """Yield the layouts of the world with the sizes that the phase gives."""
    asked = phase.layout
    is_tp_open = SIZE_FIELDS["tp"] in phase.auto
    for sizes in sizes_of_world(world_size):
        is_another = any(
            name not in phase.auto and size != given
            for name, size, given in zip(SIZE_FIELDS.values(), sizes, asked.sizes, strict=True)
        )
        if is_another:
            continue
        tp, pp, cp = sizes
        if is_tp_open and not is_inside_node(tp, node_size):
            continue
        # Levels of cp that are given come with cp itself.
        if asked.hierarchical_context_parallel_sizes and cp > 1:
            yield dataclasses.replace(
                asked, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
            )
        else:
            heads = config.model.num_attention_heads
            yield with_sizes(asked, heads, tp, pp, cp, node_size=node_size)


def estimate(
    phase: Phase,
    world_size: int,
    model: MemoryModel,
    hardware: Hardware,
    documents: PhaseDocuments = UNKNOWN_DOCUMENTS,
) -> Candidate:
    """Estimate the memory and the time of a phase with its layout."""
    load = Workload.of_phase(phase, world_size, documents)
    memory = model.estimate_worst(load)
    return Candidate(phase, load.data_parallel_size, memory, estimate_step(model, load, hardware))


def _choose_best(found: FoundCandidates) -> LayoutChoice:
    """Choose the simplest of the fastest that fit, and the fastest with other sizes."""
    fitting = found.fitting
    # The estimate is not good enough to tell small differences apart.
    fastest = min(candidate.seconds for candidate in fitting)
    as_fast = [each for each in fitting if each.seconds <= EQUAL_TIME_FACTOR * fastest]
    best = min(as_fast, key=lambda candidate: candidate.simplicity)
    sizes = best.phase.layout.sizes
    others = [each for each in fitting if each.phase.layout.sizes != sizes]
    following = min(others, key=lambda each: (each.seconds, each.simplicity), default=None)
    return LayoutChoice(best, following, found.leave_node)


# ---------------------------------------------------------------- where there is none


def _none_is_legal(phase: Phase, config: Config, world_size: int, vocab_size: int) -> str:
    """Say that no layout can run the phase, which given sizes are to blame, and what could."""
    where = f"phase {phase.name!r}: "
    sizes = zip(SIZE_FIELDS.items(), phase.layout.sizes, strict=True)
    given = [f"{short} {size}" for (short, name), size in sizes if name not in phase.auto]
    with_given = f" with the {', '.join(given)} that are given" if given else ""
    others = layouts_that_work(Situation(phase, config, world_size, vocab_size))
    lines = [
        f"{where}layout = auto: no layout of {world_size} processes can run it{with_given}. Fix: "
        f"change what is given; layouts that work: {others}."
    ]
    lines += [
        where + problem for problem in check_phase_layout(phase, config, world_size, vocab_size)
    ]
    return "\n".join(lines)


def _what_would_fit(
    phase: Phase, config: Config, world_size: int, model: MemoryModel, device: Device
) -> list[str]:
    """Name the nearest changes after which something fits, each with its layout."""
    # From what costs least to more processes.
    changes: list[tuple[str, Phase, int]] = []
    if "recompute_granularity" not in phase.auto and phase.memory.recompute_granularity is None:
        recomputed = phase.with_memory(recompute_granularity="full")
        changes.append(("recompute_granularity full", recomputed, world_size))
    if phase.micro_batch_size > 1:
        smaller = dataclasses.replace(phase, micro_batch_size=1)
        changes.append(("micro_batch_size 1", smaller, world_size))
    if set(phase.auto) != set(ALL_OPEN):
        all_open = dataclasses.replace(phase, auto=ALL_OPEN)
        changes.append(("leaving all sizes to auto", all_open, world_size))
    for factor in WORLD_FACTORS:
        changes.append((f"{world_size * factor} processes", phase, world_size * factor))

    # Each change by itself, with the best layout that it opens.
    found = []
    for what, changed, world in changes:
        others = find_candidates(changed, config, world, model, device)
        if others.fitting:
            best = _choose_best(others).best
            found.append(f"{what} ({best.describe()}, {show_bytes(best.memory.total)})")
            if world > world_size:  # the fewest more processes are enough
                break
    return found
