"""Phases and the clock: everything about a step is a function of positions consumed before it.

The clock counts positions (steps x global batch, padding included). A phase covers [start, end) of it;
its end is rounded up to whole steps. Iterations and samples are converted to tokens here and nowhere else.
"""

import math
from dataclasses import dataclass

from model.build import check_layout
from parallel.config import check_world_size
from pretrain.config import Config, PhaseConfig


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
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int
    data_parallel_sharding_strategy: str
    recompute_granularity: str | None
    rotary_base: float
    document_masking: bool
    lr: float
    min_lr: float

    @property
    def layout_key(self) -> tuple:
        """Settings that processes cannot change: another key means a restart."""
        return (self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.context_parallel_size,
                self.data_parallel_sharding_strategy)

    @property
    def steps(self) -> int:
        return (self.end - self.start) // self.global_batch_tokens

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size
                              * self.context_parallel_size)

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
    flat = bool(config.schedule.phases)
    if flat and (config.schedule.train_iters or config.schedule.train_samples or config.schedule.train_tokens):
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

    layout = {name: pick(name, config.layout) for name in (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")}
    layout["data_parallel_sharding_strategy"] = entry.data_parallel_sharding_strategy or config.layout.sharding_strategy
    return Phase(
        name=entry.name, index=index, start=start, end=start + math.ceil(tokens / batch) * batch,
        seq_length=seq_length, global_batch_tokens=batch, micro_batch_size=micro, **layout,
        recompute_granularity=pick("recompute_granularity", config.model),
        rotary_base=pick("rotary_base", config.model), document_masking=pick("document_masking", config.data),
        lr=pick("lr", config.optimizer), min_lr=pick("min_lr", config.optimizer))


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
    """Why some phase cannot run on `world_size` processes with this model."""
    problems = []
    for phase in phases:
        where = f"phase {phase.name!r}: "
        tp, pp, cp = phase.layout_key[:3]
        if min(tp, pp, cp) < 1:
            problems.append(f"{where}parallel sizes {tp} x {pp} x {cp}: must be at least 1. Fix: positive numbers.")
            continue
        world_problem = check_world_size(world_size, tp, pp, cp)
        found = [world_problem] if world_problem else []
        found += check_layout(config.model, vocab_size, tp, pp, cp)
        microbatch = phase.seq_length * phase.micro_batch_size
        if microbatch % cp:
            found.append(f"context_parallel_size = {cp}: must divide the {microbatch} tokens of a microbatch. "
                         f"Fix: a seq_length that {cp} divides.")
        elif config.layout.sequence_parallel and microbatch // cp % tp:
            found.append(f"sequence_parallel = True: tensor parallel size {tp} must divide the {microbatch // cp} "
                         "tokens of a context-parallel rank. Fix: a seq_length that both divide, or no "
                         "sequence_parallel.")
        if not (0 < phase.rotary_base < math.inf and 0 < phase.lr < math.inf and 0 <= phase.min_lr <= phase.lr):
            found.append(f"rotary_base = {phase.rotary_base}, lr = {phase.lr}, min_lr = {phase.min_lr}: the first two "
                         "must be above 0 and finite, min_lr between 0 and lr. Fix: change them.")
        if not world_problem:
            found += _batch_problems(phase, world_size)
        longest = config.model.max_position_embeddings
        if longest is not None and phase.seq_length > longest:
            found.append(f"seq_length = {phase.seq_length}: beyond max_position_embeddings = {longest}. "
                         "Fix: raise max_position_embeddings or leave it out.")
        problems += [where + problem for problem in found]
    return problems


def _batch_problems(phase: Phase, world_size: int) -> list[str]:
    unit = phase.seq_length * phase.micro_batch_size * phase.data_parallel_size(world_size)
    if phase.global_batch_tokens % unit:
        nearest = max(1, round(phase.global_batch_tokens / unit)) * unit
        return [f"global_batch_tokens = {phase.global_batch_tokens}: must be a multiple of seq_length x "
                f"micro_batch_size x data-parallel size = {unit}. Fix: {nearest}."]
    count, stages = phase.num_microbatches(world_size), phase.pipeline_model_parallel_size
    if stages > 1 and count < stages:
        return [f"global_batch_tokens = {phase.global_batch_tokens}: gives {count} microbatches, and 1F1B needs at "
                f"least one per stage = {stages}. Fix: at least {unit * stages}."]
    return []


def phase_at(phases: list[Phase], clock: int) -> Phase | None:
    """The phase that trains position `clock`; None after the last."""
    for phase in phases:
        if clock < phase.end:
            return phase
    return None


def describe(phases: list[Phase], world_size: int) -> str:
    """The plan, a line per phase."""
    lines = [f"{'phase':<12}{'length':>9}{'tokens':>14}{'steps':>8}{'batch':>12}{'micro':>7}   layout"]
    for phase in phases:
        tp, pp, cp = phase.layout_key[:3]
        lines.append(f"{phase.name:<12}{phase.seq_length:>9,}{phase.end - phase.start:>14,}{phase.steps:>8,}"
                     f"{phase.global_batch_tokens:>12,}{phase.num_microbatches(world_size):>7}   tp {tp} pp {pp} "
                     f"cp {cp} dp {phase.data_parallel_size(world_size)} {phase.data_parallel_sharding_strategy}")
    if any(phase.pipeline_model_parallel_size > 1 and phase.data_parallel_sharding_strategy == "optim_grads"
           for phase in phases):
        lines.append("under pipeline parallelism gradients are reduced once per step: optim_grads acts as optim there")
    return "\n".join(lines)
