"""Record the matrix products and attention kernels of a step, and time them alone.

What a mode computes again in backward, or cuts into tiles or chunks, is in the list because it was
called.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

ONEDNN_LINEAR = "mkldnn::_linear_pointwise"
"""The product that model/products.py takes on a CPU: of x and the weight's rows."""
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", ONEDNN_LINEAR}
ATTENTION_PREFIX = "_scaled_dot_product_"
KINDS = ("products", "attention")
"""What is recorded and timed, apart from each other."""


class _Recorder(TorchDispatchMode):
    """Count the calls of KINDS by their arguments, with shapes in the place of tensors."""

    def __init__(self):
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # A DTensor's own product comes by again for its local part.
        if kind_of(func) is not None and not any(_is_wrapped(value) for value in args):
            # Calls with the same shapes and other arguments are one entry.
            key = tree_map(_describe, (tuple(args), tuple(sorted(kwargs.items()))))
            self.calls[(func, *_hashable(key))] += 1
        return func(*args, **kwargs)


def kind_of(func: torch._ops.OpOverload) -> str | None:
    """Return which of KINDS an operator is, or None for everything else."""
    name = func._schema.name.removeprefix("aten::")
    if name in PRODUCTS:
        return "products"
    return "attention" if name.startswith(ATTENTION_PREFIX) else None


def _is_wrapped(value) -> bool:
    return isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, torch.nn.Parameter)


class _Shape(tuple):
    """Describe a tensor by its sizes, strides, dtype and device."""


def _describe(value):
    if not isinstance(value, torch.Tensor):
        return value
    return _Shape((tuple(value.shape), value.stride(), value.dtype, value.device))


def _hashable(value):
    if isinstance(value, list):
        return ("list", *map(_hashable, value))
    return (
        value
        if isinstance(value, _Shape) or not isinstance(value, tuple)
        else tuple(map(_hashable, value))
    )


def record(run: Callable[[], object]) -> Counter:
    """Run, and count the calls of KINDS by (function, arguments with shapes for tensors)."""
    with _Recorder() as recorder:
        run()
    return recorder.calls


def _materialize(value):
    if isinstance(value, _Shape):
        sizes, strides, dtype, device = value
        if not dtype.is_floating_point:
            return torch.zeros(sizes, dtype=dtype, device=device)
        # As much memory as the strides reach over.
        elements = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        # Small numbers: a softmax or an exponential of them stays in range.
        return (
            torch.empty(elements, dtype=dtype, device=device)
            .normal_(0.0, 0.1)
            .as_strided(sizes, strides)
        )
    if isinstance(value, tuple):
        return (
            [_materialize(one) for one in value[1:]]
            if value[:1] == ("list",)
            else tuple(map(_materialize, value))
        )
    return value


class Replay:
    """Hold recorded calls with tensors of their own, ready to run again."""

    def __init__(self, calls: Counter):
        self.calls = [
            (func, _materialize(args), dict(_materialize(kwargs)), count)
            for (func, args, kwargs), count in calls.items()
        ]

    def run(self) -> dict[str, float]:
        """Run every call as often as it was recorded; returns the seconds by kind.

        For the CPU, which runs in order.
        """
        seconds = dict.fromkeys(KINDS, 0.0)
        for func, args, kwargs, count in self.calls:
            start = time.perf_counter()
            for _ in range(count):
                func(*args, **kwargs)
            kind = kind_of(func)
            assert kind is not None, func
            seconds[kind] += time.perf_counter() - start
        return seconds


def product_flops(calls: Counter) -> int:
    """Count the floating-point operations of the recorded matrix products."""
    total = 0
    for (func, args, _), count in calls.items():
        if kind_of(func) != "products":
            continue
        sizes = [value[0] for value in args if isinstance(value, _Shape)]
        if func._schema.name == ONEDNN_LINEAR:
            # A bias may follow.
            left, (columns, _) = sizes[:2]
        else:
            # addmm has the sum before its two factors.
            left, (*_, columns) = sizes[-2:]
        # Two operations per multiply-add.
        total += 2 * math.prod(left) * columns * count
    return total


class TimedAttend:
    """Time the forward and backward calls of `attend`: by CUDA events, or by the CPU's clock."""

    def __init__(self, attend: Callable, device: torch.device):
        self.attend = attend
        self.is_cuda = device.type == "cuda"
        self.spans: list[tuple] = []
        self._begun = None

    def look(self):
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(self, q, k, v, segments, *scoring):
        # Backward runs through here last, and through _Enter first.
        q, k, v = _Leave.apply(self, q, k, v)
        begun = self.look()
        out = self.attend(q, k, v, segments, *scoring)
        self.spans.append((begun, self.look()))
        return _Enter.apply(self, out)

    @contextmanager
    def counting(self) -> Iterator[list[float]]:
        """Give a list that holds, afterwards, the seconds spent inside."""
        self.spans = []
        found = []
        yield found
        if self.is_cuda:
            torch.cuda.synchronize()
        found.append(sum(a.elapsed_time(b) / 1e3 if self.is_cuda else b - a for a, b in self.spans))


class _Enter(torch.autograd.Function):
    """Pass the output on; its backward is the first of the call's and starts the clock."""

    @staticmethod
    def forward(ctx, clock, out):
        ctx.clock = clock
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        ctx.clock._begun = ctx.clock.look()
        return None, grad


class _Leave(torch.autograd.Function):
    """Pass q, k and v on; its backward runs when their gradients are there, and stops the clock.

    The engine runs nothing in between, as the nodes that were made last run first.
    """

    @staticmethod
    def forward(ctx, clock, q, k, v):
        ctx.clock = clock
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx, *grads):
        ctx.clock.spans.append((ctx.clock._begun, ctx.clock.look()))
        return None, *grads
