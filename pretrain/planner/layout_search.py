"""Which layouts a world of processes could have.

One enumeration, for everything that looks for a layout.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from parallel.config import LayoutConfig

Sizes = tuple[int, int, int]
"""(tp, pp, cp)."""


class IsLegal(Protocol):
    """Answers whether a layout can be used."""

    def __call__(self, layout: LayoutConfig) -> bool: ...


class NearLayout(NamedTuple):
    """A layout of the world, and how far it is from the asked one."""

    distance: float
    """Doublings of a size, and half a doubling for another pipeline schedule."""
    sizes: Sizes
    text: str
    layout: LayoutConfig


def sizes_of_world(world_size: int) -> Iterator[Sizes]:
    """Yield all (tp, pp, cp) whose product divides the world."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for tp in divisors:
        for pp in (n for n in divisors if world_size % (tp * n) == 0):
            for cp in (n for n in divisors if world_size % (tp * pp * n) == 0):
                yield tp, pp, cp


def with_sizes(
    layout: LayoutConfig, num_heads: int, tp: int, pp: int, cp: int, *, node_size: int | None = None
) -> LayoutConfig:
    """Return the same layout with other sizes, in two levels where cp is beyond the heads.

    Args:
        node_size: processes of a node, which no all-to-all leaves; None = it may.
    """
    # As many ranks as possible exchange heads; the others gather keys and values.
    most = max(1, num_heads // tp)
    exchanging = max(
        n
        for n in range(1, most + 1)
        if cp % n == 0 and (n == 1 or is_inside_node(tp * n, node_size))
    )
    levels = [exchanging, cp // exchanging] if exchanging < cp else []
    return dataclasses.replace(
        layout,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        cp_comm_type="a2a+allgather" if levels else "a2a",
        hierarchical_context_parallel_sizes=levels,
    )


def is_inside_node(ranks: int, node_size: int | None) -> bool:
    """Tell whether all groups of this many neighbouring ranks are inside nodes of `node_size`."""
    return node_size is None or node_size % ranks == 0


def nearest_layouts(
    asked: LayoutConfig, world_size: int, num_heads: int, is_legal: IsLegal, count: int = 3
) -> list[str]:
    """Return up to `count` legal layouts of the same world in words, the nearest first.

    Args:
        is_legal: is called from the nearest layout on, until enough are found.
    """
    found: dict[Sizes, str] = {}
    for near in _by_distance(asked, world_size, num_heads):
        if near.sizes not in found and is_legal(near.layout):
            found[near.sizes] = near.text
        if len(found) == count:
            break
    return list(found.values())


def _by_distance(asked: LayoutConfig, world_size: int, num_heads: int) -> list[NearLayout]:
    """Return every layout of the world, the nearest first."""
    data_parallel = max(1, world_size // math.prod(asked.sizes))
    wanted = (*asked.sizes, data_parallel)
    found = []
    for sizes in sizes_of_world(world_size):
        dp = world_size // math.prod(sizes)
        # Doubling a size is as far as halving it.
        pairs = zip((*sizes, dp), wanted, strict=True)
        distance = sum(abs(math.log2(ours / theirs)) for ours, theirs in pairs)
        layout = with_sizes(asked, num_heads, *sizes)
        found.append(NearLayout(distance, sizes, f"{layout.describe()} dp {dp}", layout))
        # The default schedule asks less of the number of layers and microbatches.
        simple = dataclasses.replace(
            layout, pipeline_schedule=None, num_virtual_stages_per_pipeline_rank=None
        )
        if simple != layout:
            text = f"{simple.describe()} dp {dp}"
            found.append(NearLayout(distance + 0.5, sizes, text, simple))
    return sorted(found, key=lambda near: (near.distance, near.text))
