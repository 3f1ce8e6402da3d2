"""What the items on one GPU share: the card with its clock and memory, sizes full and toy, models
by name."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.attention_backends.backend import Attend, HeadShape
from model.attention_backends.choice import BACKENDS, choose_attention
from model.attention_backends.kernel_calls import ASSUMED_CROSSOVER_TOKENS, NEVER
from tools.bench.contenders import BenchModel, Dtype, preset
from tools.bench.fresh import measured, trim

SEED = 1234
GIB = 2**30
ATTENTION_BACKENDS = ("sdpa", "varlen", "mixed")
"""Kernels that are compared, by their names as attention_backend."""
ASSUMED = "assumed"
"""Where a crossover is from that was not measured."""


@dataclass(frozen=True)
class Scale:
    """full = the sizes that count; toy = the same code on small ones."""

    toy: bool

    @property
    def dtype(self) -> Dtype:
        """Precision of forward and backward."""
        return "float32" if self.toy else "bfloat16"

    def tokens(self, full: int) -> int:
        return max(64, full // 1024) if self.toy else full

    def model(self, name: str, **changes) -> tuple[BenchModel, int]:
        """(configuration, vocabulary) of a model: 1b, 3b, 8b (Llama 3's shapes) or qwen3-8b."""
        config, vocabulary = MODELS[name]
        if self.toy:
            return preset(
                "tiny", **(TOY_CHANGES.get(name, {}) | {"num_layers": TOY_LAYERS} | changes)
            ), 512
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
    """The device: what a task takes on it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.is_cuda = device.type == "cuda"

    def describe(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "CPU"

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def capacity(self) -> int:
        """Bytes of the device's memory; on a CPU half a GiB, for trying the code out."""
        return (
            torch.cuda.get_device_properties(self.device).total_memory if self.is_cuda else GIB // 2
        )

    def pin_ahead(self, sizes: list[int]) -> None:
        """Leave pinned blocks of these bytes with torch's allocator: pinning takes long, and a run
        does it once."""
        if self.is_cuda:
            blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
            del blocks

    def clear(self) -> None:
        """Give back what nobody holds any more."""
        trim()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def held(self) -> int:
        """Bytes in tensors; on a CPU unknown, and 0."""
        return torch.cuda.memory_allocated(self.device) if self.is_cuda else 0

    def seconds(self, task: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        task()
        self.wait()
        return time.perf_counter() - start

    def median(self, task: Callable[[], object], repeats: int, warm_ups: int) -> float:
        times = [self.seconds(task) for _ in range(warm_ups + repeats)]
        return statistics.median(times[warm_ups:])

    def peak(self, task: Callable[[], object]) -> tuple[float, int]:
        """(seconds, most bytes in tensors meanwhile); on a CPU resident bytes beyond those
        before."""
        gc.collect()
        if not self.is_cuda:
            with measured() as found:
                task()
            return found["seconds"], found["above_bytes"]
        torch.cuda.reset_peak_memory_stats(self.device)
        return self.seconds(task), torch.cuda.max_memory_allocated(self.device)

    def product_tflops(self, scale: Scale, repeats: int = 10) -> float:
        """TFLOP/s of an 8192^3 bf16 product of random matrices: zeros draw less power and run
        faster."""
        size = 256 if scale.toy else 8192
        left = torch.randn(size, size, device=self.device).to(torch.bfloat16)
        right = torch.randn(size, size, device=self.device).to(torch.bfloat16)

        def products():
            for _ in range(repeats):
                torch.mm(left, right)

        return repeats * 2 * size**3 / self.median(products, repeats=5, warm_ups=1) / 1e12


def heads_of_call(config: BenchModel, ranks: int = 1) -> HeadShape:
    """Query heads, key/value heads and head size of one attention call of a context-parallel
    rank."""
    parts = ranks * config.attention_head_chunks
    query = config.num_attention_heads // parts
    return query, max(1, config.num_kv_heads // parts), config.head_size


def attention_of(
    config: BenchModel,
    card: Card,
    scale: Scale,
    *,
    ranks: int = 1,
    crossover: int = ASSUMED_CROSSOVER_TOKENS,
    how: str = ASSUMED,
) -> tuple[Attend, str]:
    """Choose as the trainer does -> the attend function, and a line with the backend and its
    crossover."""
    attend, line = choose_attention(
        config.attention_backend,
        card.device,
        getattr(torch, scale.dtype),
        on_tape=config.recompute_granularity == "attention_kept"
        or config.attention_head_chunks > 1,
        heads=heads_of_call(config, ranks),
        crossover=crossover,
    )
    if line.startswith("attention: mixed"):
        line += f"; crossover {describe_crossover(crossover)} ({how})"
    return attend, line


def describe_crossover(tokens: int) -> str:
    """Which documents `mixed` gives to cuDNN."""
    return "no document" if tokens >= NEVER else f"{tokens:,} tokens"


def missing_backend(name: str, card: Card, scale: Scale) -> str | None:
    """Why an attention backend cannot be compared here, or None; auto can always be."""
    if name == "auto":
        return None
    if name not in BACKENDS:
        return "there is no such backend"
    return BACKENDS[name].missing(card.device, getattr(torch, scale.dtype))
