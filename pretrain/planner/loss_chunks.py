"""How many tokens' logits exist at once, where the phases leave it open."""

from data.units import GIB
from pretrain.config.config import Config
from pretrain.planner.machine import Machine
from pretrain.planner.phase_memory import PhaseMemory
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.schedule.phases import Phase

LARGE_LOSS_CHUNKS = (8192, 4096)
"""Tokens that a GPU prefers for loss_chunk_tokens.

Each chunk reads and writes the weight's fp32 gradient once.
"""
LARGEST_LOGITS_BYTES = 2 * GIB
"""Size of a chunk's logits beyond which a larger chunk is not worth its memory."""


def choose_loss_chunks(
    phases: list[Phase],
    config: Config,
    world_size: int,
    vocab_size: int,
    machine: Machine | None = None,
) -> list[Phase]:
    """Give each phase that leaves it open the largest chunk of the loss that fits its GPU."""
    machine = machine or Machine.here(config)
    model = MemoryModel.of_run(config, vocab_size, machine.device.hardware)
    if not model.on_gpu or not machine.is_fused:
        return phases
    rows = config.model.padded_vocab_size(vocab_size)

    def with_chunk(phase: Phase) -> Phase:
        columns = rows // phase.layout.tensor_model_parallel_size
        for tokens in LARGE_LOSS_CHUNKS:
            larger = phase.with_memory(loss_chunk_tokens=tokens)
            needed = PhaseMemory(larger, config, world_size, model, machine).memory.total
            logits_bytes = tokens * columns * model.compute_bytes
            if logits_bytes <= LARGEST_LOGITS_BYTES and needed <= machine.device.usable:
                return larger
        return phase

    return [
        with_chunk(phase) if phase.memory.loss_chunk_tokens is None else phase for phase in phases
    ]
