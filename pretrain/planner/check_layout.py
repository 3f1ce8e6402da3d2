"""Can a layout run a phase: its processes, the model, the batch, the lengths of its evaluations?"""

from model.build import check_layout
from parallel.config import check_microbatches, check_world_size
from parallel.schedule import SCHEDULES
from parallel.ulysses import HeadSplit, chunk_counts
from pretrain.config.config import Config
from pretrain.config.facts import problems_of
from pretrain.evaluation.evaluate import check_lengths
from pretrain.schedule.batch_words import BatchWords
from pretrain.schedule.phases import Phase
from pretrain.schedule.resolve import phase_entries


def check_phase_layout(
    phase: Phase, config: Config, world_size: int, vocab_size: int | None
) -> list[str]:
    """Why the phase's layout cannot run it."""
    layout = phase.layout
    tp, pp, cp = layout.sizes
    problems = problems_of(layout) or layout.combination_problems()
    if problems:
        return problems
    world_problem = check_world_size(world_size, tp, pp, cp)
    problems = [world_problem] if world_problem else []
    model_problems = check_layout(config.model, vocab_size, layout)
    problems += model_problems
    microbatch = phase.seq_length * phase.micro_batch_size
    if microbatch % layout.token_multiple:
        because = (
            f"context_parallel_size = {cp}"
            + (f" in {layout.context_levels[1]} groups" if layout.context_levels[1] > 1 else "")
            + (
                f" and sequence_parallel over tp {tp}"
                if layout.sequence_parallel and tp > 1
                else ""
            )
        )
        nearest = max(1, round(microbatch / layout.token_multiple)) * layout.token_multiple
        problems.append(
            f"{because}: the {microbatch} tokens of a microbatch must be a multiple of "
            f"{layout.token_multiple}. Fix: for example a seq_length of {nearest}."
        )
    problems += _split_backward_problems(phase)
    problems += check_lengths(config.logging, phase)
    if not model_problems:
        problems += _head_chunk_problems(phase, config)
    return problems if world_problem else problems + _batch_problems(phase, config, world_size)


def _split_backward_problems(phase: Phase) -> list[str]:
    """Settings under which backward runs a part of forward: a backward in two halves would run it
    in both."""
    layout = phase.layout
    memory = phase.memory
    has_pipeline = layout.pipeline_model_parallel_size > 1
    if not has_pipeline or not SCHEDULES[layout.schedule].splits_backward:
        return []
    other = "or --pipeline-schedule interleaved or 1F1B."
    problems = []
    if memory.recompute_granularity:
        problems.append(
            f"recompute_granularity = {memory.recompute_granularity}: {layout.schedule} would run every "
            f"forward four times. Fix: none, {other}"
        )
    problems += [
        f"{name} = {getattr(memory, name)}: {layout.schedule} splits the backward, and each half would go "
        f"through all of them. Fix: 1, {other}"
        for name in ("mlp_tiles", "attention_head_chunks")
        if getattr(memory, name) > 1
    ]
    return problems


def _head_chunk_problems(phase: Phase, config: Config) -> list[str]:
    chunks = phase.memory.attention_head_chunks
    model = config.model
    layout = phase.layout
    tp = layout.tensor_model_parallel_size
    a2a = layout.context_levels[0]
    possible = chunk_counts(
        HeadSplit.make(model.num_attention_heads // tp, max(1, model.num_kv_heads // tp), a2a)
    )
    if chunks in possible or chunks < 1:
        return []
    nearest = [
        max((n for n in possible if n < chunks), default=None),
        min((n for n in possible if n > chunks), default=None),
    ]
    return [
        f"attention_head_chunks = {chunks}: the {model.num_attention_heads // tp} query heads of a tensor-parallel "
        f"rank over {a2a} ranks of an all-to-all allow {', '.join(map(str, possible))}: chunks of whole groups, or "
        f"equal parts of one. Fix: {' or '.join(str(n) for n in nearest if n is not None)}."
    ]


def _batch_problems(phase: Phase, config: Config, world_size: int) -> list[str]:
    unit = phase.seq_length * phase.micro_batch_size * phase.data_parallel_size(world_size)
    words = BatchWords.make(config, phase_entries(config)[phase.index], phase.seq_length)
    problems = []
    for batch in phase.batches:
        if batch % unit:
            factors = "micro_batch_size x data-parallel size"
            problems.append(words.not_a_multiple(batch, unit, factors))
        elif problem := check_microbatches(phase.layout, phase.num_microbatches(world_size, batch)):
            problems.append(f"{words.name(batch)}: gives {problem} of {words.show(unit)}.")
    return problems
