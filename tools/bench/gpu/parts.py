"""Hold what items on one GPU share: the card, full and toy sizes, models by name."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.attention_backends.backend import Attend, HeadShape
from model.attention_backends.choice import BACKENDS, choose_attention
from model.attention_backends.kernel_calls import NEVER, assumed_crossover
from tools.bench.contenders import BenchModel, Dtype, preset
from tools.bench.fresh import measured, trim

SEED = 1234
GIB = 2**30
ATTENTION_BACKENDS = ("flash", "sdpa", "varlen", "mixed")
"""Kernels that are compared, by their names as attention_backend."""
ASSUMED = "assumed"
"""Where a crossover is from that was not measured."""


@dataclass(frozen=True)
class Scale:
    """Choose sizes: full = those that count; toy = the same code on small ones."""

    toy: bool

    @property
    def dtype(self) -> Dtype:
        """Precision of forward and backward."""
        return "float32" if self.toy else "bfloat16"

    def tokens(self, full: int) -> int:
        """Scale a number of tokens."""
        return max(64, full // 1024) if self.toy else full

    def model(self, name: str, **changes) -> tuple[BenchModel, int]:
        """Make (configuration, vocabulary) of 1b, 3b, 8b (Llama 3's shapes) or qwen3-8b."""
        config, vocabulary = MODELS[name]
        # Few layers of the tiny preset, with the heads that the item needs.
        if self.toy:
            toy_changes = TOY_CHANGES.get(name, {}) | {"num_layers": TOY_LAYERS} | changes
            return preset("tiny", **toy_changes), 512
        return preset(config, **(CHANGES.get(name, {}) | changes)), vocabulary


MODELS = {
    "1b": ("1b", 128256),
    "3b": ("1b", 128256),
    "8b": ("llama3-8b", 128256),
    "qwen3-8b": ("qwen3-8b", 151936),
}
CHANGES = {"3b": dict(num_layers=28, hidden_size=3072, num_attention_heads=24, kv_channels=128)}
"""Llama 3.2 3B's shape: huggingface meta-llama/Llama-3.2-3B config.json."""
TOY_LAYERS = 1
TOY_CHANGES = {
    "qwen3-8b": dict(num_attention_heads=32, num_query_groups=8, kv_channels=32, qk_layernorm=True)
}
"""As many heads as at full size, so that 8 ranks cut them into as many chunks."""


class Card:
    """Measure what a task takes on the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.is_cuda = device.type == "cuda"

    def describe(self) -> str:
        """Name the card."""
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "CPU"

    def wait(self) -> None:
        """Wait until the device has done all its work."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def capacity(self) -> int:
        """Return the bytes of the device's memory; for a CPU half a GiB, to try the code out."""
        if not self.is_cuda:
            return GIB // 2
        return torch.cuda.get_device_properties(self.device).total_memory

    def pin_ahead(self, sizes: list[int]) -> None:
        """Leave pinned blocks of these bytes with torch's allocator: pinning takes long."""
        if self.is_cuda:
            blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
            del blocks

    def clear(self) -> None:
        """Give unused memory back."""
        trim()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def held(self) -> int:
        """Count the bytes in tensors; on a CPU unknown, and 0."""
        return torch.cuda.memory_allocated(self.device) if self.is_cuda else 0

    def seconds(self, task: Callable[[], object]) -> float:
        """Time a task until the device has done it."""
        self.wait()
        start = time.perf_counter()
        task()
        self.wait()
        return time.perf_counter() - start

    def median(self, task: Callable[[], object], repeats: int, warm_ups: int) -> float:
        """Take the median seconds of a task after its warm-ups."""
        times = [self.seconds(task) for _ in range(warm_ups + repeats)]
        return statistics.median(times[warm_ups:])

    def peak(self, task: Callable[[], object]) -> tuple[float, int]:
        """Measure seconds and the most bytes in tensors; on a CPU resident bytes beyond before."""
        # Tensors in cycles would count.
        gc.collect()
        if not self.is_cuda:
            # A CPU has no allocator that counts.
            with measured() as found:
                task()
            return found["seconds"], found["above_bytes"]
        torch.cuda.reset_peak_memory_stats(self.device)
        return self.seconds(task), torch.cuda.max_memory_allocated(self.device)

    def product_tflops(self, scale: Scale, repeats: int = 10) -> float:
        """Measure the TFLOP/s of an 8192^3 bf16 product."""
        size = 256 if scale.toy else 8192
        # Random: zeros draw less power and run faster.
        left = torch.randn(size, size, device=self.device).to(torch.bfloat16)
        right = torch.randn(size, size, device=self.device).to(torch.bfloat16)

        def products():
            for _ in range(repeats):
                torch.mm(left, right)

        return repeats * 2 * size**3 / self.median(products, repeats=5, warm_ups=1) / 1e12


def heads_of_call(config: BenchModel, ranks: int = 1) -> HeadShape:
    """Count query heads and key/value heads of a rank's attention call; with the head size."""
    # A call sees one rank's share of one chunk of heads.
    parts = ranks * config.attention_head_chunks
    query = config.num_attention_heads // parts
    return query, max(1, config.num_kv_heads // parts), config.head_size


def attention_of(
    config: BenchModel,
    card: Card,
    scale: Scale,
    *,
    ranks: int = 1,
    crossover: int | None = None,
    how: str = ASSUMED,
) -> tuple[Attend, str]:
    """Choose as the trainer does; returns the attend function, and a line about it."""
    heads = heads_of_call(config, ranks)
    if crossover is None:
        crossover = assumed_crossover(heads)
    attend, line = choose_attention(
        config.attention_backend,
        card.device,
        getattr(torch, scale.dtype),
        on_tape=config.recompute_granularity == "attention_kept"
        or config.attention_head_chunks > 1,
        heads=heads,
        crossover=crossover,
    )
    # From which length on cuDNN is taken, and how that is known.
    if line.startswith("attention: mixed"):
        line += f"; crossover {describe_crossover(crossover)} ({how})"
    return attend, line


def describe_crossover(tokens: int) -> str:
    """Say which documents `mixed` gives to cuDNN."""
    return "no document" if tokens >= NEVER else f"{tokens:,} tokens"


def missing_backend(name: str, card: Card, scale: Scale) -> str | None:
    """Say why an attention backend cannot be compared here; None = it can, as auto always."""
    if name == "auto":
        return None
    if name not in BACKENDS:
        return "there is no such backend"
    return BACKENDS[name].missing(card.device, getattr(torch, scale.dtype))
