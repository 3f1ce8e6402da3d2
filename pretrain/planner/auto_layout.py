"""`layout: auto`: the layout of a phase by estimated memory and step time (pretrain/planner/rank_bytes.py,
pretrain/planner/step_time.py).

A choice is made once: it is a function of the configuration, the number of processes and the
device, and a checkpoint keeps it. Whoever continues on as many processes gets the stored one, also
where the estimate would by now choose another.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass

from data.units import GIB, show_bytes
from model.activation_memory.settings import KEEPS_INPUT_ONLY, MemorySettings
from parallel.config import LayoutConfig
from parallel.layout import device_here
from pretrain.config.config import Config
from pretrain.planner.activation_bytes import Load
from pretrain.planner.at_fault import Situation, layouts_that_work
from pretrain.planner.check_layout import check_phase_layout
from pretrain.planner.hardware import CPU, TABLE, Hardware, find_hardware
from pretrain.planner.layout_search import sizes_of_world, with_sizes
from pretrain.planner.rank_bytes import Memory, MemoryModel
from pretrain.planner.step_time import step_seconds
from pretrain.problems import attempt
from pretrain.schedule.phases import Phase

MARGIN = 0.1
"""Share of the device's memory that stays free: for the libraries, fragmentation and the estimate's
error."""
AS_FAST = 1.02
"""Step times within this factor of the fastest are no difference: the simpler layout is taken."""
STRATEGIES = ("optim_grads", "optim", "optim_grads_params")
"""Sharding strategies, the first where the estimate sees no difference."""
LEVELS = (None, "selective", "full", "attention_kept")
"""Levels of recompute, in the same way."""
CHOSEN = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "cp_comm_type",
    "hierarchical_context_parallel_sizes",
    "data_parallel_sharding_strategy",
)
"""Fields of the layout that a choice sets."""


@dataclass(frozen=True)
class Device:
    """What each process computes on."""

    hardware: Hardware
    memory_bytes: int

    @staticmethod
    def here(config: LayoutConfig) -> "Device":
        """This process's device; a GPU without a row in the table is ranked with an A100's
        rates."""
        name, memory = device_here()
        hardware = (
            CPU
            if name == "cpu"
            else find_hardware(name) or dataclasses.replace(TABLE["A100"], name=name)
        )
        return Device(hardware, int((config.device_memory_gib or memory // GIB) * GIB))

    @property
    def usable(self) -> int:
        return int((1 - MARGIN) * self.memory_bytes)

    def describe(self) -> str:
        return (
            f"{show_bytes(self.usable)} (all but a tenth of the {show_bytes(self.memory_bytes)} of a "
            f"{self.hardware.name})"
        )


@dataclass(frozen=True)
class Candidate:
    """A legal layout of a phase with what it is estimated to need."""

    phase: Phase
    dp: int
    memory: Memory
    seconds: float

    @property
    def simplicity(self) -> tuple:
        """Of two equally fast layouts the smaller is taken."""
        tp, pp, cp = self.phase.layout.sizes
        return (
            tp,
            pp,
            cp,
            LEVELS.index(self.phase.memory.recompute_granularity),
            STRATEGIES.index(self.phase.layout.sharding_strategy),
        )

    def describe(self) -> str:
        level = self.phase.memory.recompute_granularity
        recompute = f" recompute {level}" if level else ""
        return f"{self.phase.layout.describe()} dp {self.dp} {self.phase.layout.sharding_strategy}{recompute}"

    def settled(self) -> Phase:
        return dataclasses.replace(self.phase, predicted_bytes=self.memory.total)


@dataclass(frozen=True)
class Choice:
    best: Candidate
    next_best: Candidate | None
    """The fastest that fits with other sizes."""

    def describe(self) -> str:
        text = f"{self.best.describe()}, {show_bytes(self.best.memory.total)} per rank"
        if self.next_best is None:
            return f"{text}; nothing else fits"
        slower = self.next_best.seconds / self.best.seconds
        return (
            f"{text}; next {self.next_best.describe()}, {show_bytes(self.next_best.memory.total)}, "
            f"{slower:.2f} of its time"
        )


def memory_model(config: Config, vocab_size: int, hardware: Hardware) -> MemoryModel:
    """The model of the run's ranks on that hardware."""
    master = 8 if config.optimizer.fp64 else 4
    return MemoryModel(
        config.model,
        vocab_size,
        master_bytes=master,
        compute_bytes=2 if config.optimizer.bf16 else master,
        on_gpu=hardware is not CPU,
        optimizer_on_host=config.optimizer.optimizer_cpu_offload,
    )


def candidates(
    phase: Phase, config: Config, world_size: int, model: MemoryModel, hardware: Hardware
) -> Iterator[Candidate]:
    """Every legal layout that keeps what the phase gives."""
    strategies = (
        STRATEGIES
        if "data_parallel_sharding_strategy" in phase.auto
        else (phase.layout.sharding_strategy,)
    )
    given = phase.memory.recompute_granularity
    recomputes = LEVELS if "recompute_granularity" in phase.auto else (given,)
    if phase.memory.cpu_offloading_num_layers and "recompute_granularity" in phase.auto:
        recomputes = tuple(level for level in recomputes if level in KEEPS_INPUT_ONLY)
    for layout in _layouts(phase, config, world_size):
        pp = layout.pipeline_model_parallel_size
        plain = _with_recompute(dataclasses.replace(phase, layout=layout), None)
        if not layout.combination_problems() and check_phase_layout(
            plain, config, world_size, model.vocab_size
        ):
            continue  # whatever the strategy and the recompute
        for strategy in strategies:
            if pp > 1 and strategy == "optim_grads" and "optim" in strategies:
                continue  # the same as optim there
            chosen = dataclasses.replace(
                layout, use_distributed_optimizer=None, data_parallel_sharding_strategy=strategy
            )
            for recompute in recomputes:
                candidate = _with_recompute(dataclasses.replace(phase, layout=chosen), recompute)
                if not check_phase_layout(candidate, config, world_size, model.vocab_size):
                    yield _estimate(candidate, world_size, model, hardware)


def _with_recompute(phase: Phase, level: str | None) -> Phase:
    return dataclasses.replace(
        phase, memory=dataclasses.replace(phase.memory, recompute_granularity=level)
    )


def _layouts(phase: Phase, config: Config, world_size: int) -> Iterator[LayoutConfig]:
    """Layouts of the world with the sizes that the phase gives."""
    asked = phase.layout
    heads = config.model.num_attention_heads
    for sizes in sizes_of_world(world_size):
        if any(
            name not in phase.auto and size != given
            for name, size, given in zip(CHOSEN[:3], sizes, asked.sizes, strict=True)
        ):
            continue
        tp, pp, cp = sizes
        if asked.hierarchical_context_parallel_sizes and cp > 1:
            yield dataclasses.replace(
                asked, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
            )
        else:
            yield with_sizes(asked, heads, tp, pp, cp)


def load_of(phase: Phase, world_size: int) -> Load:
    """What the phase asks of a rank."""
    return Load(
        phase.layout,
        phase.data_parallel_size(world_size),
        phase.seq_length,
        phase.micro_batch_size,
        phase.num_microbatches(world_size),
        phase.memory,
    )


def _estimate(phase: Phase, world_size: int, model: MemoryModel, hardware: Hardware) -> Candidate:
    load = load_of(phase, world_size)
    return Candidate(
        phase, load.data_parallel_size, model.worst(load), step_seconds(model, load, hardware)
    )


def choose_layout(
    phase: Phase, config: Config, world_size: int, vocab_size: int, device: Device
) -> Choice:
    """The fastest layout that fits, and the next.

    Raises:
        ValueError: none is legal, or none fits: with the memory of the one that needs least and
        what would help.
    """
    model = memory_model(config, vocab_size, device.hardware)
    found = list(candidates(phase, config, world_size, model, device.hardware))
    if not found:
        raise ValueError(_none_is_legal(phase, config, world_size, vocab_size))
    fitting = [candidate for candidate in found if candidate.memory.total <= device.usable]
    if not fitting:
        least = min(found, key=lambda candidate: (candidate.memory.total, candidate.simplicity))
        raise ValueError(
            f"phase {phase.name!r}: layout = auto: nothing fits {world_size} processes with {device.describe()} each. "
            f"The least is {least.describe()} with {least.memory.describe()}. "
            f"Fix: {'; or '.join(_what_would_fit(phase, config, world_size, model, device)) or 'a smaller model'}."
        )
    return _best(fitting)


def _best(fitting: list[Candidate]) -> Choice:
    fastest = min(candidate.seconds for candidate in fitting)
    best = min(
        (candidate for candidate in fitting if candidate.seconds <= AS_FAST * fastest),
        key=lambda candidate: candidate.simplicity,
    )
    others = [
        candidate
        for candidate in fitting
        if candidate.phase.layout.sizes != best.phase.layout.sizes
    ]
    return Choice(
        best,
        min(others, key=lambda candidate: (candidate.seconds, candidate.simplicity), default=None),
    )


def _none_is_legal(phase: Phase, config: Config, world_size: int, vocab_size: int) -> str:
    where = f"phase {phase.name!r}: "
    given = [
        f"{name} {size}"
        for name, size in zip(("tp", "pp", "cp"), phase.layout.sizes, strict=True)
        if CHOSEN[("tp", "pp", "cp").index(name)] not in phase.auto
    ]
    others = layouts_that_work(Situation(phase, config, world_size, vocab_size))
    lines = [
        f"{where}layout = auto: no layout of {world_size} processes can run it"
        + (f" with the {', '.join(given)} that are given" if given else "")
        + f". Fix: change what is given; layouts that work: {others}."
    ]
    lines += [
        where + problem for problem in check_phase_layout(phase, config, world_size, vocab_size)
    ]
    return "\n".join(lines)


def _what_would_fit(
    phase: Phase, config: Config, world_size: int, model: MemoryModel, device: Device
) -> list[str]:
    """The nearest changes after which something fits, each with its layout."""
    all_open = (*CHOSEN[:3], "data_parallel_sharding_strategy", "recompute_granularity")
    changes = []
    if "recompute_granularity" not in phase.auto and phase.memory.recompute_granularity is None:
        changes.append(("recompute_granularity full", _with_recompute(phase, "full"), world_size))
    if phase.micro_batch_size > 1:
        changes.append(
            ("micro_batch_size 1", dataclasses.replace(phase, micro_batch_size=1), world_size)
        )
    if set(phase.auto) != set(all_open):
        changes.append(
            ("leaving all sizes to auto", dataclasses.replace(phase, auto=all_open), world_size)
        )
    changes += [
        (f"{world_size * factor} processes", phase, world_size * factor)
        for factor in (2, 4, 8, 16, 32)
    ]
    found = []
    for what, changed, world in changes:
        fitting = [
            candidate
            for candidate in candidates(changed, config, world, model, device.hardware)
            if candidate.memory.total <= device.usable
        ]
        if fitting:
            best = _best(fitting).best
            found.append(f"{what} ({best.describe()}, {show_bytes(best.memory.total)})")
            if world > world_size:
                break
    return found


# ---------------------------------------------------------------- once and for all


def settle_layouts(
    phases: list[Phase],
    config: Config,
    world_size: int,
    vocab_size: int,
    stored: dict,
    clock: int,
    device: Device | None = None,
) -> tuple[list[Phase], dict, list[str]]:
    """Give every phase of `layout: auto` its layout -> (phases, what a checkpoint keeps of them by
    name, a line each).

    Args:
        stored: what the checkpoint that is continued kept, by phase name.
        clock: positions consumed: phases that are over need not fit into memory any more.

    Raises:
        ValueError: some phase has no layout; all at once.
    """
    if not any(phase.auto for phase in phases):
        return phases, {}, []
    device = device or Device.here(config.layout)
    model = memory_model(config, vocab_size, device.hardware)
    settled = []
    records = {}
    lines = []
    problems = []
    for phase in phases:
        if not phase.auto:
            settled.append(phase)
            continue
        asked = _asked(phase, world_size)
        before = stored.get(phase.name)
        if before and _asked_before(before) == asked:
            kept = _estimate(with_choice(phase, before), world_size, model, device.hardware)
            text = f"{kept.describe()}, {show_bytes(kept.memory.total)} per rank (kept from the checkpoint)"
        else:
            room = device if phase.end > clock else dataclasses.replace(device, memory_bytes=2**63)
            choice = attempt(
                problems,
                lambda p=phase, d=room: choose_layout(p, config, world_size, vocab_size, d),
            )
            if choice is None:
                continue
            kept = choice.best
            text = choice.describe() + _why_anew(before, asked)
        settled.append(kept.settled())
        records[phase.name] = _record(kept, asked)
        lines.append(f"phase {phase.name}: layout auto: {text}")
    if problems:
        raise ValueError("\n".join(problems))
    return settled, records, lines


def _asked(phase: Phase, world_size: int) -> dict:
    """What a choice answers to, as JSON gives it back. Not the device: another one keeps the stored
    choice."""
    given = {
        "world_size": world_size,
        "open": phase.auto,
        "seq_length": phase.seq_length,
        "global_batch_tokens": phase.global_batch_tokens,
        "micro_batch_size": phase.micro_batch_size,
        **dataclasses.asdict(phase.memory),
    }
    layout = dataclasses.asdict(phase.layout)
    ignored = ("distributed_backend", "distributed_timeout_minutes")
    return json.loads(
        json.dumps(given | {name: layout[name] for name in layout if name not in ignored})
    )


def _record(candidate: Candidate, asked: dict) -> dict:
    layout = dataclasses.asdict(candidate.phase.layout)
    return {
        "asked": asked,
        "chosen": {name: layout[name] for name in CHOSEN},
        "recompute_granularity": candidate.phase.memory.recompute_granularity,
    }


def with_choice(phase: Phase, record: dict) -> Phase:
    """The phase with the layout that a checkpoint kept for it."""
    layout = dataclasses.replace(phase.layout, use_distributed_optimizer=None, **record["chosen"])
    return _with_recompute(
        dataclasses.replace(phase, layout=layout), record["recompute_granularity"]
    )


def _asked_before(record: dict) -> dict:
    """What a stored choice answered to; settings that did not exist then had their defaults."""
    return dataclasses.asdict(MemorySettings()) | record["asked"]


def _why_anew(before: dict | None, asked: dict) -> str:
    if before is None:
        return ""
    then = _asked_before(before)
    changed = [f"{name} was {then.get(name)}" for name in asked if then.get(name) != asked[name]]
    was = before["chosen"]
    return (
        f" (chosen anew, since {', '.join(changed)}; it was tp {was['tensor_model_parallel_size']} "
        f"pp {was['pipeline_model_parallel_size']} cp {was['context_parallel_size']})"
    )
