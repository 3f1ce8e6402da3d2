"""Do all ranks deal the same samples to each other?

Each rank deals for itself, by the lengths of the documents. Ranks that come to different results
read some samples twice and others not at all, and nothing else would show it.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from data.dealing import Dealt
from parallel.collectives import all_reduce
from parallel.layout import Layout
from pretrain.processes.agreement import Refused


def other_deals(what: str) -> Refused:
    """Make the error of ranks that dealt differently.

    Args:
        what: what the samples are of, as "this step".
    """
    return Refused(
        f"balance = deal: ranks gave the samples of {what} to each other in different ways, so "
        "that some were read twice and others not at all. The order follows from the lengths of "
        "the documents. Fix: the same data files and the same code on every node; the last "
        "checkpoint is sound."
    )


def require_same_deals(slots: Sequence[np.ndarray], layout: Layout, what: str) -> None:
    """Compare how ranks dealt samples; collective over the world.

    Args:
        slots: of one step after another, as this rank dealt them.
        what: what the samples are of, as "an evaluation".

    Raises:
        Refused: ranks dealt them in different ways; on all ranks.
    """
    own = Dealt(np.concatenate(slots)).hash
    # The highest and the lowest of all ranks: the same, if all are.
    ends = torch.tensor([own, -own], dtype=torch.int64, device=layout.device)
    highest, lowest = all_reduce(ends, layout.world, dist.ReduceOp.MAX).tolist()
    if highest != -lowest:
        raise other_deals(what)
