"""Whether a run can save into its folder: rights, and room for what it will keep there."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.units import show_bytes
from pretrain.checkpointing.folders import complete_steps
from pretrain.checkpointing.space import free_bytes
from pretrain.config.config import Config
from pretrain.planner.model_size import ModelSize
from pretrain.planner.muon_cost import hidden_elements
from pretrain.schedule.phases import Phase

MOMENTS = 2
"""Tensors that AdamW keeps of a parameter; Muon keeps one of a matrix."""


@dataclass(frozen=True)
class DiskReport:
    """Holds what a run's checkpoints need on the disk, in words."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- rights


def require_writable(folder: Path) -> None:
    """Make the folder, where it is not there yet.

    Raises:
        ValueError: it cannot be made, or nothing can be written into it.
    """
    problem = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = _file_in_the_way(folder) or error.strerror
    else:
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            problem = "its file system is read-only"
        elif not os.access(folder, os.W_OK | os.X_OK):
            problem = "no permission to write"
    if problem is not None:
        raise ValueError(
            f"save = {folder}: cannot be written ({problem}). Fix: give another --save."
        )


def _file_in_the_way(folder: Path) -> str | None:
    """Name the file that is where the folder, or a folder around it, should be."""
    files = [place for place in (folder, *folder.parents) if place.is_file()]
    return f"{files[0]} is a file" if files else None


# ---------------------------------------------------------------- room


def check_disk(config: Config, phases: Sequence[Phase], vocab_size: int, clock: int) -> DiskReport:
    """Estimate what the checkpoints of the phases to come take, beside what is free.

    Args:
        clock: consumed tokens.
    """
    settings = config.checkpoint
    if settings.save is None or all(phase.end <= clock for phase in phases):
        return DiskReport()
    root = Path(settings.save)
    size = checkpoint_bytes(config, vocab_size)
    # While one is written, those that it makes superfluous are still there.
    count = most_kept(config, phases) + 1
    free = free_bytes(root)
    present = len(complete_steps(root))
    needed = max(1, count - present) * size
    report = DiskReport()
    report.lines.append(
        f"checkpoints: {show_bytes(size)} each, at most {count:,} at once, together "
        f"{show_bytes(count * size)}; {present:,} are there, and {show_bytes(free)} are free"
    )
    if settings.exports:
        report.lines.append(_describe_exports(config, phases, vocab_size))
    if free < size:
        report.problems.append(
            f"save = {root}: a checkpoint takes {show_bytes(size)}, and {show_bytes(free)} are "
            "free there. Fix: free space, or give another --save."
        )
    elif free < needed:
        report.warnings.append(
            f"save = {root}: up to {needed // size:,} more checkpoints take {show_bytes(needed)}, "
            f"and {show_bytes(free)} are free there; --keep-last and its like say how many stay"
        )
    return report


def _describe_exports(config: Config, phases: Sequence[Phase], vocab_size: int) -> str:
    """Say what the exports to Hugging Face of the whole run take."""
    settings = config.checkpoint
    number_bytes = 2 if settings.hf_export_dtype == "bfloat16" else 4
    size = number_bytes * ModelSize(config.model, vocab_size).num_parameters
    count = len(phases)
    if settings.hf_export_interval is not None:
        count += sum(phase.steps for phase in phases) // settings.hf_export_interval
    return (
        f"exports: {show_bytes(size)} each, up to {count:,} of them, together "
        f"{show_bytes(count * size)}; none is ever deleted"
    )


def checkpoint_bytes(config: Config, vocab_size: int) -> int:
    """Estimate the size of a checkpoint: weights and moments, in the master weights' precision."""
    size = ModelSize(config.model, vocab_size)
    values = size.num_parameters
    if not config.checkpoint.no_save_optim:
        values += MOMENTS * size.num_parameters
        if config.optimizer.optimizer == "muon":
            values -= hidden_elements(size)
    master_bytes = 8 if config.optimizer.fp64 else 4
    return master_bytes * values


def most_kept(config: Config, phases: Sequence[Phase]) -> int:
    """Count the checkpoints of the whole run that are kept at most, once it has come to its end."""
    settings = config.checkpoint
    steps = sum(phase.steps for phase in phases)
    # One for each end of a phase, those of the interval, and by the clock perhaps one each step.
    written = len(phases)
    if settings.save_interval is not None:
        written += steps // settings.save_interval
    if settings.save_interval_in_mins is not None:
        written = steps
    if settings.keep_all:
        return written

    kept = settings.keep_last
    if settings.keep_phase_ends:
        kept += len(phases) - 1  # the last one is among the last
    if settings.keep_every is not None:
        kept += phases[-1].end // settings.keep_every
    if settings.save_retain_interval is not None:
        kept += steps // settings.save_retain_interval
    # A length has its own best ones.
    lengths = {phase.seq_length for phase in phases}
    kept += settings.keep_best * (1 if config.logging.eval_seq_lengths else len(lengths))
    return min(kept, written)
