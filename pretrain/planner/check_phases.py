"""Can the phases run: on this many processes, with this model, data and rope?

Everything that is wrong is said at once.
"""

import math
from functools import partial

from data.blend import parse_blend
from model.activation_memory.settings import KEEPS_INPUT_ONLY
from model.attention_backends.choice import BACKENDS
from pretrain.config.config import Config
from pretrain.config.facts import problems_of
from pretrain.planner.at_fault import FitsMemory, Situation, layouts_that_work
from pretrain.planner.check_layout import check_phase_layout
from pretrain.problems import attempt
from pretrain.schedule.phases import Phase


def check_phases(
    phases: list[Phase],
    config: Config,
    world_size: int,
    vocab_size: int | None,
    fits: FitsMemory | None = None,
) -> list[str]:
    """List why some phase cannot run on `world_size` processes, and which layouts could.

    A layout that is still to be chosen is not checked.

    Args:
        vocab_size: None = not known yet, since the tokenizer cannot be read.
        fits: None = the memory is not checked.
    """
    problems = []
    for phase in phases:
        # What other files check comes first: layout and data; then the phase's own settings.
        found = [
            *_layout_problems(phase, config, world_size, vocab_size, fits),
            *_data_problems(phase, config),
            *check_phase_memory(phase, config.model.attention_backend),
            *_warmup_problems(phase),
            *config.schedule.entries[phase.index].with_rope(config.model).rope_problems(),
            *_range_problems(phase, config),
        ]
        problems += [f"phase {phase.name!r}: {problem}" for problem in found]
    return problems


def _layout_problems(
    phase: Phase,
    config: Config,
    world_size: int,
    vocab_size: int | None,
    fits: FitsMemory | None,
) -> list[str]:
    """List why the phase's layout cannot run it; the last says which layouts could."""
    if phase.is_open:
        return []
    problems = check_phase_layout(phase, config, world_size, vocab_size)
    if problems and not problems_of(phase.layout):
        # A refusal comes with layouts that would do.
        situation = Situation(phase, config, world_size, vocab_size, fits)
        unknown = "" if vocab_size is not None else " (the vocabulary is not known yet)"
        processes = f"{world_size} process{'' if world_size == 1 else 'es'}"
        problems.append(
            f"layouts that work on {processes}{unknown}, nearest first: "
            f"{layouts_that_work(situation)}."
        )
    return problems


def _data_problems(phase: Phase, config: Config) -> list[str]:
    """Check a blend that the phase gives itself; the run's is checked with the run."""
    own = list(phase.data_path)
    if not own or own in (config.data.data_path, config.data.train_data_path):
        return []
    # Generated data has no blend, and a blend is read in any case, to say all at once.
    problems = []
    if config.data.mock_data:
        problems.append(
            f"data_path = {' '.join(phase.data_path)}: cannot be combined with mock_data. "
            "Fix: remove one of them."
        )
    attempt(problems, partial(parse_blend, phase.data_path, "data_path"))
    return problems


def check_phase_memory(phase: Phase, backend: str) -> list[str]:
    """List memory settings that are out of range or do not go together, whatever the layout."""
    memory = phase.memory
    problems = memory.problems()
    level = memory.recompute_granularity
    # Where the layout is open, the recompute may still be chosen.
    if memory.cpu_offloading_num_layers and level not in KEEPS_INPUT_ONLY and not phase.is_open:
        problems.append(
            f"cpu_offloading_num_layers = {memory.cpu_offloading_num_layers}: moves what "
            f"recompute_granularity {' and '.join(KEEPS_INPUT_ONLY)} keep, but that is {level}. "
            "Fix: give both, or 0 layers."
        )
    # A kernel whose graph needs q, k and v cannot run where those are made again.
    if phase.attention_on_tape and backend in BACKENDS and not BACKENDS[backend].keeps_graph:
        is_kept = level == "attention_kept"
        name = "recompute_granularity" if is_kept else "attention_head_chunks"
        problems.append(
            f"attention_backend = {backend}: is not proven to outlive its q, k and v, which {name} "
            f"= {getattr(memory, name)} makes again for backward. Fix: --attention-backend auto, "
            "or recompute_granularity full and attention_head_chunks 1."
        )
    return problems


def _warmup_problems(phase: Phase) -> list[str]:
    """List settings of the phase's warmup that do not go together."""
    # The first phase warms up by the run's settings, a later one only where it rewarms.
    problems = []
    if phase.lr_schedule == "rewarm" and phase.index == 0:
        problems.append(
            "lr_schedule = rewarm: is for a later phase. Fix: --lr-warmup-tokens for the start of "
            "the run."
        )
    if phase.lr_warmup_tokens and phase.lr_schedule != "rewarm":
        problems.append(
            f"lr_warmup_tokens = {phase.lr_warmup_tokens}: is for lr_schedule = rewarm, not "
            f"{phase.lr_schedule}. Fix: remove it, or give that."
        )
    return problems


def _range_problems(phase: Phase, config: Config) -> list[str]:
    """Check the phase's learning rates and its length."""
    problems = []
    if not (0 < phase.lr < math.inf and 0 <= phase.min_lr <= phase.lr):
        problems.append(
            f"lr = {phase.lr}, min_lr = {phase.min_lr}: the first must be above 0 and finite, "
            "min_lr between 0 and lr. Fix: change them."
        )
    # Exported configurations promise that length and no more.
    longest = config.model.max_position_embeddings
    if longest is not None and phase.seq_length > longest:
        problems.append(
            f"seq_length = {phase.seq_length}: beyond max_position_embeddings = {longest}. "
            "Fix: raise max_position_embeddings or leave it out."
        )
    return problems


def length_warnings(phases: list[Phase]) -> list[str]:
    """Warn of phases that are shorter than the one before them."""
    return [
        f"phase {after.name!r}: seq_length = {after.seq_length}: is shorter than "
        f"{before.seq_length}, that of phase {before.name!r} before it"
        for before, after in zip(phases, phases[1:], strict=False)
        if after.seq_length < before.seq_length
    ]


def rope_warnings(phases: list[Phase]) -> list[str]:
    """Warn of phases that are longer than the context their rope is scaled for."""
    return [
        f"phase {phase.name!r}: seq_length = {phase.seq_length}: beyond rope_scaling_factor x "
        f"original_max_position_embeddings = {phase.rope.scaled_length}, the context that its "
        "rope is scaled for"
        for phase in phases
        if phase.rope.scaled_length and phase.seq_length > phase.rope.scaled_length
    ]
