"""Runs on device meta what a GPU runs: FSDP2, pipelines, functions that are compiled to one kernel.

torch refuses FSDP2 on meta, since it takes parameters there for parameters that were forgotten.
Here that is the purpose: a stage of any size has its shapes and takes no memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from torch.distributed.fsdp._fully_shard import _fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.pipelining import PipelineStage
from torch.nn.utils import clip_grad

from model import compiled
from tools.plan_verify.live_memory import LiveMemory


@contextmanager
def sharding_on_meta() -> Iterator[None]:
    """Let FSDP2 shard, gather and reduce on meta; streams and events are those of a CPU: none."""
    meta = torch.device("meta")
    with (
        mock.patch.object(torch, "meta", torch.cpu, create=True),
        mock.patch.object(_fully_shard, "_get_device_from_mesh", lambda _mesh: meta),
        mock.patch.object(FSDPParamGroup, "_validate_no_meta_params", lambda _group: None),
    ):
        yield


@contextmanager
def norms_on_meta() -> Iterator[None]:
    """Let torch compute norms of many tensors at once on meta, as on a GPU."""
    with mock.patch.object(clip_grad, "_device_has_foreach_support", lambda _device: True):
        yield


@contextmanager
def pipeline_on_meta() -> Iterator[None]:
    """Let a pipeline start on meta, where nothing can be read and no random numbers exist."""
    name = "_warmup_backward_result"
    vote = getattr(PipelineStage, name, None)

    def agree(stage: PipelineStage, *args, **options) -> torch.Tensor:
        # Messages are exchanged as ever; their answer cannot be read. Our stages' shapes are given.
        assert vote is not None
        vote(stage, *args, **options)
        return torch.ones(1, dtype=torch.int32, device="cpu")

    with mock.patch.object(torch.random, "fork_rng", lambda **_: nullcontext()):
        # torch 2.11 has no vote.
        if vote is None:
            yield
            return
        with mock.patch.object(PipelineStage, name, agree):
            yield


@contextmanager
def kernels_as_on_gpu(live: LiveMemory) -> Iterator[None]:
    """Count of a function that a GPU compiles to one kernel only what it returns."""

    def run(function: Callable, *arguments):
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        with live.paused():
            result = function(*detached)
        live.add(result)
        return result

    with (
        mock.patch.object(compiled, "run", run),
        mock.patch.object(compiled, "is_fused", lambda _x: True),
    ):
        yield
