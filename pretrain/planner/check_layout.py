"""Can a layout run a phase: its processes, the model, the batch, the lengths of its evaluations?"""

from model.build import check_layout
from parallel.config import check_microbatches, check_world_size
from parallel.schedule import SCHEDULES
from pretrain.config.config import Config
from pretrain.config.facts import problems_of
from pretrain.evaluation.lengths import check_lengths
from pretrain.planner.head_counts import allowed_head_chunks
from pretrain.schedule.batch_words import BatchWords
from pretrain.schedule.phases import Phase


def check_phase_layout(
    phase: Phase, config: Config, world_size: int, vocab_size: int | None
) -> list[str]:
    """List why the phase's layout cannot run it.

    Args:
        vocab_size: None = not known yet: the rule about it is not checked.
    """
    layout = phase.layout
    # Sizes that make no layout at all hide every other problem.
    problems = problems_of(layout) or layout.combination_problems()
    if problems:
        return problems
    world_problem = check_world_size(world_size, *layout.sizes)
    problems = [world_problem] if world_problem else []
    model_problems = check_layout(config.model, vocab_size, layout)
    problems += model_problems
    problems += _token_problems(phase)
    problems += _split_backward_problems(phase)
    problems += check_lengths(config.logging, phase)
    # Heads and batches can be divided only where the sizes before them fit.
    if not model_problems:
        problems += _head_chunk_problems(phase, config)
    if not world_problem:
        problems += _batch_problems(phase, config, world_size)
    return problems


def _token_problems(phase: Phase) -> list[str]:
    """Check that the tokens of a microbatch can be split over the ranks."""
    layout = phase.layout
    microbatch = phase.seq_length * phase.micro_batch_size
    multiple = layout.token_multiple
    if microbatch % multiple == 0:
        return []
    tp, _, cp = layout.sizes
    groups = layout.context_levels[1]
    because = f"context_parallel_size = {cp}"
    if groups > 1:
        because += f" in {groups} groups"
    if layout.sequence_parallel and tp > 1:
        because += f" and sequence_parallel over tp {tp}"
    nearest = max(1, round(microbatch / multiple)) * multiple
    return [
        f"{because}: the {microbatch} tokens of a microbatch must be a multiple of {multiple}. "
        f"Fix: for example a seq_length of {nearest}."
    ]


def _split_backward_problems(phase: Phase) -> list[str]:
    """List settings under which backward runs a part of forward.

    A backward in two halves would run it in both.
    """
    layout = phase.layout
    memory = phase.memory
    has_pipeline = layout.pipeline_model_parallel_size > 1
    if not has_pipeline or not SCHEDULES[layout.schedule].splits_backward:
        return []
    # 1F1B and interleaved run the whole backward at once.
    other = "or --pipeline-schedule interleaved or 1F1B."
    problems = []
    if memory.recompute_granularity:
        problems.append(
            f"recompute_granularity = {memory.recompute_granularity}: {layout.schedule} would run "
            f"every forward four times. Fix: none, {other}"
        )
    problems += [
        f"{name} = {getattr(memory, name)}: {layout.schedule} splits the backward, and each half "
        f"would go through all of them. Fix: 1, {other}"
        for name in ("mlp_tiles", "attention_head_chunks")
        if getattr(memory, name) > 1
    ]
    return problems


def _head_chunk_problems(phase: Phase, config: Config) -> list[str]:
    """Check that the heads of a rank can be split into attention_head_chunks."""
    chunks = phase.memory.attention_head_chunks
    layout = phase.layout
    possible = allowed_head_chunks(config.model, layout)
    if chunks in possible or chunks < 1:  # below 1 is said elsewhere
        return []
    if config.model.norms_all_heads:
        return [
            f"attention_head_chunks = {chunks}: qk_layernorm_scope all_heads norms all heads of a "
            "token at once, and a chunk has a part of them. Fix: 1."
        ]
    below = max((n for n in possible if n < chunks), default=None)
    above = min((n for n in possible if n > chunks), default=None)
    nearest = [str(n) for n in (below, above) if n is not None]
    heads = config.model.num_attention_heads // layout.tensor_model_parallel_size
    return [
        f"attention_head_chunks = {chunks}: the {heads} query heads of a tensor-parallel rank over "
        f"{layout.context_levels[0]} ranks of an all-to-all allow {', '.join(map(str, possible))}: "
        f"chunks of whole groups, or equal parts of one. Fix: {' or '.join(nearest)}."
    ]


def _batch_problems(phase: Phase, config: Config, world_size: int) -> list[str]:
    """Check that each batch is whole microbatches, in a number that the schedule accepts."""
    # Tokens of one microbatch on every data-parallel rank.
    unit = phase.seq_length * phase.micro_batch_size * phase.data_parallel_size(world_size)
    words = BatchWords.make(config, config.schedule.entries[phase.index], phase.seq_length)
    problems = []
    for batch in phase.batches:
        if batch % unit:
            factors = "micro_batch_size x data-parallel size"
            problems.append(words.not_a_multiple(batch, unit, factors))
        elif problem := check_microbatches(phase.layout, phase.num_microbatches(world_size, batch)):
            problems.append(f"{words.name(batch)}: gives {problem} of {words.show(unit)}.")
    return problems
