"""Which layouts could run a phase, and where none can, which setting alone is at fault."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from parallel.config import LayoutConfig
from pretrain.config.config import Config
from pretrain.planner.check_layout import check_phase_layout
from pretrain.planner.layout_search import nearest_layouts
from pretrain.schedule.batch_words import BatchWords
from pretrain.schedule.phases import Phase


class FitsMemory(Protocol):
    """Answers whether a phase with a legal layout fits into the memory."""

    def __call__(self, phase: Phase) -> bool: ...


@dataclass(frozen=True)
class Situation:
    """Describes a phase that needs another layout, and everything that a layout must suit."""

    phase: Phase
    config: Config
    world_size: int
    vocab_size: int | None
    """None = not known: the rule about it is not checked."""
    fits: FitsMemory | None = None
    """None = the memory is not checked."""

    def nearest(self) -> list[str]:
        """Return the nearest layouts that work, in words."""
        heads = self.config.model.num_attention_heads
        return nearest_layouts(self.phase.layout, self.world_size, heads, self.works)

    def works(self, layout: LayoutConfig) -> bool:
        """Tell whether the phase can run with this layout."""
        phase = dataclasses.replace(self.phase, layout=layout)
        if check_phase_layout(phase, self.config, self.world_size, self.vocab_size):
            return False
        # Memory settings that are out of range have no estimate.
        if self.fits is None or phase.memory.problems():
            return True
        return self.fits(phase)


def layouts_that_work(situation: Situation) -> str:
    """Name the nearest layouts that work; or say that there are none, because of which setting."""
    # Where something works as it is, nothing is at fault.
    nearest = situation.nearest()
    if nearest:
        return "; ".join(nearest)
    faults = [
        f"{setting} (without it {layouts[0]})"
        for setting, relaxed in _relaxed(situation)
        if (layouts := relaxed.nearest())
    ]
    if faults:
        return f"none, because of {', or because of '.join(faults)}"
    return "none with this batch, length and model, and no setting alone is at fault"


def _relaxed(situation: Situation) -> Iterator[tuple[str, Situation]]:
    """Yield each setting with its value, and the situation as if it left the layout free."""
    yield from _without_memory_settings(situation)
    yield from _without_other_settings(situation)
    yield from _without_lengths_of_evaluations(situation)
    yield from _with_another_model(situation)
    if situation.fits is not None:
        yield "the memory of a device", dataclasses.replace(situation, fits=None)


def _without_memory_settings(situation: Situation) -> Iterator[tuple[str, Situation]]:
    memory = situation.phase.memory
    free: dict[str, Any] = {
        "attention_head_chunks": 1,
        "mlp_tiles": 1,
        "recompute_granularity": None,
    }
    for name, value in free.items():
        present = getattr(memory, name)
        if present != value:
            changed = dataclasses.replace(memory, **{name: value})
            yield f"{name} = {present}", _with_phase(situation, memory=changed)


def _without_other_settings(situation: Situation) -> Iterator[tuple[str, Situation]]:
    phase = situation.phase
    if phase.layout.sequence_parallel:
        layout = dataclasses.replace(phase.layout, sequence_parallel=False)
        yield "sequence_parallel = True", _with_phase(situation, layout=layout)
    if phase.micro_batch_size > 1:
        smaller = _with_phase(situation, micro_batch_size=1)
        yield f"micro_batch_size = {phase.micro_batch_size}", smaller
    entry = situation.config.schedule.entries[phase.index]
    words = BatchWords.make(situation.config, entry, phase.seq_length)
    # A multiple of whatever any layout of this world and any pipeline schedule ask for.
    batch = phase.seq_length * phase.micro_batch_size * situation.world_size**2
    stretches = tuple(stretch._replace(batch=batch) for stretch in phase.stretches)
    whole = _with_phase(situation, stretches=stretches, global_batch_tokens=batch)
    yield words.name(phase.global_batch_tokens), whole


def _without_lengths_of_evaluations(situation: Situation) -> Iterator[tuple[str, Situation]]:
    config = situation.config
    for name in ("eval_seq_lengths", "eval_passkey_lengths"):
        lengths = getattr(config.logging, name)
        if lengths:
            none_of_them: dict[str, Any] = {name: []}
            logging = dataclasses.replace(config.logging, **none_of_them)
            relaxed = dataclasses.replace(config, logging=logging)
            given = " ".join(map(str, lengths))
            yield f"{name} = {given}", dataclasses.replace(situation, config=relaxed)


def _with_another_model(situation: Situation) -> Iterator[tuple[str, Situation]]:
    config = situation.config
    # An unknown vocabulary is not checked, as if every tp divided it.
    multiple = config.model.make_vocab_size_divisible_by
    free = dataclasses.replace(situation, vocab_size=None)
    yield f"make_vocab_size_divisible_by = {multiple}", free
    # Enough layers for any number of stages.
    layers = config.model.num_layers
    deeper = dataclasses.replace(config.model, num_layers=layers * situation.world_size)
    relaxed = dataclasses.replace(config, model=deeper)
    yield f"num_layers = {layers}", dataclasses.replace(situation, config=relaxed)


def _with_phase(situation: Situation, **changes: Any) -> Situation:
    return dataclasses.replace(situation, phase=dataclasses.replace(situation.phase, **changes))
