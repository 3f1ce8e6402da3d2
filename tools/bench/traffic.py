"""Count the bytes that one training step moves, by operator, and its host syncs.

One step warms up; the next runs under a mode that sees every operator. Counted are the bytes of the
plain tensors of the device that an operator reads and writes; views and allocations move nothing.
Matrix products and attention kernels, which keep what they read in fast memory, stand apart from
the rest, "pointwise", whose bytes are its time.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from model import compiled
from tools.bench.contenders import Ours, make_sample, one_process
from tools.bench.fresh import ROOT
from tools.bench.gpu.parts import MODELS, SEED, Card, Scale, missing_backend
from tools.bench.option_checks import find_too_small
from tools.bench.products import PRODUCTS

Group = Literal["products", "attention", "optimizer", "pointwise"]
OPTIMIZER_PREFIXES = ("_fused_adam", "_foreach_")
ATTENTION_PARTS = ("attn", "attention")
ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
    "record_stream",
    "is_pinned",
}
"""Operators that touch no element."""
NOT_READ = {
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "new_zeros",
    "new_ones",
    "new_full",
}
"""Operators that need only the shape of a tensor."""
OVERWRITTEN = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "exponential_"}
"""Operators that write their first argument without reading it."""
ONLY_READ = {"_fused_adamw_": {"grads"}, "_fused_adam_": {"grads"}}
"""Arguments that a schema calls changed, and that are not: gradients without a loss scale."""
ROWS_READ = {"embedding", "index", "index_select", "gather"}
"""Operators that read only the rows of their first tensor that they write."""
ROWS_WRITTEN = {
    "index_put_",
    "_index_put_impl_",
    "index_add_",
    "index_copy_",
    "scatter_",
    "scatter_add_",
}
"""Operators that read and write as much of their first tensor as the last one holds."""
SYNC_WARNING = "called a synchronizing"
"""Part of torch's warning in its sync debug mode."""
SHOWN = 40
"""Operators in the list."""


@dataclass(kw_only=True)
class Arguments:
    """Hold the options of the command line."""

    model: Literal["1b", "3b", "8b", "qwen3-8b"] = "1b"
    """Shapes of the model."""
    num_layers: int | None = None
    """Layers, if not the model's own."""
    samples: int = 4
    """Samples of a step, each one document."""
    seq_length: int = 8192
    """Tokens of a sample."""
    attention_backend: str = "auto"
    """Kernel of the attention."""
    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at once, if not the trainer's own choice."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: only with --scale toy, and without host syncs."""
    scale: Literal["full", "toy"] = "full"
    """toy: a small model and short samples."""


def run(arguments: Arguments) -> int:
    """Count one step and print the operators, the groups and the host syncs; 0, or 2."""
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    card = Card(torch.device(arguments.device))
    scale = Scale(arguments.scale == "toy")
    traffic, syncs = count_step(arguments, card, scale)
    print("\n".join([*describe_traffic(traffic), *describe_syncs(syncs, card)]))
    return 0


def find_problem(arguments: Arguments) -> str | None:
    """Say why the step cannot be counted, with a fix; None = it can."""
    if arguments.device == "cpu" and arguments.scale == "full":
        return "--device cpu --scale full: would take hours. Fix: --scale toy."
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: there is no GPU. Fix: --device cpu --scale toy, to try the code out."
    too_small = find_too_small(
        arguments, samples=1, seq_length=2, num_layers=1, loss_chunk_tokens=1
    )
    if too_small:
        return too_small
    card = Card(torch.device(arguments.device))
    missing = missing_backend(arguments.attention_backend, card, Scale(arguments.scale == "toy"))
    if missing:
        return f"--attention-backend {arguments.attention_backend}: {missing}. Fix: auto."
    return None


def count_step(arguments: Arguments, card: Card, scale: Scale) -> tuple["Traffic", Counter]:
    """Count the bytes of one warm step, and the host syncs of another."""
    assert arguments.model in MODELS
    changes: dict[str, Any] = {"attention_backend": arguments.attention_backend}
    if arguments.num_layers is not None:
        changes["num_layers"] = arguments.num_layers
    if arguments.loss_chunk_tokens is not None:
        changes["loss_chunk_tokens"] = arguments.loss_chunk_tokens
    # Only what was given replaces the model's own settings.
    config, vocabulary = scale.model(arguments.model)
    config = replace(config, **changes)
    lengths = [scale.tokens(arguments.seq_length)] * arguments.samples
    sample = make_sample(lengths, vocabulary, SEED, card.device)
    # Backward in this thread: a mode, and a warning's place, are a thread's own.
    with one_process() as layout, torch.autograd.set_multithreading_enabled(False):
        contender = Ours(config, vocabulary, scale.dtype, layout, SEED)
        contender.step(sample)
        # The first step warmed up: it compiled, and made the moments.
        with counted_syncs(card) as syncs:
            contender.step(sample)
        with Traffic(card.device.type) as traffic, compiled_calls_seen(traffic):
            contender.step(sample)
    return traffic, syncs


class Traffic(TorchDispatchMode):
    """Count calls and bytes by operator while the mode is active."""

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        # Views and allocations move nothing, and are no calls.
        moved = self.bytes_of(func, name, args, kwargs, out)
        if moved:
            self.bytes[name] += moved
            self.calls[name] += 1
        return out

    def counted(self, function: Callable, args: Sequence[Any], out: Any) -> None:
        """Count a compiled function's call, which no mode sees: its inputs once, its outputs once.

        A trailing underscore in its name says that the first argument is written as well.
        """
        name = f"compiled {function.__name__}"
        written = self.size(args[0]) if name.endswith("_") else 0
        self.bytes[name] += self.size(args) + self.size(out) + written
        self.calls[name] += 1

    def bytes_of(
        self, func: torch._ops.OpOverload, name: str, args: tuple, kwargs: dict, out: Any
    ) -> int:
        """Count the bytes that one call reads and writes."""
        if name in ALLOCATIONS:
            return 0
        given = self.arguments(func, args, kwargs)
        inputs = [tensor for _, value in given for tensor in self.tensors(value)]
        # Memory is told apart by its storage, whatever views are of it.
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        # An output in an input's memory is a view, or an argument that was changed in place.
        written = sum(
            size_of(tensor)
            for tensor in self.tensors(out)
            if tensor.untyped_storage()._cdata not in known
        )
        changed = [(argument, value) for argument, value in given if is_written(argument, name)]
        if not written and not changed and self.tensors(out):
            # A view.
            return 0
        if name in NOT_READ:
            return written
        if name in ROWS_READ:
            return 2 * written + self.size([value for _, value in given[1:]])
        if name in ROWS_WRITTEN:
            return 3 * size_of(inputs[-1]) + self.size([value for _, value in given[1:-1]])
        # Everything else that it was given; an overwritten argument is not read.
        read = sum(
            self.size(value)
            for place, (argument, value) in enumerate(given)
            if not argument.is_out and not (name in OVERWRITTEN and place == 0)
        )
        return read + written + sum(self.size(value) for _, value in changed)

    def arguments(
        self, func: torch._ops.OpOverload, args: tuple, kwargs: dict
    ) -> list[tuple[torch.Argument, Any]]:
        """Pair the given arguments with what the schema says of them."""
        known = func._schema.arguments
        named = {argument.name: argument for argument in known}
        return [
            *zip(known, args, strict=False),
            *((named[name], value) for name, value in kwargs.items()),
        ]

    def tensors(self, value: Any) -> list[torch.Tensor]:
        """Find the device's tensors within a value; of a DTensor its local part."""
        found = [
            leaf._local_tensor if isinstance(leaf, DTensor) else leaf
            for leaf in tree_leaves(value)
            if isinstance(leaf, torch.Tensor)
        ]
        return [tensor for tensor in found if tensor.device.type == self.device_type]

    def size(self, value: Any) -> int:
        """Add up the bytes of the device's tensors within a value."""
        return sum(map(size_of, self.tensors(value)))

    def groups(self) -> dict[Group, int]:
        """Add up the bytes by group."""
        found: dict[Group, int] = dict.fromkeys(
            ("products", "attention", "optimizer", "pointwise"), 0
        )
        for name, size in self.bytes.items():
            found[group_of(name)] += size
        return found


@contextmanager
def compiled_calls_seen(traffic: Traffic) -> Iterator[None]:
    """Count the calls of functions that torch.compile makes kernels of (model/compiled.py)."""
    compile_function = compiled._compile

    def compile_and_count(function: Callable) -> Callable:
        def call(*args):
            # Under a mode torch.compile gives up.
            with _disable_current_modes():
                out = compile_function(function)(*args)
            traffic.counted(function, args, out)
            return out

        return call

    patched: Any = compiled  # the cached function is replaced for a while
    patched._compile = compile_and_count
    try:
        yield
    finally:
        patched._compile = compile_function


def is_written(argument: torch.Argument, name: str) -> bool:
    """Tell whether the operator writes this argument."""
    if argument.name in ONLY_READ.get(name, ()):
        return False
    return argument.alias_info is not None and argument.alias_info.is_write


def size_of(tensor: torch.Tensor) -> int:
    """Count the bytes of a tensor's elements; what it repeats along a dim counts once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * prod(
        1 if stride == 0 and size else size for size, stride in sizes
    )


def group_of(name: str) -> Group:
    """Choose the group of an operator."""
    if name in PRODUCTS or name == "_scaled_mm":
        return "products"
    if any(part in name for part in ATTENTION_PARTS):
        return "attention"
    return "optimizer" if name.startswith(OPTIMIZER_PREFIXES) else "pointwise"


@contextmanager
def counted_syncs(card: Card) -> Iterator[Counter]:
    """Count, by source line, how often the host waits for a GPU; on a CPU nothing is counted.

    torch warns at each; what waits by torch.cuda.synchronize or an event is not among them.
    """
    found: Counter = Counter()
    if not card.is_cuda:
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode(before)
    # Where in the code each wait was.
    for warning in caught:
        if SYNC_WARNING in str(warning.message):
            found[f"{shorten(warning.filename)}:{warning.lineno}"] += 1


def shorten(path: str) -> str:
    """Shorten a path to that within the repository, or within its package."""
    file = Path(path)
    if file.is_relative_to(ROOT):
        return str(file.relative_to(ROOT))
    if "site-packages" not in file.parts:
        return path
    return str(Path(*file.parts[file.parts.index("site-packages") + 1 :]))


def describe_traffic(traffic: Traffic) -> list[str]:
    """Describe the operators that move most, then the groups, a line each."""
    lines = [
        f"{name:44s} x{traffic.calls[name]:6d} {size / 1e9:10.3f} GB  {group_of(name)}"
        for name, size in traffic.bytes.most_common(SHOWN)
    ]
    return [
        *lines,
        "",
        *(f"{group} GB: {size / 1e9:.3f}" for group, size in traffic.groups().items()),
    ]


def describe_syncs(syncs: Counter, card: Card) -> list[str]:
    """Describe how often the host waited, and where, a line each."""
    if not card.is_cuda:
        return ["host syncs: not counted on a CPU"]
    return [
        f"host syncs: {syncs.total()}",
        *(f"  {count} at {place}" for place, count in syncs.most_common()),
    ]
