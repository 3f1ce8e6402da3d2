"""The phases of a run as the plan prints them."""

from data.units import show_bytes
from model.activation_memory.settings import MemorySettings
from pretrain.schedule.phases import Phase

MOST_BATCHES_SHOWN = 8
"""Changes of the batch up to which all are listed; of more, the first four and the last three."""
_MEMORY_WORDS = {
    "recompute_granularity": "recompute {}",
    "cpu_offloading_num_layers": "{} layers offloaded",
    "mlp_tiles": "{} MLP tiles",
    "attention_head_chunks": "{} head chunks",
    "loss_chunk_tokens": "loss by {:,} tokens",
}


def memory_words(settings: MemorySettings) -> str:
    """Write the memory settings that are not the default, each after a comma."""
    default = MemorySettings()
    return "".join(
        ", " + text.format(getattr(settings, name))
        for name, text in _MEMORY_WORDS.items()
        if getattr(settings, name) != getattr(default, name)
    )


def describe(phases: list[Phase], world_size: int) -> str:
    """Write the plan, a line per phase."""
    lines = [
        f"{'phase':<12}{'length':>9}{'tokens':>14}{'steps':>8}{'batch':>12}{'micro':>7}   layout"
    ]
    for phase in phases:
        lines += _phase_lines(phase, world_size)
    # Said once, whatever the number of phases.
    if any(
        phase.layout.pipeline_model_parallel_size > 1
        and phase.layout.sharding_strategy == "optim_grads"
        for phase in phases
    ):
        lines.append(
            "under pipeline parallelism gradients are reduced once per step: optim_grads acts as "
            "optim there"
        )
    return "\n".join(lines)


def describe_place(phases: list[Phase], phase: Phase, clock: int, step: int) -> str:
    """Say in one line where a run goes on, in place of the table that its first start printed."""
    left = sum(_steps_left(later, clock) for later in phases)
    return (
        f"phase {phase.name} ({phase.index + 1} of {len(phases)}), step {step:,} of "
        f"{step + left:,}, {clock:,} of {phases[-1].end:,} tokens"
    )


def _steps_left(phase: Phase, clock: int) -> int:
    """Count the steps of a phase that begin at `clock` or later."""
    left = 0
    for start, end, batch in phase.stretches:
        left += max(0, end - max(start, clock)) // batch
    return left


def _phase_lines(phase: Phase, world_size: int) -> list[str]:
    """Write a phase's row, and below it its batches where there are several."""
    layout = phase.layout
    # A chosen layout is marked, with the memory that it was chosen for.
    auto = f" (auto, {show_bytes(phase.predicted_bytes)})" if phase.predicted_bytes else ""
    row = (
        f"{phase.name:<12}{phase.seq_length:>9,}{phase.end - phase.start:>14,}{phase.steps:>8,}"
        f"{phase.global_batch_tokens:>12,}{phase.num_microbatches(world_size):>7}   "
        f"{layout.describe()} dp {phase.data_parallel_size(world_size)} {layout.sharding_strategy}"
        f"{auto}{memory_words(phase.memory)}"
    )
    if len(phase.batches) == 1:
        return [row]
    # A ramp has many batches: its first and last steps say enough.
    changes = [f"{batch:,} from {start:,}" for start, _, batch in phase.stretches]
    if len(changes) > MOST_BATCHES_SHOWN:
        changes = [*changes[:4], "...", *changes[-3:]]
    return [row, f"{'':<12}batch: {', '.join(changes)}"]
