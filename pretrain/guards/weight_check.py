"""Weights and moments that changed while nothing wrote them.

Between two updates nothing writes them: what an update left must be there when the next one begins.
That holds for what exists once, sharded over dp x cp. What several ranks hold (parameters that are
replicated over tp, the copies of a tied embedding) must be the same on all of them, too.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Replicate

from parallel.collectives import gather_rows
from parallel.layout import Axis, Layout
from parallel.shard import own_shard
from parallel.tensor import tp_placement
from pretrain.checkpointing.state_copy import own_part
from pretrain.guards.fingerprint import fingerprint
from pretrain.guards.verdict import WrongNumbers, any_rank, gather, place_of
from pretrain.optimizer import state_of
from pretrain.state import TrainState

SHOWN_TENSORS = 5
LEAST_VOTES = 3
"""Copies from which on a majority tells which one is wrong."""


@dataclass(frozen=True)
class Held:
    """A tensor that this rank holds between updates."""

    name: str
    """As in a checkpoint."""
    shard: torch.Tensor
    axes: tuple[Axis, ...]
    """The axes over which all ranks hold the same."""


class WeightCheck:
    """Remembers what an update left, and compares it before the next one; collective."""

    def __init__(self, state: TrainState, layout: Layout):
        self.state = state
        self.layout = layout
        self._left: torch.Tensor | None = None
        """Fingerprints after the last update, on the device; None = not taken."""

    def after_update(self) -> None:
        """Take the fingerprints of everything; nothing waits for them."""
        self._left = self._fingerprints(list(self._held()))

    def left_by_update(self) -> dict[str, int] | None:
        """Return name -> fingerprint of what the last update left; the host waits.

        None where the next update compares nothing.
        """
        if self._left is None:
            return None
        found: dict[str, int] = {}
        for tensor, value in zip(self._held(), self._left.tolist(), strict=True):
            found.setdefault(tensor.name, value)  # of a tied embedding the first copy is saved
        return found

    def before_update(self) -> None:
        """Compare everything with what the last update left, and with its copies.

        Raises:
            WrongNumbers: on all ranks, naming ranks and tensors.
        """
        if self._left is None:
            return
        held = list(self._held())
        now = self._fingerprints(held)
        changed = (now != self._left).tolist()
        self._left = None
        here = place_of(self.layout.world.rank)
        flipped = [tensor.name for tensor, is_new in zip(held, changed, strict=True) if is_new]
        suspects = self._compare_copies(held, now)
        if not any_rank(self.layout, found=bool(flipped or suspects)):
            return
        everyone = gather((here, flipped, suspects), self.layout.world)
        raise WrongNumbers(describe_flips(everyone))

    def _held(self) -> Iterator[Held]:
        """Yield all weights and all that the optimizer keeps, in an order that ranks share."""
        for stage in self.state.stages:
            for name, parameter in stage.named_parameters():
                assert isinstance(parameter, DTensor)
                # Every tp rank holds the whole parameter, or each a part of it.
                axes = []
                if isinstance(tp_placement(parameter), Replicate):
                    axes.append(self.layout.tp)
                # Without tied embeddings the last stage has none.
                if name == "embedding.weight" and stage.tied:
                    axes.append(self.layout.embedding)
                shared = tuple(axis for axis in axes if axis.size > 1)
                yield Held(f"model.{name}", own_shard(parameter), shared)
                for key, value in state_of(self.state.optimizer, parameter).items():
                    shard = own_shard(value) if isinstance(value, DTensor) else value
                    yield Held(f"optimizer.{name}.{key}", shard, shared)

    def _fingerprints(self, held: list[Held]) -> torch.Tensor:
        """Compute the fingerprint of each tensor: int64 [tensors] on the device."""
        found = [fingerprint(tensor.shard) for tensor in held]
        # They may be computed in the host's memory (--optimizer-cpu-offload).
        return torch.stack(found).to(self.layout.device)

    def _compare_copies(self, held: list[Held], now: torch.Tensor) -> list[str]:
        """Name the tensors of which this rank's copy is, or may be, the wrong one."""
        found = self._differing_twins(held, now)
        for axis in (self.layout.tp, self.layout.embedding):
            numbers = [i for i, tensor in enumerate(held) if axis in tensor.axes]
            # An axis has the same copies on all of its ranks.
            if axis.size == 1 or not numbers:
                continue
            own = now[torch.tensor(numbers, device=now.device)]
            rows = gather_rows(own.view(1, -1), axis).tolist()
            for place, number in enumerate(numbers):
                copies = [row[place] for row in rows]
                if is_suspect(copies, axis.rank):
                    found.append(held[number].name)
        return found

    def _differing_twins(self, held: list[Held], now: torch.Tensor) -> list[str]:
        """Name what differs between the two copies of a tied embedding on this rank."""
        values = now.tolist()
        first: dict[str, int] = {}
        return [
            tensor.name
            for tensor, value in zip(held, values, strict=True)
            if first.setdefault(tensor.name, value) != value
        ]


def check_saved(tensors: Mapping[str, torch.Tensor], left: Mapping[str, int], world: Axis) -> None:
    """Compare what is about to be saved with what the last update left; collective over `world`.

    A run that a flip ends goes on from its last checkpoint: that one must not have the flip.

    Raises:
        WrongNumbers: on all ranks, naming ranks and tensors.
    """
    flipped = [
        name for name, tensor in tensors.items() if int(fingerprint(own_part(tensor))) != left[name]
    ]
    everyone: list[tuple[str, list[str], list[str]]]
    everyone = gather((place_of(world.rank), flipped, []), world)
    if any(names for _, names, _ in everyone):
        raise WrongNumbers(f"{describe_flips(everyone)} Nothing is saved.")


def is_suspect(copies: list[int], own: int) -> bool:
    """Decide by majority whether copy number `own` is, or may be, wrong."""
    if len(set(copies)) == 1:
        return False
    value, votes = Counter(copies).most_common(1)[0]
    # Without a majority nobody knows which of them is right.
    has_majority = len(copies) >= LEAST_VOTES and 2 * votes > len(copies)
    return copies[own] != value if has_majority else True


def describe_flips(everyone: list[tuple[str, list[str], list[str]]]) -> str:
    """Say on which ranks which tensors are wrong.

    Args:
        everyone: of each rank its place, what changed on it, and what differs from its copies.
    """
    # Whose tensor changed is known; that its copies differ from it follows.
    known = {name for _, flipped, _ in everyone for name in flipped}
    lines = []
    for place, flipped, suspects in everyone:
        differing = [name for name in dict.fromkeys(suspects) if name not in known]
        if flipped:
            lines.append(f"{place}: {_short(flipped)} changed since the last update wrote it")
        if differing:
            lines.append(f"{place}: {_short(differing)} is not the same as its copies")
    text = "; ".join(lines)
    return f"weights are wrong: {text}. The memory of that machine may be at fault."


def _short(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_TENSORS} more" if len(names) > SHOWN_TENSORS else ""
    return ", ".join(names[:SHOWN_TENSORS]) + more
