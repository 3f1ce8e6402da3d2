"""Do the phases that are still to come fit into the memory of a device and of its host?

Beyond the device's memory a phase is refused before anything is allocated, with the settings that
would fit. Where an error of the estimate could be what is missing (machine.py: MEMORY_MARGIN), it
is warned of.
"""

import os
from dataclasses import dataclass

from data.units import show_bytes
from pretrain.config.config import Config
from pretrain.planner.at_fault import FitsMemory
from pretrain.planner.leaner_settings import nearest_settings
from pretrain.planner.machine import Machine
from pretrain.planner.phase_memory import PhaseMemory
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.schedule.phases import Phase

SHARE_AFTER_ERROR = 0.85
"""Where an estimate was too low: settings are offered that need at most this share of it."""


@dataclass(frozen=True)
class MemoryReport:
    """Holds what the check found, a line each."""

    lines: list[str]
    warnings: list[str]
    problems: list[str]


def is_checked(config: Config, model: MemoryModel) -> bool:
    """Tell whether the device's memory is a limit.

    A CPU is checked only with --device-memory-gib: its memory is not the process's alone.
    """
    # With the setting it is a limit for a CPU as well.
    return model.on_gpu or config.layout.device_memory_gib is not None


def check_memory(
    phases: list[Phase],
    config: Config,
    world_size: int,
    vocab_size: int,
    clock: int,
    machine: Machine | None = None,
) -> MemoryReport:
    """Check every phase that is not over, with all its settings.

    Args:
        clock: positions consumed.
        machine: by default this process's.
    """
    machine = machine or Machine.here(config)
    device = machine.device
    report = MemoryReport([], [], [])
    model = MemoryModel.of_run(config, vocab_size, device.hardware)
    if not is_checked(config, model):
        return report
    # A phase that is over has shown that it fits.
    for phase in (phase for phase in phases if phase.end > clock):
        needs = PhaseMemory(phase, config, world_size, model, machine)
        memory = needs.memory
        where = f"phase {phase.name!r}: "
        copies = needs.copies_of_node
        beside = f"; copies for saves {show_bytes(copies)} of a node's memory" if copies else ""
        report.lines.append(
            f"phase {phase.name}: estimated memory of a process {memory.describe()}{beside}"
        )
        problems = [*needs.host_problems(), *needs.copy_problems()]
        report.problems.extend(where + problem for problem in problems)
        text = f"seq_length = {phase.seq_length}: needs {memory.describe()}"
        if memory.total > device.memory_bytes:
            # What is offered must fit with the margin that a choice would keep.
            nearest = nearest_settings(needs, device.usable)
            nearest = nearest or ["a smaller model", "more processes"]
            report.problems.append(
                f"{where}{text} (estimated), and a process has {show_bytes(device.memory_bytes)} "
                f"of {device.hardware.name} memory. Fix: {'; or '.join(nearest)}. To try it all "
                "the same: --device-memory-gib."
            )
        elif memory.total > device.usable:
            report.warnings.append(f"{where}{text}, which is more than {device.describe()}")
    return report


def memory_filter(
    config: Config, world_size: int, vocab_size: int | None, machine: Machine
) -> FitsMemory | None:
    """Return what says whether a phase fits the machine's memory; None = it is not checked."""
    if vocab_size is None:
        return None
    model = MemoryModel.of_run(config, vocab_size, machine.device.hardware)
    if not is_checked(config, model):
        return None

    # Whoever searches for a layout asks this of each that is legal.
    def fits(phase: Phase) -> bool:
        needs = PhaseMemory(phase, config, world_size, model, machine)
        return needs.memory.total <= machine.device.memory_bytes and not needs.host_problems()

    return fits


def describe_out_of_memory(
    phase: Phase,
    rank: int,
    figures: dict[str, int],
    config: Config,
    world_size: int,
    vocab_size: int,
    machine: Machine,
) -> str:
    """Say what to try when the device's memory was not enough, whatever was estimated.

    Args:
        figures: bytes by name, as torch counts them (allocated, at most, reserved).
    """
    model = MemoryModel.of_run(config, vocab_size, machine.device.hardware)
    needs = PhaseMemory(phase, config, world_size, model, machine)
    memory = needs.memory
    # What is said to have failed, what was expected, and what would need clearly less.
    counted = ", ".join(f"{name} {show_bytes(size)}" for name, size in figures.items())
    limit = min(machine.device.usable, int(SHARE_AFTER_ERROR * memory.total))
    nearest = nearest_settings(needs, limit, count=3)
    return (
        f"out of memory in phase {phase.name!r} on rank {rank} (process {os.getpid()}): {counted}; "
        f"estimated were {memory.describe()} of {show_bytes(machine.device.memory_bytes)}. To "
        f"try: {'; or '.join(nearest) or 'more processes'}."
    )
