"""The memory of one phase on one machine, on a device and on a host."""

from dataclasses import dataclass

from data.units import show_bytes
from pretrain.config.config import Config
from pretrain.planner.machine import Machine
from pretrain.planner.rank_bytes import MemoryModel, RankMemory
from pretrain.planner.workload import Workload
from pretrain.schedule.phases import Phase


@dataclass(frozen=True)
class PhaseMemory:
    """Estimates what a phase needs on a machine, with its own settings or others."""

    phase: Phase
    config: Config
    world_size: int
    model: MemoryModel
    machine: Machine

    @property
    def memory(self) -> RankMemory:
        """The memory of the rank that needs most."""
        return self.memory_of(self.phase, self.world_size)

    def memory_of(self, phase: Phase, world_size: int) -> RankMemory:
        """Estimate the rank that needs most under other settings."""
        return self.model.estimate_worst(Workload.of_phase(phase, world_size))

    def host_of_node(self, phase: Phase, world_size: int) -> int:
        """Estimate what the processes of a node take of its host's memory."""
        # The host is shared by all processes of the node.
        load = Workload.of_phase(phase, world_size)
        return self.model.estimate_host_of_node(load, self.machine.local_processes)

    def host_problems(self) -> list[str]:
        """Say where what is offloaded takes more than the host has."""
        available = self.machine.host_bytes
        taken = self.host_of_node(self.phase, self.world_size)
        if taken <= available:
            return []
        # Fewer layers may fit; the optimizer is offloaded whole or not.
        layers = self.phase.memory.cpu_offloading_num_layers
        fitting = [count for count in range(layers) if self._host_holds(count)]
        if fitting:
            fix = f"at most {max(fitting)} layers"
        else:
            fix = "fewer processes on a node, or no --optimizer-cpu-offload"
        name = f"cpu_offloading_num_layers = {layers}" if layers else "optimizer_cpu_offload = True"
        # The host is refused in the words of what is offloaded: layers, or the optimizer.
        return [
            f"{name}: takes {show_bytes(taken)} of a node's memory with "
            f"{self.machine.local_processes} processes on it, beyond {self.machine.host_limit}. "
            f"Fix: {fix}, or more --cpu-offloading-host-memory where the node has it."
        ]

    @property
    def copies_of_node(self) -> int:
        """Bytes of a node's host that the copies of its processes take, which saves write.

        On a CPU they are in each process's own estimate.
        """
        if not self.model.on_gpu:
            return 0
        load = Workload.of_phase(self.phase, self.world_size)
        return self.model.estimate_copies_of_node(load, self.machine.local_processes)

    def copy_problems(self) -> list[str]:
        """Say where the copies of the state do not fit into the host beside what is offloaded."""
        offloaded = self.host_of_node(self.phase, self.world_size)
        free = self.machine.host_bytes - offloaded
        if not self.copies_of_node or self.copies_of_node <= free or free < 0:
            return []
        beside = f" beside {show_bytes(offloaded)} that are offloaded" if offloaded else ""
        return [
            f"async_save = True: the copies of the state that saves write take "
            f"{show_bytes(self.copies_of_node)} of a node's memory with "
            f"{self.machine.local_processes} processes on it{beside}, beyond "
            f"{self.machine.host_limit}. Fix: --no-async-save, which waits for each save."
        ]

    def _host_holds(self, num_layers: int) -> bool:
        """Tell whether the host holds this many offloaded layers."""
        changed = self.phase.with_memory(cpu_offloading_num_layers=num_layers)
        return self.host_of_node(changed, self.world_size) <= self.machine.host_bytes
