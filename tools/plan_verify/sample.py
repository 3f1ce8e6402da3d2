"""Which ranks stand for all others, and how much of a step they rehearse."""

import dataclasses
from dataclasses import dataclass
from math import prod

from parallel.config import LayoutConfig
from parallel.schedule import accepts
from pretrain.config.config import Config
from pretrain.schedule.phases import Phase

LAYER_PASSES = 20
"""Layers x microbatches that a rank rehearses of its stages; at least two layers of each stage."""
FEWEST_LAYERS = 2


@dataclass(frozen=True)
class Sizes:
    """Gives the sizes of a layout's axes, and where a rank stands on them."""

    tp: int
    cp: int
    dp: int
    pp: int

    @staticmethod
    def of_layout(layout: LayoutConfig, world_size: int) -> "Sizes":
        """Return the sizes; what tensor, pipeline and context parallelism leave is dp."""
        tp, pp, cp = layout.sizes
        return Sizes(tp, cp, world_size // (tp * pp * cp), pp)

    def rank(self, tp: int, cp: int, dp: int, pp: int) -> int:
        """Return the rank at these places: tp is the fastest, pp the slowest."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def places(self, rank: int) -> tuple[int, int, int, int]:
        """Return a rank's places on tp, cp, dp and pp."""
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return tp, cp, dp, pp


def sampled_ranks(layout: LayoutConfig, world_size: int) -> list[int]:
    """Choose ranks of every kind, in order.

    Of the pipeline the first two stages and the last two, which also talk to each other; of the
    other axes both ends; and a rank in the middle of all axes.
    """
    sizes = Sizes.of_layout(layout, world_size)
    stages = {0, min(1, sizes.pp - 1), max(0, sizes.pp - 2), sizes.pp - 1}
    ranks = {sizes.rank(0, 0, 0, stage) for stage in stages}
    ranks.add(sizes.rank(sizes.tp - 1, 0, 0, 0))
    ranks.add(sizes.rank(0, sizes.cp - 1, 0, 0))
    ranks.add(sizes.rank(0, 0, sizes.dp - 1, 0))
    ranks.add(sizes.rank(sizes.tp // 2, sizes.cp // 2, sizes.dp // 2, sizes.pp // 2))
    return sorted(ranks)


@dataclass(frozen=True)
class Rehearsed:
    """Says what of a phase's step is rehearsed."""

    config: Config
    """With as many layers as are run."""
    num_microbatches: int
    note: str
    """What is left out, in words; empty = nothing."""


def rehearsed_part(config: Config, phase: Phase, world_size: int) -> Rehearsed:
    """Choose how many microbatches and layers show all that a step does.

    Layers of a stage are all alike, and so are the microbatches after the pipeline has filled.
    """
    layout = phase.layout
    pp = layout.pipeline_model_parallel_size
    count = phase.num_microbatches(world_size)
    enough = pp + 2 if pp > 1 else 2
    legal = [n for n in range(enough, count) if pp == 1 or accepts(layout.schedule, pp, n)]
    some = min(legal, default=count)
    stages = prod((pp, layout.stages_per_rank))
    layers = config.model.num_layers
    of_stage = -(-layers // stages)
    fewer = max(FEWEST_LAYERS, LAYER_PASSES // (some * layout.stages_per_rank))
    notes = []
    if fewer < of_stage:
        notes.append(f"{fewer} of {of_stage} layers of each stage")
        model = dataclasses.replace(config.model, num_layers=fewer * stages)
        config = dataclasses.replace(config, model=model)
    if some < count:
        notes.append(f"{some} of {count} microbatches")
    return Rehearsed(config, some, ", ".join(notes))
