"""The machines that a plan is for: those that are named, or this one."""

from dataclasses import dataclass, replace

from data.units import GIB
from pretrain.config.config import Config
from pretrain.planner.hardware import Hardware
from pretrain.planner.machine import Device, Machine
from tools.planning.hardware_file import named_hardware, read_hardware

HOST_MEMORY_GIB = 2048
"""Memory of a node, as in NVIDIA's DGX H100, where nothing else is said."""


@dataclass(frozen=True)
class Cluster:
    """Describes equal machines, and the world of processes on them."""

    world_size: int
    machine: Machine

    @property
    def hardware(self) -> Hardware:
        """What each process computes on."""
        return self.machine.device.hardware

    @property
    def nodes(self) -> int:
        """Machines that the world fills."""
        return -(-self.world_size // self.hardware.devices_per_node)


def find_cluster(
    config: Config,
    world_size: int,
    *,
    hardware: str | None,
    hardware_file: str | None,
    devices_per_node: int | None,
    host_memory_gib: float | None,
) -> Cluster:
    """Return the machines that the arguments name; without them, machines like this one.

    Raises:
        ValueError: hardware that is not known, or two that are named.
    """
    if hardware is not None and hardware_file is not None:
        raise ValueError(
            f"hardware = {hardware}: cannot be combined with hardware_file. Fix: remove one of "
            "them; a file may begin with base: and a row of the table."
        )
    here = Machine.here(config)
    row = here.device.hardware
    if hardware is not None:
        row = named_hardware(hardware)
    elif hardware_file is not None:
        row = read_hardware(hardware_file)
    if devices_per_node is not None:
        row = replace(row, devices_per_node=devices_per_node)
    is_here = hardware is None and hardware_file is None
    device = replace(here.device, hardware=row) if is_here else Device.of(row, config.layout)
    machine = replace(
        here,
        device=device,
        local_processes=min(world_size, row.devices_per_node),
        is_fused=here.is_fused if is_here else not row.is_cpu,
    )
    return Cluster(world_size, _with_host(machine, config, host_memory_gib, is_here=is_here))


def _with_host(
    machine: Machine, config: Config, host_memory_gib: float | None, *, is_here: bool
) -> Machine:
    """Give the machine the memory of its host; a setting of the run is meant for any machine."""
    if config.memory.cpu_offloading_host_memory:
        return machine
    if host_memory_gib is not None:
        limit = f"host_memory_gib = {host_memory_gib:g}"
        return replace(machine, host_bytes=int(host_memory_gib * GIB), host_limit=limit)
    if is_here:
        return machine
    limit = f"the {HOST_MEMORY_GIB} GiB that are assumed (--host-memory-gib)"
    return replace(machine, host_bytes=HOST_MEMORY_GIB * GIB, host_limit=limit)
