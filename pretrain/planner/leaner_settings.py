"""The settings near a phase's own under which it needs less memory."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from data.units import show_bytes
from model.activation_memory.settings import KEEPS_INPUT_ONLY, Recompute
from pretrain.planner.check_layout import check_phase_layout
from pretrain.planner.check_phases import check_phase_memory
from pretrain.planner.head_counts import allowed_head_chunks
from pretrain.planner.layout_search import with_sizes
from pretrain.planner.phase_memory import PhaseMemory
from pretrain.schedule.phases import Phase

LEANER_LEVELS: tuple[Recompute | None, ...] = (None, "selective", "attention_kept", "full")
"""Levels of recompute, each of which keeps less than those before it."""
assert set(LEANER_LEVELS) == {None, *get_args(Recompute)}
TRIED_MLP_TILES = (2, 4, 8, 16, 32)
TRIED_LOSS_CHUNK_TOKENS = (1024, 512, 256)
TRIED_FACTORS = (2, 4, 8, 16, 32)
"""Multiples of cp and of the number of processes."""

Settings = dict[str, Any]


class Alternative(NamedTuple):
    """A phase with other settings, on a world that may be another."""

    what: str
    """The settings in words, separated by `, `."""
    phase: Phase
    world_size: int


def nearest_settings(needs: PhaseMemory, limit: int, count: int = 6) -> list[str]:
    """Return changes in words after which a process needs at most `limit` bytes.

    Those that cost least time come first; each is the smallest of its kind that is enough.
    """
    found: list[str] = []
    offered: list[set[str]] = []
    for group in (*_memory_alternatives(needs), *_other_alternatives(needs)):
        for alternative in group:
            words = set(alternative.what.split(", "))
            if any(less <= words for less in offered):
                continue  # a part of these changes is enough
            if not _is_legal(needs, alternative):
                continue
            total = _total_if_it_fits(needs, alternative, limit)
            if total is not None:
                found.append(f"{alternative.what} ({show_bytes(total)})")
                offered.append(words)
                break  # the nearest of its group
        if len(found) == count:
            break
    return found


def _is_legal(needs: PhaseMemory, alternative: Alternative) -> bool:
    _, phase, world_size = alternative
    return not (
        check_phase_layout(phase, needs.config, world_size, needs.model.vocab_size)
        or check_phase_memory(phase, needs.config.model.attention_backend)
    )


def _total_if_it_fits(needs: PhaseMemory, alternative: Alternative, limit: int) -> int | None:
    """Return the bytes of a process under an alternative; None where device or host lack them."""
    _, phase, world_size = alternative
    total = needs.memory_of(phase, world_size).total
    if total > limit or needs.host_of_node(phase, world_size) > needs.machine.host_bytes:
        return None
    return total


def _memory_alternatives(needs: PhaseMemory) -> Iterator[list[Alternative]]:
    """Yield groups of changes of the same kind, each from small to large.

    A level of recompute is also combined with the others.
    """
    settings = needs.phase.memory
    head_chunks = allowed_head_chunks(needs.config.model, needs.phase.layout)
    loss_chunks: list[Settings] = [
        {"loss_chunk_tokens": n} for n in TRIED_LOSS_CHUNK_TOKENS if n < settings.loss_tokens
    ]
    tiles: list[Settings] = [{"mlp_tiles": n} for n in TRIED_MLP_TILES if n > settings.mlp_tiles]
    chunks: list[Settings] = [
        {"attention_head_chunks": n} for n in head_chunks if n > settings.attention_head_chunks
    ]
    # Smaller parts: they cost the least time.
    for group in (loss_chunks, tiles, chunks):
        yield [_changed(needs, change) for change in group]

    # Each level, alone and with the parts of the sequence and of the heads.
    most: Settings = {}
    for group in (chunks, tiles, loss_chunks):
        if group:
            most |= group[-1]
    present = settings.recompute_granularity
    for level in LEANER_LEVELS[LEANER_LEVELS.index(present) :]:
        if level == present:
            yield [_changed(needs, most)] if len(most) > 1 else []
        else:
            yield [
                _changed(needs, {"recompute_granularity": level} | extra)
                for extra in ({}, *tiles, *chunks, most)
            ]

    # Layers in the host's memory, which a CPU does not have beside its own.
    if not needs.model.on_gpu:
        return
    counts = range(settings.cpu_offloading_num_layers + 1, needs.config.model.num_layers + 1)
    for level in KEEPS_INPUT_ONLY:
        base: Settings = {} if level == present else {"recompute_granularity": level}
        yield [
            _changed(needs, base | extra | {"cpu_offloading_num_layers": n})
            for extra in ({}, most)
            for n in counts
        ]


def _changed(needs: PhaseMemory, change: Settings) -> Alternative:
    what = ", ".join(f"{name} {value}" for name, value in change.items())
    return Alternative(what, needs.phase.with_memory(**change), needs.world_size)


def _other_alternatives(needs: PhaseMemory) -> Iterator[list[Alternative]]:
    """Yield groups of changes of the batch, the layout and the world."""
    # First what this world can do by itself, then more processes.
    phase = needs.phase
    world = needs.world_size
    if phase.micro_batch_size > 1:
        smaller = dataclasses.replace(phase, micro_batch_size=1)
        yield [Alternative("micro_batch_size 1", smaller, world)]
    if phase.layout.sharding_strategy != "optim_grads_params":
        layout = dataclasses.replace(
            phase.layout,
            use_distributed_optimizer=None,
            data_parallel_sharding_strategy="optim_grads_params",
        )
        what = "data_parallel_sharding_strategy optim_grads_params"
        yield [Alternative(what, dataclasses.replace(phase, layout=layout), world)]
    yield [_with_cp(needs, factor, world) for factor in TRIED_FACTORS]
    yield [
        Alternative(f"{world * factor} processes", phase, world * factor)
        for factor in TRIED_FACTORS
    ]
    yield [_with_cp(needs, factor, world * factor) for factor in TRIED_FACTORS]


def _with_cp(needs: PhaseMemory, factor: int, world: int) -> Alternative:
    """Return the phase on `factor` times as many context-parallel ranks."""
    phase = needs.phase
    # Beyond the number of heads, cp goes on in two levels.
    tp, pp, cp = phase.layout.sizes
    heads = needs.config.model.num_attention_heads
    layout = with_sizes(phase.layout, heads, tp, pp, cp * factor)
    what = f"context_parallel_size {cp * factor}"
    if layout.context_levels[1] > 1:
        what += " in two levels of {} x {}".format(*layout.context_levels)
    if world != needs.world_size:
        what += f", {world} processes"
    return Alternative(what, dataclasses.replace(phase, layout=layout), world)
