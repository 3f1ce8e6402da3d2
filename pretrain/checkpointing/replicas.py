"""Copies of one parameter, compared bit for bit before a save.

Copies that drift apart (a gradient that was not reduced) look like a healthy run; a checkpoint
would keep one of them at random.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from model.build import tied_copies
from model.gpt import GPTStage
from parallel.collectives import all_reduce
from parallel.layout import Axis, Layout
from parallel.shard import own_shard
from parallel.tensor import tp_placement
from pretrain.checkpointing.shared_errors import gather

SHOWN_PARAMETERS = 5


def check_replicas(stages: list[GPTStage], layout: Layout) -> None:
    """Compare the copies over tp, and those of a tied embedding over the first and last stage.

    Raises:
        RuntimeError: on every rank of the world, naming the parameters on the ranks that hold them.
    """
    named = [pair for stage in stages for pair in stage.named_parameters()]
    over_tp = [(name, parameter) for name, parameter in named if _is_replicated(parameter)]
    problems = _differences(over_tp, layout.tp, layout.device)

    # A tied embedding: both copies on this rank, or one here and one on another rank.
    copies = tied_copies(stages)
    problems += tied_differences(stages, layout)
    if layout.embedding.size > 1:
        tied = [("embedding.weight", copy) for copy in copies]
        problems += _differences(tied, layout.embedding, layout.device)

    # All ranks refuse together.
    found = all_reduce(torch.tensor(len(problems), device=layout.device), layout.world)
    if found > 0:
        _refuse(problems or ["on other ranks"])


def check_copies(
    tensors: Mapping[str, torch.Tensor], layout: Layout, problems: list[str], world: Axis
) -> None:
    """Compare what `check_replicas` compares in a copy of the state, over one group of all ranks.

    It runs in any thread, beside the collectives of training.

    Args:
        tensors: of the checkpoint, in the host's memory.
        problems: what this rank found otherwise (`tied_differences`).
        world: all ranks.

    Raises:
        RuntimeError: on every rank of the world, naming the parameters.
    """
    axes = {axis.ranks: axis.name for axis in (layout.tp, layout.embedding)}
    digests: dict[tuple[tuple[int, ...], str], int] = {}
    for name, tensor in tensors.items():
        if not name.startswith("model.") or not isinstance(tensor, DTensor):
            continue
        parameter = name.removeprefix("model.")
        holders = set()
        if isinstance(tp_placement(tensor), Replicate):
            holders.add(layout.tp.ranks)
        if parameter == "embedding.weight":
            holders.add(layout.embedding.ranks)
        for ranks in holders:
            if len(ranks) > 1:
                digests[ranks, parameter] = _digest(tensor)

    first: dict[tuple[tuple[int, ...], str], int] = {}
    differing: dict[tuple[int, ...], list[str]] = {}
    for part in gather(digests, world):
        for (ranks, name), digest in part.items():
            if first.setdefault((ranks, name), digest) != digest:
                names = differing.setdefault(ranks, [])
                if name not in names:
                    names.append(name)
    found = [text for part in gather(problems, world) for text in part]
    for ranks, names in differing.items():
        axis = axes.get(ranks, "tp or embedding")
        found.append(f"{', '.join(names[:SHOWN_PARAMETERS])} over {axis} ranks {ranks}")
    _refuse(found)


def tied_differences(stages: list[GPTStage], layout: Layout) -> list[str]:
    """Compare the two copies of a tied embedding where both are on this rank."""
    copies = tied_copies(stages)
    if len(copies) == 2 and not torch.equal(own_shard(copies[0]), own_shard(copies[1])):
        return [f"embedding.weight over the two stages of rank {layout.world.rank}"]
    return []


def _refuse(problems: list[str]) -> None:
    """Raise RuntimeError if there are problems."""
    if problems:
        raise RuntimeError(
            "copies of parameters are no longer the same: "
            f"{'; '.join(problems)}. Nothing is saved; the last checkpoint is good."
        )


def _is_replicated(parameter: nn.Parameter) -> bool:
    """Tell whether every tp rank holds the whole parameter."""
    assert isinstance(parameter, DTensor)
    return isinstance(tp_placement(parameter), Replicate)


def _differences(
    parameters: list[tuple[str, nn.Parameter]], axis: Axis, device: torch.device
) -> list[str]:
    """Say what differs over `axis`, in one sentence or none."""
    if axis.size == 1 or not parameters:
        return []
    # Hashes of 63 bits: the highest of all ranks is the lowest, too, where all are the same.
    digests = [_digest(parameter) for _, parameter in parameters]
    own = torch.tensor(digests, dtype=torch.int64, device=device)
    highest = all_reduce(own.clone(), axis, dist.ReduceOp.MAX)
    lowest = all_reduce(own.clone(), axis, dist.ReduceOp.MIN)
    is_same = (highest == lowest).tolist()
    names = [name for name, _ in parameters]
    differing = [name for name, same in zip(names, is_same, strict=True) if not same]
    if not differing:
        return []
    return [f"{', '.join(differing[:SHOWN_PARAMETERS])} over {axis.name} ranks {axis.ranks}"]


def _digest(parameter: torch.Tensor) -> int:
    """Hash this rank's shard of a parameter into 63 bits."""
    shard = own_shard(parameter).detach().cpu().contiguous().view(-1).view(torch.uint8)
    return xxhash.xxh3_64_intdigest(shard.numpy().data) >> 1
