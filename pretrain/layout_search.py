"""Which layouts a world of processes could have, one enumeration for everything that looks for one."""

import dataclasses
import math
from collections.abc import Callable, Iterator

from parallel.config import LayoutConfig


def sizes_of_world(world_size: int) -> Iterator[tuple[int, int, int]]:
    """All (tp, pp, cp) whose product divides the world."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for tp in divisors:
        for pp in (n for n in divisors if world_size % (tp * n) == 0):
            for cp in (n for n in divisors if world_size % (tp * pp * n) == 0):
                yield tp, pp, cp


def with_sizes(layout: LayoutConfig, num_heads: int, tp: int, pp: int, cp: int) -> LayoutConfig:
    """The same layout with other sizes, with two levels of cp where it is beyond the heads."""
    heads = max((n for n in range(1, max(1, num_heads // tp) + 1) if cp % n == 0), default=1)
    levels = [heads, cp // heads] if heads < cp else []
    return dataclasses.replace(
        layout, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp,
        cp_comm_type="a2a+allgather" if levels else "a2a", hierarchical_context_parallel_sizes=levels)


def nearest_layouts(asked: LayoutConfig, world_size: int, num_heads: int, is_legal: Callable[[LayoutConfig], bool],
                    count: int = 3) -> list[str]:
    """Legal layouts of the same world, the fewest doublings from the asked one first, in words."""
    found = []
    wanted = (*asked.sizes, max(1, world_size // math.prod(asked.sizes)))
    for tp, pp, cp in sizes_of_world(world_size):
        dp = world_size // (tp * pp * cp)
        distance = sum(abs(math.log2(a / b)) for a, b in zip((tp, pp, cp, dp), wanted, strict=True))
        layout = with_sizes(asked, num_heads, tp, pp, cp)
        simple = dataclasses.replace(layout, pipeline_schedule=None, num_virtual_stages_per_pipeline_rank=None)
        for choice, more in ((layout, 0.0), (simple, 0.5)):
            if is_legal(choice):
                found.append((distance + more, f"{choice.describe()} dp {dp}"))
                break
    return [text for _, text in sorted(found)[:count]]
