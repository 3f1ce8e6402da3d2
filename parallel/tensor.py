"""Tensor parallelism: parameters as DTensors on the tp mesh axis, used through `.to_local()`.

A module is written with its full shapes and made on the meta device; `distribute_parameters` then
replaces each parameter by this rank's part, following a table of `ParameterSharding`. The layers
that use them state their collectives explicitly (parallel/collectives.py): no DTensor operator
runs. On an axis of one rank parameters stay plain tensors: a DTensor's way into the graph and back
takes longer than the work on a small parameter.

Source of the column / row split and of the vocabulary split: Megatron-LM (arXiv 1909.08053).

Legend: t tokens, D hidden, v this rank's part of the vocabulary, V all of it.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from parallel.collectives import all_reduce
from parallel.layout import Axis


@dataclass(frozen=True)
class ParameterSharding:
    """How one parameter is split over the tp axis."""

    dim: int | None = None
    """Tensor dim that is split; None = every rank holds the whole parameter."""
    partial_gradient: bool = False
    """Each rank computes only a part of the gradient of a replicated parameter: sum it over tp."""


def distribute_parameters(
    module: nn.Module, shardings: dict[str, ParameterSharding], tp_mesh: DeviceMesh
) -> None:
    """Replace every (meta) parameter of `module` by a DTensor that holds this rank's part.

    Each owning module also gets `partial_gradient`, to be passed to `local_part`. On one rank
    nothing is replaced.

    Args:
        shardings: parameter name -> sharding; a missing name is an error (KeyError).
    """
    size = tp_mesh.size()
    rank = tp_mesh.get_local_rank()
    for name, parameter in list(module.named_parameters()):
        sharding = shardings[name]
        if size == 1:
            continue
        # Cut this rank's part out, or keep the whole.
        local = parameter.data
        placement = Replicate()
        if sharding.dim is not None:
            assert parameter.shape[sharding.dim] % size == 0, (
                f"{name} {tuple(parameter.shape)} over tp {size}"
            )
            local = local.chunk(size, sharding.dim)[rank].contiguous()
            placement = Shard(sharding.dim)
        # Put it in the parameter's place.
        owner_name, _, leaf = name.rpartition(".")
        distributed = nn.Parameter(DTensor.from_local(local, tp_mesh, [placement], run_check=False))
        owner = module.get_submodule(owner_name)
        setattr(owner, leaf, distributed)
        vars(owner)["partial_gradient"] = sharding.partial_gradient


def tp_placement(parameter: DTensor) -> Placement:
    """Return how a parameter that FSDP2 has sharded (parallel/shard.py) is placed over tp."""
    # The mesh is [dp_cp, tp], or [dp_cp] where tp is one rank.
    return parameter.placements[1] if len(parameter.placements) > 1 else Replicate()


def local_part(parameter: nn.Parameter, *, partial_gradient: bool = False) -> torch.Tensor:
    """Return this tp rank's part of a parameter, as a plain tensor that carries the gradient back.

    Without `partial_gradient` the gradient of a replicated parameter must be the same on all tp
    ranks. A parameter that was not distributed (tp is one rank) is returned unchanged.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    if partial_gradient:
        return parameter.to_local(grad_placements=[Partial()])
    return parameter.to_local()


def vocab_parallel_embedding(
    ids_t: torch.Tensor, weight_vD: torch.Tensor, tp: Axis
) -> torch.Tensor:
    """Look up [t] token ids in a table whose rows are split over tp -> [t, D].

    A token's row is on one rank; the others return zeros for it. The caller sums over tp.
    """
    if tp.size == 1:
        return nn.functional.embedding(ids_t, weight_vD)
    # This rank holds the rows [rank * v, (rank + 1) * v).
    v = weight_vD.shape[0]
    local_ids = ids_t - tp.rank * v
    absent = (local_ids < 0) | (local_ids >= v)
    found = nn.functional.embedding(local_ids.masked_fill(absent, 0), weight_vD)
    return found.masked_fill(absent[:, None], 0.0)


def vocab_parallel_argmax(logits_tv: torch.Tensor, tp: Axis) -> torch.Tensor:
    """Find the id with the largest logit of each token, [t, v] logits -> int64 [t]. No gradient.

    The result is the same on all tp ranks. Of equal logits the smallest id is taken, as in one
    process. Columns that hold no token must be -inf.
    """
    # torch documents that `max` names the first of equal columns.
    best, ids = logits_tv.detach().max(dim=1)
    best = best.to(torch.promote_types(best.dtype, torch.float32))
    top = all_reduce(best.clone(), tp, dist.ReduceOp.MAX)
    # Ranks that hold no best logit name an id beyond all others.
    global_ids = ids + tp.rank * logits_tv.shape[1]
    ids = torch.where(best == top, global_ids, torch.iinfo(torch.int64).max)
    return all_reduce(ids, tp, dist.ReduceOp.MIN)
