"""Which layouts a world of processes could have, one enumeration for everything that looks for
one."""

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
        layout,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        cp_comm_type="a2a+allgather" if levels else "a2a",
        hierarchical_context_parallel_sizes=levels,
    )


def nearest_layouts(
    asked: LayoutConfig,
    world_size: int,
    num_heads: int,
    is_legal: Callable[[LayoutConfig], bool],
    count: int = 3,
) -> list[str]:
    """Up to `count` legal layouts of the same world, the nearest to the asked one first, in words.

    Args:
        is_legal: is called from the nearest layout on, until enough are found.
    """
    found: dict[tuple, str] = {}
    for _, sizes, text, layout in _by_distance(asked, world_size, num_heads):
        if sizes not in found and is_legal(layout):
            found[sizes] = text
        if len(found) == count:
            break
    return list(found.values())


def _by_distance(
    asked: LayoutConfig, world_size: int, num_heads: int
) -> list[tuple[float, tuple, str, LayoutConfig]]:
    """(distance, sizes, words, layout) of every layout of the world, the nearest first.

    The distance counts doublings of a size, and half a doubling for another pipeline schedule.
    """
    data_parallel = max(1, world_size // math.prod(asked.sizes))
    wanted = (*asked.sizes, data_parallel)
    found = []
    for sizes in sizes_of_world(world_size):
        dp = world_size // math.prod(sizes)
        pairs = zip((*sizes, dp), wanted, strict=True)
        distance = sum(abs(math.log2(ours / theirs)) for ours, theirs in pairs)
        layout = with_sizes(asked, num_heads, *sizes)
        simple = dataclasses.replace(
            layout, pipeline_schedule=None, num_virtual_stages_per_pipeline_rank=None
        )
        found.append((distance, sizes, f"{layout.describe()} dp {dp}", layout))
        if simple != layout:
            found.append((distance + 0.5, sizes, f"{simple.describe()} dp {dp}", simple))
    return sorted(found, key=lambda candidate: (candidate[0], candidate[2]))
