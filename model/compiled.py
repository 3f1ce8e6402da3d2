"""Pointwise functions as fused kernels on a GPU; on any other device they run as written.

A chain of pointwise operators reads and writes the device's memory once per operator. torch.compile
makes one kernel of the chain, which reads its inputs and writes its results once. The source stays
plain PyTorch, so the CPU's result is the reference for the GPU's. A kernel rounds to bf16 once,
where the single operators round after each.

Nothing is compiled where Triton is missing or torch's own switch `TORCH_COMPILE_DISABLE=1` is set.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import cache

import torch


def run(function: Callable, *arguments):
    """Return `function(*arguments)`, by fused kernels where the first argument is on a GPU.

    Args:
        function: of a module's top level, without collectives, random numbers and autograd; a
            trailing underscore in its name says that it changes an argument in place.
        arguments: the first one is a tensor; the others are tensors, numbers or None.
    """
    if not is_fused(arguments[0]):
        return function(*arguments)
    # Whether a tensor wants a gradient changes nothing here, and would be compiled for apart.
    detached = (x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    return _compile(function)(*detached)


def is_fused(x: torch.Tensor) -> bool:
    """Return whether `run` compiles functions of this tensor."""
    return x.is_cuda and obstacle() is None


@cache
def obstacle() -> str | None:
    """Say why nothing can be compiled, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import torch._dynamo  # seconds: only where there is a GPU

    # torch reads the one here, and the other at each call.
    if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE is set"
    return None


@cache
def _compile(function: Callable) -> Callable:
    """Compile `function` at its first call: for the shapes it meets, then for any.

    The functions are small. Compiling them here takes less time than starting helper processes.
    """
    return torch.compile(function, options={"compile_threads": 1})


def describe(device: torch.device) -> str:
    """Say in one line how pointwise parts run on `device`."""
    if device.type != "cuda":
        return f"pointwise parts: one operator at a time (on {device.type})"
    if reason := obstacle():
        return f"pointwise parts: one operator at a time, several times slower ({reason})"
    return "pointwise parts: fused by torch.compile"
