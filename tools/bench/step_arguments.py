"""Hold the options of the step benchmark."""

from dataclasses import dataclass
from typing import Literal

from tools.bench.contenders import Dtype

FreedMemory = Literal["glibc", "kept"]


@dataclass(kw_only=True)
class Arguments:
    """Hold the options of the command line."""

    lengths: tuple[int, ...] = (2048, 8192, 32768)
    """Tokens of the samples of one document."""
    packed: int = 8192
    """Tokens of the sample that is cut into --documents equal ones; 0 leaves it out."""
    documents: int = 16
    """Documents in that sample."""
    dtype: Dtype | None = None
    """Precision of forward and backward; by default bfloat16 where the device multiplies it in
    hardware."""
    autocast: bool = False
    """Run transformers in bfloat16 by torch.autocast over fp32 weights; by default its weights are
    bf16 copies."""
    freed_memory: FreedMemory = "glibc"
    """What happens to memory that a timed process frees: it goes by glibc's own rule (glibc), as in
    every program that sets nothing; or all of it is kept (kept), as torch's allocator does on a
    GPU."""
    repeats: int = 5
    """Timed steps of each contender; the median counts."""
    num_layers: int | None = None
    """Other than the tiny preset's 8, to try it out."""
    seed: int = 1234
    """Seed of weights and tokens."""
    output: str | None = None
    """File to append the result to, as Markdown."""


def show_tokens(tokens: int) -> str:
    """Spell a length: 8192 -> "8K"."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
