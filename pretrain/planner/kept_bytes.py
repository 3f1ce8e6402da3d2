"""What waits for backward: bytes of a layer, messages of a pipeline; where most is held."""

from dataclasses import dataclass

from parallel.schedule import stages_of_rank
from pretrain.planner.workload import Workload


def pinned_bytes(size: int) -> int:
    """Return what a tensor takes in pinned memory.

    torch's allocator for the host hands it out in powers of two.
    """
    return 2 ** (size - 1).bit_length() if size else 0


@dataclass(frozen=True)
class KeptBytes:
    """Bytes that wait for backward."""

    device: int
    host: int = 0
    """The part of them that moves to the host's memory where the layer is offloaded."""


@dataclass(frozen=True)
class PeakCandidate:
    """A point of a layer's backward at which much is held, beside what all layers keep."""

    freed: int
    """Bytes that the layer at work kept and that are no longer there."""
    made: int
    """Bytes made for it."""
    gradients: int
    """Bytes of the parameters' gradients, before FSDP2 takes them."""


def count_messages(load: Workload, pp_rank: int, in_flight: int) -> int:
    """Count the activations that a rank of a pipeline holds beside those of its layers.

    torch.distributed.pipelining makes the buffers of all microbatches at the start of a phase, for
    what the stage before sends and for the gradient of what the stage after got. A stage's output
    stays until its gradient has come; the input of its first layer is the buffer itself.
    """
    layout = load.layout
    pp = layout.pipeline_model_parallel_size
    if pp == 1:
        return 0
    stages = stages_of_rank(layout.schedule, pp_rank, pp, layout.stages_per_rank)
    last = pp * layout.stages_per_rank - 1
    before = sum(number > 0 for number in stages)
    after = sum(number < last for number in stages)
    buffers = load.num_microbatches * (before + after)
    return buffers + in_flight * (after - before) // len(stages)
