"""Phases and the clock: everything about a step is a function of positions consumed before it.

The clock counts positions (steps x global batch, padding included). A phase covers [start, end) of
it; its end is rounded up to whole steps. Iterations and samples are converted to tokens here and
nowhere else.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from model.activation_memory.recompute import MemorySettings
from model.rope import Rope
from parallel.config import LayoutConfig
from pretrain.config.config import Config
from pretrain.config.phase_config import PhaseConfig
from pretrain.planner.rank_bytes import show_bytes
from pretrain.schedule.batch_schedule import (
    BatchStep,
    Stretch,
    batch_at,
    cut_into_stretches,
    end_of_steps,
    first_step_from,
    parse_ramp,
    parse_steps,
)
from pretrain.schedule.batch_words import BatchWords, count_of, largest_part


@dataclass(frozen=True)
class Phase:
    """One stretch of the run with constant settings, everything resolved."""

    name: str
    index: int
    start: int
    end: int
    tokens: int
    """As asked for; the phase ends with the step that reaches them."""
    seq_length: int
    global_batch_tokens: int
    """Of the largest step."""
    stretches: tuple[Stretch, ...]
    """The steps of the phase, by their size."""
    micro_batch_size: int
    layout: LayoutConfig
    memory: MemorySettings
    rope: Rope
    document_masking: bool
    packing: str
    data_path: tuple[str, ...]
    """Words of the blend; empty for mock data."""
    data_exhausted: str
    lr: float
    min_lr: float
    lr_schedule: str
    lr_warmup_tokens: int
    auto: tuple[str, ...] = ()
    """Names of the settings that `layout: auto` chooses (pretrain/planner/auto_layout.py); empty = all are
    given."""
    predicted_bytes: int | None = None
    """Memory of a rank under the layout that was chosen; None = none was chosen (yet)."""

    @property
    def layout_key(self) -> tuple:
        """Settings that processes cannot change: another key means a restart."""
        layout = self.layout
        return (
            *layout.sizes,
            layout.schedule,
            layout.stages_per_rank,
            layout.context_levels,
            layout.sharding_strategy,
            layout.sequence_parallel and layout.tensor_model_parallel_size > 1,
        )

    @property
    def attention_on_tape(self) -> bool:
        """Do attention calls wait for their backward without q, k and v
        (model/activation_memory/saved_attention.py)?"""
        return (
            self.memory.recompute_granularity == "attention_kept"
            or self.memory.attention_head_chunks > 1
        )

    @property
    def steps(self) -> int:
        return sum(stretch.steps for stretch in self.stretches)

    @property
    def batches(self) -> list[int]:
        """Tokens of a step, each size once, in the order in which they come."""
        return list(dict.fromkeys(stretch.batch for stretch in self.stretches))

    def batch_at(self, clock: int) -> int:
        """Tokens of the step that begins at `clock`."""
        return batch_at(self.stretches, clock)

    def first_step_from(self, position: int) -> int:
        """Where the first step at or after `position` begins; the phase's end if there is none."""
        return first_step_from(self.stretches, position)

    def start_of_step(self, number: int) -> int:
        """Where step `number` of the phase begins."""
        for stretch in self.stretches:
            if number < stretch.steps:
                return stretch.start + number * stretch.batch
            number -= stretch.steps
        raise ValueError(f"phase {self.name!r} has {self.steps} steps")

    def end_of_steps(self, clock: int) -> int:
        """Where the phase's last step ends, counted in whole steps from `clock`."""
        return end_of_steps(self.stretches, clock)

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // math.prod(self.layout.sizes)

    def num_microbatches(self, world_size: int, batch: int | None = None) -> int:
        """Microbatches of each data-parallel rank in a step of `batch` tokens, by default in the
        largest."""
        unit = self.seq_length * self.micro_batch_size * self.data_parallel_size(world_size)
        return (batch or self.global_batch_tokens) // unit


def resolve_phases(config: Config) -> list[Phase]:
    """The run's phases in order.

    Raises:
        ValueError: a phase misses its length, tokens or batch, or they do not divide; all at once.
    """
    entries = phase_entries(config)
    phases = []
    problems = []
    clock = 0
    names = [entry.name for entry in entries]
    problems += [
        f"phases: the name {name!r} stands twice. Fix: give each phase its own name."
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    for index, entry in enumerate(entries):
        found = _resolve(config, entry, index, clock)
        if isinstance(found, Phase):
            phases.append(found)
            clock = found.end
        else:
            problems += found
    if not problems:
        problems = _sum_problems(config, phases)
    if problems:
        raise ValueError("\n".join(problems))
    return phases


def phase_entries(config: Config) -> list[PhaseConfig]:
    return config.schedule.phases or [PhaseConfig(name="main")]


def _resolve(config: Config, entry: PhaseConfig, index: int, start: int) -> Phase | list[str]:
    """The phase, or what is wrong with it."""
    schedule = config.schedule
    where = f"phase {entry.name!r}: "
    seq_length = entry.seq_length if entry.seq_length is not None else schedule.seq_length
    if seq_length is None or seq_length < 1:
        return [
            f"{where}seq_length = {seq_length}: must be given and above 0. Fix: --seq-length or the phase's key."
        ]
    problems: list[str] = []
    batches = attempt(problems, lambda: _batches(config, entry, seq_length, start))
    if batches is None:
        return [where + problem for problem in problems]
    tokens = (
        entry.train_tokens
        if entry.train_tokens is not None
        else _train_tokens(config, batches, seq_length)
    )
    if tokens is None or tokens < 1:
        problems.append(
            f"{where}train_tokens = {tokens}: must be given and above 0. Fix: --train-tokens, "
            "--train-samples, --train-iters (not with a batch that changes) or the phase's key."
        )
    micro = (
        entry.micro_batch_size if entry.micro_batch_size is not None else schedule.micro_batch_size
    )
    if micro < 1:
        problems.append(
            f"{where}micro_batch_size = {micro}: must be at least 1. Fix: give a positive number."
        )
    else:
        words = BatchWords.make(config, entry, seq_length)
        problems += [
            where + _micro_batch_problem(words, batch, micro)
            for _, batch in batches
            if batch % (seq_length * micro)
        ]
    if problems:
        return problems
    stretches = cut_into_stretches(start, tokens, batches)

    def pick(name, section):
        value = getattr(entry, name)
        return value if value is not None else getattr(section, name)

    layout = dataclasses.replace(
        config.layout,
        **{
            field.name: pick(field.name, config.layout)
            for field in dataclasses.fields(config.layout)
            if hasattr(entry, field.name)
        },
    )
    return Phase(
        name=entry.name,
        index=index,
        start=start,
        end=stretches[-1].end,
        tokens=tokens,
        seq_length=seq_length,
        global_batch_tokens=max(stretch.batch for stretch in stretches),
        stretches=stretches,
        micro_batch_size=micro,
        layout=layout,
        memory=entry.with_memory(config.model),
        rope=entry.with_rope(config.model).rope,
        document_masking=pick("document_masking", config.data),
        packing=pick("packing", config.data),
        data_exhausted=pick("data_exhausted", config.data),
        data_path=tuple(entry.data_path or config.data.data_path or config.data.train_data_path),
        lr=pick("lr", config.optimizer),
        min_lr=pick("min_lr", config.optimizer),
        lr_schedule=entry.lr_schedule or "continue",
        lr_warmup_tokens=entry.lr_warmup_tokens or 0,
        auto=config.open_settings(entry),
    )


def _micro_batch_problem(words: BatchWords, batch: int, micro: int) -> str:
    """What to say of a batch that microbatches of `micro` samples do not fill."""
    unit = words.seq_length * micro
    samples = batch // words.seq_length
    if samples == 0 or samples >= micro:
        return words.not_a_multiple(batch, unit, "micro_batch_size")
    return (
        f"micro_batch_size = {micro}: is more than a step has, {count_of(samples, 'sample')} "
        f"({words.name(batch)}). Fix: micro_batch_size {largest_part(samples, micro)}, or "
        f"{words.setting} {words.count(unit)}."
    )


def _batches(config: Config, entry: PhaseConfig, seq_length: int, start: int) -> list[BatchStep]:
    """The phase's batches by the clock: its own, or the run's.

    Numbers of samples are of the phase's own length. A phase counts its own schedule from its
    start, the run its from the run's, with samples of the first phase's length.

    Raises:
        ValueError: no batch is given, or a schedule that makes no sense.
    """
    schedule = config.schedule
    own = entry.has_own_batch
    full = (
        entry.global_batch_tokens
        if entry.global_batch_tokens is not None
        else schedule.global_batch_tokens
    )
    if full is None and schedule.global_batch_size:
        full = schedule.global_batch_size * seq_length
    section, begin = (entry, start) if own else (schedule, 0)
    if section.rampup_batch_size and section.step_batch_size_schedule:
        raise ValueError(
            f"rampup_batch_size = {' '.join(map(str, section.rampup_batch_size))}: cannot be combined "
            "with step_batch_size_schedule. Fix: one of them."
        )
    if section.step_batch_size_schedule:
        steps = parse_steps(section.step_batch_size_schedule, begin, seq_length)
        largest = max(step.batch for step in steps)
        # A phase may replace the batch that the run gives by a schedule.
        if full is not None and full != largest and not (own and entry.global_batch_tokens is None):
            raise ValueError(
                f"step_batch_size_schedule = {section.step_batch_size_schedule}: its largest batch is "
                f"{largest} tokens, but global_batch_size or global_batch_tokens mean {full}. Fix: leave "
                "those out, or make them agree."
            )
        return _since(steps, start)
    if full is None or full < 1:
        raise ValueError(
            f"global_batch_tokens = {full}: must be given and above 0. Fix: --global-batch-tokens, "
            "--global-batch-size or the phase's key."
        )
    if section.rampup_batch_size:
        first_length = (config.schedule.phases or [entry])[0].seq_length or schedule.seq_length
        length = seq_length if own else first_length
        words = section.rampup_batch_size
        if not own and 0 < start >= length * words[-1] and len(words) == 3:
            return [
                BatchStep(start, full)
            ]  # over by now: its samples need not fit this phase's length
        return _since(parse_ramp(words, full, begin, seq_length, length), start)
    return [BatchStep(start, full)]


def _since(steps: list[BatchStep], start: int) -> list[BatchStep]:
    """What of a schedule still matters at `start`."""
    begun = [step for step in steps if step.threshold <= start]
    return begun[-1:] + steps[len(begun) :]


def _train_tokens(config: Config, batches: list[BatchStep], seq_length: int) -> int | None:
    schedule = config.schedule
    if schedule.phases:
        return None
    if schedule.train_iters is not None:
        return schedule.train_iters * batches[0].batch if len(batches) == 1 else None
    if schedule.train_samples is not None:
        return schedule.train_samples * seq_length
    return schedule.train_tokens


def _sum_problems(config: Config, phases: list[Phase]) -> list[str]:
    """A length of the run that is given beside the phases must be their sum, and the decay must end
    with a phase."""
    schedule = config.schedule
    optimizer = config.optimizer
    if not schedule.phases:
        return []
    problems = []
    for name, parts in (
        ("train_tokens", [phase.tokens for phase in phases]),
        ("train_iters", [phase.steps for phase in phases]),
        ("train_samples", [phase.tokens // phase.seq_length for phase in phases]),
    ):
        given = getattr(schedule, name)
        if given is not None and given != sum(parts):
            problems.append(
                f"{name} = {given:,}: the phases make {' + '.join(f'{part:,}' for part in parts)} = "
                f"{sum(parts):,}, which is {abs(given - sum(parts)):,} "
                f"{'less' if given > sum(parts) else 'more'}. Fix: remove {name}, or change the phases."
            )
    decay_end = optimizer.lr_decay_tokens
    if (
        decay_end is not None
        and optimizer.lr_decay_style != "constant"
        and phase_end(phases, decay_end) is None
    ):
        sums = accumulate(phase.tokens for phase in phases)
        ends = ", ".join(
            f"{phase.name} at {asked:,}"
            + ("" if asked == phase.end else f" (whole steps: {phase.end:,})")
            for phase, asked in zip(phases, sums, strict=True)
        )
        problems.append(
            f"lr_decay_tokens = {decay_end:,}: must be where a phase ends: {ends}. Fix: remove it, which "
            "means the run's end, or one of these."
        )
    for name in ("lr_decay_iters", "lr_decay_samples"):
        if getattr(optimizer, name) is not None and optimizer.lr_decay_style != "constant":
            problems.append(
                f"{name} = {getattr(optimizer, name):,}: phases have steps and samples of several sizes. "
                "Fix: remove it, which means the run's end, or give --lr-decay-tokens."
            )
    return problems


def phase_end(phases: list[Phase], position: int) -> int | None:
    """In whole steps, the end of the phase that ends at `position` (as asked for or in whole
    steps); None without one."""
    for phase, asked in zip(phases, accumulate(phase.tokens for phase in phases), strict=True):
        if position in (asked, phase.end):
            return phase.end
    return None


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


def memory_words(settings: MemorySettings) -> str:
    """The memory settings that are not as by default, each after a comma."""
    words = {
        "recompute_granularity": "recompute {}",
        "cpu_offloading_num_layers": "{} layers offloaded",
        "mlp_tiles": "{} MLP tiles",
        "attention_head_chunks": "{} head chunks",
        "loss_chunk_tokens": "loss by {:,} tokens",
    }
    default = MemorySettings()
    return "".join(
        ", " + text.format(getattr(settings, name))
        for name, text in words.items()
        if getattr(settings, name) != getattr(default, name)
    )


def describe(phases: list[Phase], world_size: int) -> str:
    """The plan, a line per phase."""
    lines = [
        f"{'phase':<12}{'length':>9}{'tokens':>14}{'steps':>8}{'batch':>12}{'micro':>7}   layout"
    ]
    for phase in phases:
        layout = phase.layout
        lines.append(
            f"{phase.name:<12}{phase.seq_length:>9,}{phase.end - phase.start:>14,}{phase.steps:>8,}"
            f"{phase.global_batch_tokens:>12,}{phase.num_microbatches(world_size):>7}   {layout.describe()} "
            f"dp {phase.data_parallel_size(world_size)} {layout.sharding_strategy}"
            + (f" (auto, {show_bytes(phase.predicted_bytes)})" if phase.predicted_bytes else "")
            + memory_words(phase.memory)
        )
        if len(phase.batches) > 1:
            changes = [f"{batch:,} from {start:,}" for start, _, batch in phase.stretches]
            shown = changes if len(changes) <= 8 else [*changes[:4], "...", *changes[-3:]]
            lines.append(f"{'':<12}batch: {', '.join(shown)}")
    if any(
        phase.layout.pipeline_model_parallel_size > 1
        and phase.layout.sharding_strategy == "optim_grads"
        for phase in phases
    ):
        lines.append(
            "under pipeline parallelism gradients are reduced once per step: optim_grads acts as optim there"
        )
    return "\n".join(lines)
