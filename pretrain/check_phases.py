"""Can the phases run: on so many processes, with this model, data and rope? Everything that is wrong, at once."""

import dataclasses
import math

from data.blend import parse_blend
from model.build import check_layout
from model.kernels import BACKENDS
from model.memory import KEEPS_INPUT_ONLY
from parallel.config import check_microbatches, check_world_size
from parallel.schedule import SPLIT_BACKWARD
from parallel.ulysses import HeadSplit, chunk_counts
from pretrain.config import Config
from pretrain.layout_search import nearest_layouts
from pretrain.phases import Phase, attempt, phase_entries


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
        problems += [where + problem for problem in (
            *check_phase_memory(phase, config.model.attention_backend), *_setting_problems(phase))]
        model = phase_entries(config)[phase.index].with_rope(config.model)
        problems += [where + problem for problem in model.rope_problems()]
        if not (0 < phase.lr < math.inf and 0 <= phase.min_lr <= phase.lr):
            problems.append(f"{where}lr = {phase.lr}, min_lr = {phase.min_lr}: the first must be above 0 and finite, "
                            "min_lr between 0 and lr. Fix: change them.")
        longest = config.model.max_position_embeddings
        if longest is not None and phase.seq_length > longest:
            problems.append(f"{where}seq_length = {phase.seq_length}: beyond max_position_embeddings = {longest}. "
                            "Fix: raise max_position_embeddings or leave it out.")
    return problems


def check_phase_memory(phase: Phase, backend: str) -> list[str]:
    """Memory settings that are out of range or do not go together, whatever the layout."""
    is_open = phase.auto and phase.predicted_bytes is None  # the recompute may still be chosen
    memory, problems = phase.memory, phase.memory.problems()
    if memory.cpu_offloading_num_layers and memory.recompute_granularity not in KEEPS_INPUT_ONLY and not is_open:
        problems.append(f"cpu_offloading_num_layers = {memory.cpu_offloading_num_layers}: moves what "
                        f"recompute_granularity {' and '.join(KEEPS_INPUT_ONLY)} keep, but that is "
                        f"{memory.recompute_granularity}. Fix: give both, or 0 layers.")
    if phase.attention_on_tape and backend in BACKENDS and not BACKENDS[backend].keeps_graph:
        name = ("recompute_granularity" if memory.recompute_granularity == "attention_kept" else
                "attention_head_chunks")
        problems.append(f"attention_backend = {backend}: is not proven to outlive its q, k and v, which {name} = "
                        f"{getattr(memory, name)} makes again for backward. Fix: --attention-backend auto, or "
                        "recompute_granularity full and attention_head_chunks 1.")
    return problems


def _setting_problems(phase: Phase) -> list[str]:
    """Other settings of a phase that do not go together."""
    problems = []
    if phase.lr_schedule == "rewarm" and phase.index == 0:
        problems.append("lr_schedule = rewarm: is for a later phase. Fix: --lr-warmup-tokens for the start of the run.")
    if phase.lr_warmup_tokens and phase.lr_schedule != "rewarm":
        problems.append(f"lr_warmup_tokens = {phase.lr_warmup_tokens}: is for lr_schedule = rewarm, not "
                        f"{phase.lr_schedule}. Fix: remove it, or give that.")
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
    problems += _split_backward_problems(phase)
    if not problems or problems == [world_problem]:
        problems += _head_chunk_problems(phase, config)
    return problems if world_problem else problems + _batch_problems(phase, world_size)


def _split_backward_problems(phase: Phase) -> list[str]:
    """Settings under which backward runs a part of forward: a backward in two halves would run it in both."""
    layout, memory = phase.layout, phase.memory
    if layout.pipeline_model_parallel_size == 1 or layout.schedule not in SPLIT_BACKWARD:
        return []
    other = "or --pipeline-schedule interleaved or 1F1B."
    problems = []
    if memory.recompute_granularity:
        problems.append(f"recompute_granularity = {memory.recompute_granularity}: {layout.schedule} would run every "
                        f"forward four times. Fix: none, {other}")
    problems += [f"{name} = {getattr(memory, name)}: {layout.schedule} splits the backward, and each half would go "
                 f"through all of them. Fix: 1, {other}"
                 for name in ("mlp_tiles", "attention_head_chunks") if getattr(memory, name) > 1]
    return problems


def _head_chunk_problems(phase: Phase, config: Config) -> list[str]:
    chunks, model, layout = phase.memory.attention_head_chunks, config.model, phase.layout
    tp, a2a = layout.tensor_model_parallel_size, layout.context_levels[0]
    possible = chunk_counts(HeadSplit.make(model.num_attention_heads // tp, max(1, model.num_kv_heads // tp), a2a))
    if chunks in possible or chunks < 1:
        return []
    nearest = [max((n for n in possible if n < chunks), default=None), min((n for n in possible if n > chunks),
                                                                           default=None)]
    return [f"attention_head_chunks = {chunks}: the {model.num_attention_heads // tp} query heads of a tensor-parallel "
            f"rank over {a2a} ranks of an all-to-all allow {', '.join(map(str, possible))}: chunks of whole groups, or "
            f"equal parts of one. Fix: {' or '.join(str(n) for n in nearest if n is not None)}."]


def _batch_problems(phase: Phase, world_size: int) -> list[str]:
    unit = phase.seq_length * phase.micro_batch_size * phase.data_parallel_size(world_size)
    problems = []
    for batch in phase.batches:
        if batch % unit:
            nearest = max(1, round(batch / unit)) * unit
            problems.append(f"global_batch_tokens = {batch}: must be a multiple of seq_length x micro_batch_size x "
                            f"data-parallel size = {unit}. Fix: {nearest}.")
        elif problem := check_microbatches(phase.layout, phase.num_microbatches(world_size, batch)):
            problems.append(f"global_batch_tokens = {batch}: gives {problem} of {unit} tokens.")
    return problems


def length_warnings(phases: list[Phase]) -> list[str]:
    """Phases that are shorter than the one before them."""
    return [f"phase {after.name!r}: seq_length = {after.seq_length}: is shorter than {before.seq_length}, that of "
            f"phase {before.name!r} before it" for before, after in zip(phases, phases[1:], strict=False)
            if after.seq_length < before.seq_length]


def rope_warnings(phases: list[Phase]) -> list[str]:
    """Phases longer than the context that their rope is scaled for."""
    return [f"phase {phase.name!r}: seq_length = {phase.seq_length}: beyond rope_scaling_factor x "
            f"original_max_position_embeddings = {phase.rope.scaled_length}, the context that its rope is scaled for"
            for phase in phases if phase.seq_length > (phase.rope.scaled_length or phase.seq_length)]
