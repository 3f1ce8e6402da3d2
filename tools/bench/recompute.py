"""Recompute of layers: ours against torch's selective activation checkpointing, memory and time.

Four ways of the same layers, forward and backward in one process, in interleaved rounds: ours and
torch.utils.checkpoint with everything computed again, and both with the attention's results kept.
torch's policy keeps the attention operator (create_selective_checkpoint_contexts).
"""

import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from model.activation_memory.settings import MemorySettings, Recompute
from model.attention_backends.choice import choose_attention
from model.attention_backends.documents import pack_documents
from model.config import ModelConfig
from model.gpt import GPTStage
from parallel.layout import has_bf16_units, single_process_layout
from tools.bench.option_checks import find_too_small
from tools.bench.report import markdown_table

CPU = torch.device("cpu")
MIB = 2**20
HEADS = 8
"""Query heads of the layers."""
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
"""The operator under our attention on a CPU, whose results torch's policy keeps."""


@dataclass(kw_only=True)
class Arguments:
    """Sizes of the layers, and for how long to repeat."""

    layers: int = 2
    hidden: int = 256
    tokens: int = 1024
    documents: int = 2
    seconds: float = 40.0
    """Time for the rounds of each dtype; at least three rounds are made, the first untimed."""


class LiveBytes(TorchDispatchMode):
    """The bytes of tensors that operations made and that are alive, and their peak.

    Storages that are freed and filled again count with what they hold.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self.storages: dict[int, weakref.ref] = {}

    @property
    def now(self) -> int:
        """Bytes alive."""
        storages = [reference() for reference in list(self.storages.values())]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        known = {id(x.untyped_storage()) for x in given}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in known:
                    self.storages[id(storage)] = weakref.ref(storage)
        self.peak = max(self.peak, self.now)
        return result


def keep_attention(_context, operator, *_args, **_options) -> CheckpointPolicy:
    """Keep the attention operator's results, and compute all others again."""
    kept = operator == ATTENTION
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class Layers:
    """Some layers on one process, their input, and what every layer is told."""

    def __init__(self, arguments: Arguments, dtype: torch.dtype):
        config = ModelConfig(
            num_layers=arguments.layers,
            hidden_size=arguments.hidden,
            ffn_hidden_size=3 * arguments.hidden,
            num_attention_heads=HEADS,
            num_query_groups=2,
        )
        attend, _ = choose_attention("sdpa", CPU, dtype)
        stage = GPTStage(config, 64, single_process_layout(CPU), attend).to_empty(device=CPU)
        self.stage = stage.to(dtype)
        # Small random weights: the figures do not depend on them.
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in self.stage.parameters():
                parameter.normal_(0.0, 0.02)
        self.x_tD = torch.randn(arguments.tokens, arguments.hidden, dtype=dtype, device=CPU)
        # Documents of equal length.
        length = arguments.tokens // arguments.documents
        bounds = torch.arange(arguments.documents + 1, dtype=torch.int32, device=CPU) * length
        numbers = torch.arange(arguments.tokens, device=CPU) % length
        documents = pack_documents(bounds, [(0, arguments.tokens)], CPU)
        self.positions = self.stage.make_positions(numbers, documents, dtype)

    def ours(self, level: Recompute, x_tD: torch.Tensor) -> torch.Tensor:
        """Run the layers under one of our levels."""
        settings = MemorySettings(recompute_granularity=level)
        for layer in self.stage.layers.values():
            x_tD = layer(x_tD, self.positions, settings, None)
        return x_tD

    def theirs(self, *, keep: bool, x_tD: torch.Tensor) -> torch.Tensor:
        """Run the layers, each under torch.utils.checkpoint."""
        selective = partial(create_selective_checkpoint_contexts, keep_attention)
        contexts = selective if keep else noop_context_fn
        for layer in self.stage.layers.values():
            inputs = (x_tD, self.positions, MemorySettings(), None)
            x_tD = checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)
        return x_tD

    def step(self, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Run forward and backward; return the gradient of the input."""
        x_tD = self.x_tD.clone().requires_grad_()
        self.stage.zero_grad(set_to_none=True)
        out_tD = run(x_tD)
        out_tD.backward(torch.ones_like(out_tD))
        assert x_tD.grad is not None
        return x_tD.grad

    def memory(self, run: Callable[[torch.Tensor], torch.Tensor]) -> tuple[int, int]:
        """Measure the bytes kept after the forward, and the peak of forward and backward."""
        x_tD = self.x_tD.clone().requires_grad_()
        self.stage.zero_grad(set_to_none=True)
        with LiveBytes() as live:
            out_tD = run(x_tD)
            kept = live.now
            out_tD.backward(torch.ones_like(out_tD))
        return kept, live.peak


def compare(arguments: Arguments, dtype: torch.dtype) -> list[list[str]]:
    """Measure the four ways in one dtype; return a row of the table for each."""
    layers = Layers(arguments, dtype)
    ways = {
        "full": partial(layers.ours, "full"),
        "full, torch": lambda x_tD: layers.theirs(keep=False, x_tD=x_tD),
        "attention_kept": partial(layers.ours, "attention_kept"),
        "attention_kept, torch": lambda x_tD: layers.theirs(keep=True, x_tD=x_tD),
    }
    # All ways compute the same gradient.
    gradients = {name: layers.step(way) for name, way in ways.items()}
    expected = gradients["full"]
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for name, gradient in gradients.items():
        difference = (gradient - expected).abs().max() / expected.abs().max()
        if difference > tolerance:
            raise AssertionError(f"{name}: the gradient differs by {float(difference):.1e}")
    memory = {name: layers.memory(way) for name, way in ways.items()}
    # Rounds in turn, so that whatever else the machine does meets all ways alike.
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    end = time.monotonic() + arguments.seconds
    while len(seconds["full"]) < 2 or time.monotonic() < end:
        for name, way in ways.items():
            begin = time.monotonic()
            layers.step(way)
            seconds[name].append(time.monotonic() - begin)
    rows = []
    for name in ways:
        ours = name.removesuffix(", torch")
        ratios = [a / b for a, b in zip(seconds[name], seconds[ours], strict=True)]
        kept, peak = memory[name]
        rows.append(
            [
                str(dtype).removeprefix("torch."),
                name,
                f"{kept / MIB:.2f}",
                f"{peak / MIB:.2f}",
                f"{1000 * statistics.median(seconds[name]):.0f}",
                f"{statistics.median(ratios):.3f}",
            ]
        )
    return rows


def run(arguments: Arguments) -> int:
    """Print the table; returns the exit code: 0, or 2 where it cannot run."""
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    head = ["dtype", "way", "kept MiB", "peak MiB", "step ms (median)", "time / ours (median)"]
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in compare(arguments, dtype)]
    print(markdown_table(head, rows))
    if not has_bf16_units(CPU):
        print("This CPU has no bf16 units: its bf16 times say nothing about a GPU's.")
    return 0


def find_problem(arguments: Arguments) -> str | None:
    """Say why the benchmark cannot run, with a fix; None = it can."""
    too_small = find_too_small(arguments, layers=1, hidden=1, tokens=1, documents=1)
    if too_small:
        return too_small
    # A rope turns pairs of a head's channels.
    multiple = 2 * HEADS
    if arguments.hidden % multiple:
        return (
            f"--hidden {arguments.hidden}: must be a multiple of {multiple}, for {HEADS} heads. "
            "Fix: for example 256."
        )
    if arguments.tokens % arguments.documents:
        return (
            f"--documents {arguments.documents}: must divide --tokens {arguments.tokens}. "
            "Fix: for example 2."
        )
    return None
