"""What each process computes on, and what its node has."""

import dataclasses
from dataclasses import dataclass

from data.units import GIB, show_bytes
from model import compiled
from parallel.config import LayoutConfig
from parallel.layout import (
    device_here,
    host_memory,
    launched_local_world_size,
    launched_on_one_machine,
)
from pretrain.config.config import Config
from pretrain.planner.hardware import CPU, TABLE, Hardware, find_hardware

MEMORY_MARGIN = 0.1
"""Share of the device's memory that stays free.

It is for the libraries, fragmentation and the estimate's error.
"""


@dataclass(frozen=True)
class Device:
    """Describes the device that each process computes on."""

    hardware: Hardware
    memory_bytes: int

    @staticmethod
    def here(config: LayoutConfig) -> "Device":
        """Return this process's device, with --device-memory-gib for its memory if that is given.

        A GPU without a row in the table is ranked with an A100's rates.
        """
        # A fraction of a GiB is left out, as a setting would leave it out.
        name, memory = device_here()
        known = CPU if name == "cpu" else find_hardware(name)
        hardware = known or dataclasses.replace(TABLE["A100"], name=name)
        # Of several nodes, each has what the launcher started on this one.
        if not launched_on_one_machine():
            per_node = launched_local_world_size()
            hardware = dataclasses.replace(hardware, devices_per_node=per_node)
        gib = config.device_memory_gib or memory // GIB
        return Device(hardware, int(gib * GIB))

    @staticmethod
    def of(hardware: Hardware, config: LayoutConfig) -> "Device":
        """Return a device of that kind, with --device-memory-gib for its memory if given."""
        memory = hardware.memory_bytes or host_memory()
        gib = config.device_memory_gib or memory // GIB
        return Device(hardware, int(gib * GIB))

    @property
    def usable(self) -> int:
        """Bytes that a layout may fill."""
        return int((1 - MEMORY_MARGIN) * self.memory_bytes)

    def describe(self) -> str:
        """Write the usable memory, and of which device it is."""
        return (
            f"{show_bytes(self.usable)} (all but a tenth of the {show_bytes(self.memory_bytes)} "
            f"of a {self.hardware.name})"
        )


@dataclass(frozen=True)
class Machine:
    """Describes what each process has, or shares with the others of its node."""

    device: Device
    local_processes: int
    host_bytes: int
    """Memory of a node that offloaded tensors may take together."""
    host_limit: str
    """What bounds it, in words."""
    is_fused: bool = True
    """Do its GPUs run pointwise parts as fused kernels?

    Without them a chunk of the loss holds fp32 logits as well.
    """

    @staticmethod
    def here(config: Config) -> "Machine":
        """Return what this process has."""
        given = config.memory.cpu_offloading_host_memory
        # The setting is for machines that other jobs share.
        if given:
            host_bytes = int(given * GIB)
            limit = f"cpu_offloading_host_memory = {given:g}"
        else:
            host_bytes = host_memory()
            limit = f"the machine's {show_bytes(host_bytes)}"
        device = Device.here(config.layout)
        # A CPU has no fused kernels, and its estimates know that.
        is_fused = device.hardware.is_cpu or compiled.obstacle() is None
        return Machine(device, launched_local_world_size(), host_bytes, limit, is_fused)
