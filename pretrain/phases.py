"""Phases and the clock: everything about a step is a function of positions consumed before it.

The clock counts positions (steps x global batch, padding included). A phase covers [start, end) of it;
its end is rounded up to whole steps. Iterations and samples are converted to tokens here and nowhere else.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from data.blend import parse_blend
from model.build import check_layout
from model.memory import show_bytes
from parallel.config import LayoutConfig, check_microbatches, check_world_size
from parallel.schedule import SPLIT_BACKWARD
from pretrain.config import Config, PhaseConfig
from pretrain.layout_search import nearest_layouts


@dataclass(frozen=True)
class Phase:
    """One stretch of the run with constant settings, everything resolved."""

    name: str
    index: int
    start: int
    end: int
    seq_length: int
    global_batch_tokens: int
    micro_batch_size: int
    layout: LayoutConfig
    recompute_granularity: str | None
    rotary_base: float
    document_masking: bool
    packing: str
    data_path: tuple[str, ...]
    """Words of the blend; empty for mock data."""
    data_exhausted: str
    lr: float
    min_lr: float
    auto: tuple[str, ...] = ()
    """Names of the settings that `layout: auto` chooses (pretrain/auto_layout.py); empty = all are given."""
    predicted_bytes: int | None = None
    """Memory of a rank under the layout that was chosen; None = none was chosen (yet)."""

    @property
    def layout_key(self) -> tuple:
        """Settings that processes cannot change: another key means a restart."""
        layout = self.layout
        return (*layout.sizes, layout.schedule, layout.stages_per_rank, layout.context_levels,
                layout.sharding_strategy)

    @property
    def steps(self) -> int:
        return (self.end - self.start) // self.global_batch_tokens

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // math.prod(self.layout.sizes)

    def num_microbatches(self, world_size: int) -> int:
        """Microbatches of each data-parallel rank in one step."""
        return self.global_batch_tokens // (self.seq_length * self.micro_batch_size
                                            * self.data_parallel_size(world_size))


def resolve_phases(config: Config) -> list[Phase]:
    """The run's phases in order.

    Raises:
        ValueError: a phase misses its length, tokens or batch, or they do not divide; all at once.
    """
    entries = config.schedule.phases or [PhaseConfig(name="main")]
    phases, problems, clock = [], [], 0
    schedule = config.schedule
    if schedule.phases and (schedule.train_iters or schedule.train_samples or schedule.train_tokens):
        problems.append("train_iters, train_samples or train_tokens: each entry of `phases` says its own tokens. "
                        "Fix: remove the flag, or edit the phases.")
    names = [entry.name for entry in entries]
    problems += [f"phases: the name {name!r} stands twice. Fix: give each phase its own name."
                 for name in sorted({name for name in names if names.count(name) > 1})]
    for index, entry in enumerate(entries):
        found = _resolve(config, entry, index, clock)
        if isinstance(found, Phase):
            phases.append(found)
            clock = found.end
        else:
            problems += found
    if problems:
        raise ValueError("\n".join(problems))
    return phases


def _resolve(config: Config, entry: PhaseConfig, index: int, start: int) -> Phase | list[str]:
    """The phase, or what is wrong with it."""
    schedule, where = config.schedule, f"phase {entry.name!r}: "
    problems = []
    seq_length = entry.seq_length if entry.seq_length is not None else schedule.seq_length
    if seq_length is None or seq_length < 1:
        return [f"{where}seq_length = {seq_length}: must be given and above 0. Fix: --seq-length or the phase's key."]
    batch = entry.global_batch_tokens if entry.global_batch_tokens is not None else schedule.global_batch_tokens
    if batch is None and schedule.global_batch_size:
        batch = schedule.global_batch_size * seq_length
    if batch is None or batch < 1:
        return [f"{where}global_batch_tokens = {batch}: must be given and above 0. Fix: --global-batch-tokens, "
                "--global-batch-size or the phase's key."]
    tokens = entry.train_tokens if entry.train_tokens is not None else _train_tokens(config, batch, seq_length)
    if tokens is None or tokens < 1:
        problems.append(f"{where}train_tokens = {tokens}: must be given and above 0. Fix: --train-tokens, "
                        "--train-samples, --train-iters or the phase's key.")
    micro = entry.micro_batch_size if entry.micro_batch_size is not None else schedule.micro_batch_size
    if micro < 1:
        problems.append(f"{where}micro_batch_size = {micro}: must be at least 1. Fix: give a positive number.")
    elif batch % (seq_length * micro):
        unit = seq_length * micro
        problems.append(f"{where}global_batch_tokens = {batch}: must be a multiple of seq_length x micro_batch_size = "
                        f"{unit}. Fix: {max(1, batch // unit) * unit} or {(batch // unit + 1) * unit}.")
    if problems:
        return problems

    def pick(name, section):
        value = getattr(entry, name)
        return value if value is not None else getattr(section, name)

    layout = dataclasses.replace(config.layout, **{
        field.name: pick(field.name, config.layout) for field in dataclasses.fields(config.layout)
        if hasattr(entry, field.name)})
    recompute = pick("recompute_granularity", config.model)
    return Phase(
        name=entry.name, index=index, start=start, end=start + math.ceil(tokens / batch) * batch,
        seq_length=seq_length, global_batch_tokens=batch, micro_batch_size=micro, layout=layout,
        recompute_granularity=None if recompute == "none" else recompute,
        rotary_base=pick("rotary_base", config.model), document_masking=pick("document_masking", config.data),
        packing=pick("packing", config.data), data_exhausted=pick("data_exhausted", config.data),
        data_path=tuple(entry.data_path or config.data.data_path or config.data.train_data_path),
        lr=pick("lr", config.optimizer), min_lr=pick("min_lr", config.optimizer),
        auto=config.open_settings(entry))


def _train_tokens(config: Config, batch: int, seq_length: int) -> int | None:
    schedule = config.schedule
    if schedule.phases:
        return None
    if schedule.train_iters is not None:
        return schedule.train_iters * batch
    if schedule.train_samples is not None:
        return schedule.train_samples * seq_length
    return schedule.train_tokens


def check_phases(phases: list[Phase], config: Config, world_size: int, vocab_size: int | None) -> list[str]:
    """Why some phase cannot run on `world_size` processes with this model, and which layouts could.

    A layout that is still to be chosen is not checked.
    """
    problems = []
    for phase in phases:
        is_open = phase.auto and phase.predicted_bytes is None
        found = [] if is_open else check_phase_layout(phase, config, world_size, vocab_size)
        where = f"phase {phase.name!r}: "
        problems += [where + problem for problem in found]
        if found and not phase.layout.validate():
            nearest = nearest_layouts(
                phase.layout, world_size, config.model.num_attention_heads,
                lambda layout, p=phase: not check_phase_layout(dataclasses.replace(p, layout=layout), config,
                                                               world_size, vocab_size))
            problems.append(f"{where}layouts that work on {world_size} processes, nearest first: "
                            f"{'; '.join(nearest) or 'none with this batch, length and model'}.")
        if phase.data_path and list(phase.data_path) not in (config.data.data_path, config.data.train_data_path):
            if config.data.mock_data:
                problems.append(f"{where}data_path = {' '.join(phase.data_path)}: cannot be combined with mock_data. "
                                "Fix: remove one of them.")
            attempt(problems, lambda p=phase, w=where: parse_blend(p.data_path, f"{w}data_path"))
        if not (0 < phase.rotary_base < math.inf and 0 < phase.lr < math.inf and 0 <= phase.min_lr <= phase.lr):
            problems.append(f"{where}rotary_base = {phase.rotary_base}, lr = {phase.lr}, min_lr = {phase.min_lr}: the "
                            "first two must be above 0 and finite, min_lr between 0 and lr. Fix: change them.")
        longest = config.model.max_position_embeddings
        if longest is not None and phase.seq_length > longest:
            problems.append(f"{where}seq_length = {phase.seq_length}: beyond max_position_embeddings = {longest}. "
                            "Fix: raise max_position_embeddings or leave it out.")
    return problems


def check_phase_layout(phase: Phase, config: Config, world_size: int, vocab_size: int | None) -> list[str]:
    """Why the phase's layout cannot run it."""
    layout = phase.layout
    tp, pp, cp = layout.sizes
    problems = layout.validate() or layout.combination_problems()
    if problems:
        return problems
    world_problem = check_world_size(world_size, tp, pp, cp)
    problems = [world_problem] if world_problem else []
    problems += check_layout(config.model, vocab_size, layout)
    microbatch = phase.seq_length * phase.micro_batch_size
    if microbatch % layout.token_multiple:
        because = f"context_parallel_size = {cp}" + (
            f" in {layout.context_levels[1]} groups" if layout.context_levels[1] > 1 else "") + (
            f" and sequence_parallel over tp {tp}" if layout.sequence_parallel and tp > 1 else "")
        nearest = max(1, round(microbatch / layout.token_multiple)) * layout.token_multiple
        problems.append(f"{because}: the {microbatch} tokens of a microbatch must be a multiple of "
                        f"{layout.token_multiple}. Fix: for example a seq_length of {nearest}.")
    if pp > 1 and layout.schedule in SPLIT_BACKWARD and phase.recompute_granularity:
        problems.append(f"recompute_granularity = {phase.recompute_granularity}: {layout.schedule} would run every "
                        "forward four times. Fix: none, or --pipeline-schedule interleaved or 1F1B.")
    return problems if world_problem else problems + _batch_problems(phase, world_size)


def _batch_problems(phase: Phase, world_size: int) -> list[str]:
    unit = phase.seq_length * phase.micro_batch_size * phase.data_parallel_size(world_size)
    if phase.global_batch_tokens % unit:
        nearest = max(1, round(phase.global_batch_tokens / unit)) * unit
        return [f"global_batch_tokens = {phase.global_batch_tokens}: must be a multiple of seq_length x "
                f"micro_batch_size x data-parallel size = {unit}. Fix: {nearest}."]
    problem = check_microbatches(phase.layout, phase.num_microbatches(world_size))
    return [f"global_batch_tokens = {phase.global_batch_tokens}: gives {problem} of {unit} tokens."] if problem else []


def phase_at(phases: list[Phase], clock: int) -> Phase | None:
    """The phase that trains position `clock`; None after the last."""
    for phase in phases:
        if clock < phase.end:
            return phase
    return None


def attempt(problems: list[str], make: Callable):
    """What `make` gives; or None, and its ValueError among the problems."""
    try:
        return make()
    except ValueError as error:
        problems += str(error).splitlines()
        return None


def describe(phases: list[Phase], world_size: int) -> str:
    """The plan, a line per phase."""
    lines = [f"{'phase':<12}{'length':>9}{'tokens':>14}{'steps':>8}{'batch':>12}{'micro':>7}   layout"]
    for phase in phases:
        layout = phase.layout
        lines.append(f"{phase.name:<12}{phase.seq_length:>9,}{phase.end - phase.start:>14,}{phase.steps:>8,}"
                     f"{phase.global_batch_tokens:>12,}{phase.num_microbatches(world_size):>7}   {layout.describe()} "
                     f"dp {phase.data_parallel_size(world_size)} {layout.sharding_strategy}"
                     + (f" (auto, {show_bytes(phase.predicted_bytes)})" if phase.predicted_bytes else ""))
    if any(phase.layout.pipeline_model_parallel_size > 1 and phase.layout.sharding_strategy == "optim_grads"
           for phase in phases):
        lines.append("under pipeline parallelism gradients are reduced once per step: optim_grads acts as optim there")
    return "\n".join(lines)
