"""FSDP2 on an axis of one rank, without the copies that only several ranks need.

FSDP2 keeps its steps there (gather, free, reduce) and copies in each of them. Here a parameter is
cast by one pass, or not copied at all where its stored dtype is the one it is used in; and a
step's first gradient is brought to the reduction's buffer once, which then is the result.

FSDP2's own names that this relies on are pinned by tests/unit/test_one_rank.py.
"""

from collections.abc import Sequence

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup


def skip_copies(unit: FSDPModule) -> None:
    """Spare a unit whose parameters nobody shares the copies of a gather and of a reduction."""
    group = unit._get_fsdp_state()._fsdp_param_group
    if group is None:  # a unit without parameters of its own
        return
    unit.set_custom_reduce_scatter(_SumOfOne(group))
    for parameter in group.fsdp_params:
        parameter.__class__ = _WholeParameter


class _SumOfOne(ReduceScatter):
    """A reduction over one rank: what goes in comes out, in the same memory where it may stay.

    FSDP2 asks for the buffer of what goes in, then for that of what comes out.
    """

    def __init__(self, group: FSDPParamGroup):
        self.group = group
        self.waiting: torch.Tensor | None = None

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return a new buffer for what goes in, and the same one for what comes out if it stays."""
        buffer = self.waiting
        self.waiting = None
        if buffer is None or (tuple(buffer.shape), buffer.dtype) != (tuple(size), dtype):
            buffer = torch.empty(*size, dtype=dtype, device=device)
            if self._becomes_gradient(dtype):
                self.waiting = buffer
        return buffer

    def _becomes_gradient(self, dtype: torch.dtype) -> bool:
        """Tell whether what comes out is kept as the gradient, neither added, cast nor moved.

        FSDP2 reads it for these on a stream of its own, while the stream that computes may already
        write something else to the memory of what went in.
        """
        return not any(
            parameter.sharded_param.grad is not None
            or parameter.orig_dtype != dtype
            or parameter.offload_to_cpu
            for parameter in self.group.fsdp_params
        )

    def __call__(self, *_, **__) -> None:
        """Leave the buffer as it is."""


class _WholeParameter(FSDPParam):
    """A parameter whose shard is the whole."""

    @property
    def all_gather_inputs(self) -> list[torch.Tensor]:
        """Return the shard in its stored dtype: FSDP2 casts it by copying it to the output."""
        shard = self._sharded_param_data
        return [shard.to(self.device, non_blocking=True) if self.offload_to_cpu else shard]

    def init_all_gather_outputs(
        self,
        all_gather_input_numels: list[int],
        all_gather_input_dtypes: list[torch.dtype],
        world_size: int,
        device: torch.device,
    ) -> None:
        """Make the output, or take the shard itself, which FSDP2's copy then leaves unchanged."""
        if not self._is_used_in_place:
            dtypes = [self.param_dtype or dtype for dtype in all_gather_input_dtypes]
            super().init_all_gather_outputs(all_gather_input_numels, dtypes, world_size, device)
            return
        shard = self._sharded_param_data
        if self.all_gather_outputs and self.all_gather_outputs[0] is not shard:
            # Somebody has put another shard in the parameter's place.
            del self._unsharded_param
        memory = shard.untyped_storage().nbytes()
        assert memory == shard.nbytes, (
            f"{self._param_fqn}: its shard is {shard.nbytes:,} of {memory:,} bytes of one memory, "
            "and FSDP2 would cut that to the shard's size. Fix: give the shard memory of its own"
        )
        self.all_gather_outputs = [shard]

    def free_unsharded_param(self) -> None:
        """Free the output, unless it is the shard."""
        if not self._is_used_in_place:
            super().free_unsharded_param()

    @property
    def _is_used_in_place(self) -> bool:
        return self.param_dtype is None and not self.offload_to_cpu
