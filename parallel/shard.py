"""Data parallelism: FSDP2 over dp x cp (ZeRO 1, 2 or 3), gradients summed, never averaged.

The loss is already divided by the global number of targets, so a plain sum over all ranks that saw
different tokens is the gradient of the global mean.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from parallel.config import ShardingStrategy
from parallel.layout import Layout
from parallel.one_rank import skip_copies


def shard_module(
    module: nn.Module,
    blocks: list[nn.Module],
    layout: Layout,
    strategy: ShardingStrategy,
    compute_dtype: torch.dtype | None,
    *,
    on_host: bool = False,
) -> None:
    """Shard `module` in place over dp x cp; each of `blocks` is gathered and freed as one unit.

    Args:
        on_host: shards and their gradients live in the host's pinned memory (ZeRO-Offload, arXiv
            2101.06840); then they must be allocated there.
        compute_dtype: dtype of parameters in forward and backward; None keeps the stored dtype.
            Over dp x cp, gradients are accumulated and reduced in fp32 (in the stored dtype where
            that is None); sums over tp of a parameter's partial gradients happen in the compute
            dtype.
    """
    assert layout.mesh is not None, "a single process shards nothing"
    mesh = layout.mesh["dp_cp"]
    precision = MixedPrecisionPolicy()
    if compute_dtype is not None:
        precision = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    offload = CPUOffloadPolicy(pin_memory=True) if on_host else OffloadPolicy()
    # The blocks first: the whole then takes what no block holds.
    for part in (*blocks, module):
        fully_shard(
            part,
            mesh=mesh,
            mp_policy=precision,
            reshard_after_forward=strategy == "optim_grads_params",
            offload_policy=offload,
        )
    for unit in _sharded_units([module]):
        # gloo has no pre-multiplied sum; we divide the loss ourselves.
        unit.set_force_sum_reduction_for_comms(True)
        if layout.dp_cp.size > 1:
            # One rank divides by nothing, and would divide by 1.0 in a pass of its own.
            unit.set_gradient_divide_factor(1.0)
        else:
            skip_copies(unit)


def _sharded_units(modules: Iterable[nn.Module]) -> Iterator[FSDPModule]:
    """Yield every part of the modules that FSDP2 gathers and frees as one."""
    for module in modules:
        for unit in module.modules():
            if isinstance(unit, FSDPModule):
                yield unit


def accumulate_gradients(module: nn.Module) -> None:
    """Add up gradients in the dtype of their reduction, after a backward outside FSDP2's hooks.

    Otherwise those of several microbatches would be summed in the compute dtype.
    """
    for unit in _sharded_units([module]):
        group = unit._get_fsdp_state()._fsdp_param_group
        if group is None:  # a unit without parameters of its own
            continue
        for parameter in group.fsdp_params:
            parameter.accumulate_unsharded_grad_if_needed()
            parameter.to_accumulated_grad_if_needed()


def set_microbatch(module: nn.Module, strategy: ShardingStrategy, *, is_last: bool) -> None:
    """Set what is reduced and freed after the next microbatch's backward (without a pipeline).

    ZeRO-1 keeps whole gradients and reduces once per step; ZeRO-2 and 3 reduce after each
    microbatch. Parameters that forward keeps (ZeRO-1, 2) stay gathered until the step's last
    backward.
    """
    assert isinstance(module, FSDPModule)
    module.set_requires_gradient_sync(is_last or strategy != "optim")
    module.set_is_last_backward(is_last)
    module.set_reshard_after_backward(is_last or strategy == "optim_grads_params")


def reshard(modules: Iterable[nn.Module]) -> None:
    """Free the weights that a forward without a backward left gathered.

    Training and checkpoints expect shards.
    """
    for unit in _sharded_units(modules):
        unit.reshard()


def own_shard(tensor: torch.Tensor | None) -> torch.Tensor:
    """Return this rank's part of a sharded parameter, of its gradient or of its moments."""
    assert isinstance(tensor, DTensor), f"{type(tensor)} is not sharded"
    # Not `to_local`: nobody differentiates through it, and a node of the graph takes longer.
    return tensor._local_tensor
