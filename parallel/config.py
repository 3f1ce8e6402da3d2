"""Settings of the process layout: how many ranks each axis takes."""

from dataclasses import dataclass
from typing import Literal

ShardingStrategy = Literal["optim", "optim_grads", "optim_grads_params"]


@dataclass(kw_only=True)
class LayoutConfig:
    tensor_model_parallel_size: int = 1
    """Ranks that split every weight matrix and the vocabulary (tp)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that split the layers into consecutive stages (pp)."""
    context_parallel_size: int = 1
    """Ranks that split the tokens of a sample (cp), by Ulysses all-to-all around the attention."""
    cp_comm_type: Literal["a2a"] = "a2a"
    """How attention sees the whole sample under context parallelism."""
    data_parallel_sharding_strategy: ShardingStrategy | None = None
    """What is sharded over dp x cp: ZeRO 1 (optim), 2 (optim_grads, the default) or 3 (optim_grads_params)."""
    use_distributed_optimizer: bool | None = None
    """Megatron-LM's spelling of --data-parallel-sharding-strategy optim; the two must agree."""
    sequence_parallel: bool = False
    """Megatron's sequence parallelism: between the tensor-parallel parts, tokens are split over tp."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """nccl on GPUs, gloo on CPUs; naming the one that the machine does not use is an error."""
    distributed_timeout_minutes: int = 10
    """Minutes after which a collective that does not complete ends the job."""

    @property
    def sharding_strategy(self) -> ShardingStrategy:
        """The level that the two flags mean together."""
        return self.data_parallel_sharding_strategy or ("optim" if self.use_distributed_optimizer else "optim_grads")

    def validate(self) -> list[str]:
        """All problems that this section shows by itself, as `name = value: rule. Fix: ...`."""
        problems = []
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
                     "distributed_timeout_minutes"):
            if getattr(self, name) < 1:
                problems.append(f"{name} = {getattr(self, name)}: must be at least 1. Fix: give a positive number.")
        if self.use_distributed_optimizer and self.data_parallel_sharding_strategy not in (None, "optim"):
            problems.append(
                f"use_distributed_optimizer = True: means --data-parallel-sharding-strategy optim, but that is "
                f"{self.data_parallel_sharding_strategy}. Fix: name one of the two, or make them agree.")
        if self.use_distributed_optimizer is False:
            problems.append("use_distributed_optimizer = False: the optimizer is always sharded here. "
                            "Fix: remove the flag.")
        return problems


def check_world_size(world_size: int, tp: int, pp: int, cp: int) -> str | None:
    """The problem with a world of `world_size` ranks split into tp x pp x cp, or None."""
    model_size = tp * pp * cp
    if world_size % model_size == 0:
        return None
    return (f"world size = {world_size}: must be a multiple of tensor x pipeline x context parallel size = "
            f"{tp} x {pp} x {cp} = {model_size}. Fix: start {model_size} processes or a multiple of it, "
            f"or choose sizes whose product divides {world_size}.")
