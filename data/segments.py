"""Segments of a run: stretches of consumed tokens with unchanged data settings, and what each drew
of its sources.

A run's data is a row of closed segments and, while it goes on, an open one. A checkpoint stores
them (progress.json: data.segments); `read_segment` reads them back, those of earlier versions too.
"""

from dataclasses import asdict, dataclass, replace
from math import fsum
from typing import Any, Self, TypeVar

from data.config import Exhausted, Packing
from data.document_cost import DocumentCost
from data.packing.place import Mark

Value = TypeVar("Value")


# ---------------------------------------------------------------- what a segment keeps and draws


@dataclass(frozen=True)
class DataSettings:
    """What a segment keeps fixed."""

    seq_length: int
    blend: tuple[tuple[float, str], ...]
    """(weight by tokens, name of the source) each."""
    packing: Packing = "concat"
    exhausted: Exhausted = "repeat"
    """At the end of a source's epoch: the next epoch; draw no more from it; or refuse the run."""
    max_documents_per_sample: int | None = None
    """For best_fit; None = any number."""
    equal_cost: DocumentCost | None = None
    """For best_fit: what its samples shall cost nearly the same of; None = they are only full. As
    it was when the segment began, whatever the model's formula has become."""
    samples_per_step: int | None = None
    """With `equal_cost`: the global batch by which samples of like cost come in the same steps, as
    it was when the segment began; None = they come in a random order."""

    def share_of(self, name: str) -> float:
        """Compute the share of the tokens that a source of the blend gives."""
        weights = {source: weight for weight, source in self.blend}
        # Rounded once, so that it is the same on every machine.
        return weights[name] / fsum(weights.values())

    @staticmethod
    def from_json(stored: dict[str, Any]) -> "DataSettings":
        # JSON has no tuples, and settings are compared.
        blend = tuple((weight, name) for weight, name in stored["blend"])
        cost = stored.get("equal_cost")
        return DataSettings(
            stored["seq_length"],
            blend,
            stored["packing"],
            stored["exhausted"],
            max_documents_per_sample=stored.get("max_documents_per_sample"),
            equal_cost=None if cost is None else DocumentCost.from_json(cost),
            samples_per_step=stored.get("samples_per_step"),
        )

    def to_json(self) -> dict[str, Any]:
        # What is not asked for is left out, as it was before it could be asked for.
        stored = {key: value for key, value in asdict(self).items() if value is not None}
        return stored | {"blend": [list(entry) for entry in self.blend]}

    def agrees_with(self, other: "DataSettings") -> bool:
        """Tell whether two settings ask for the same.

        The coefficients of costs and the batch, by which samples are balanced, may differ.
        """
        both_or_none = (self.equal_cost is None) == (other.equal_cost is None)
        balanced_alike = replace(
            other, equal_cost=self.equal_cost, samples_per_step=self.samples_per_step
        )
        return both_or_none and self == balanced_alike

    def renamed(self, names: dict[str, str]) -> "DataSettings":
        """Return the same with other names of sources; names: name now -> new name."""
        blend = tuple((weight, names.get(name, name)) for weight, name in self.blend)
        return replace(self, blend=blend)


@dataclass(frozen=True)
class Drawn:
    """What a segment drew of one source."""

    samples: int
    tokens: int
    """Without padding."""
    documents: int
    """Documents whose first token is among them."""
    epochs: float
    """Epochs of the source read by then, passed over or not."""
    mark: Mark | None = None
    """For best_fit, where its last sample's window begins."""

    @staticmethod
    def from_json(stored: dict[str, Any]) -> "Drawn":
        mark = Mark(*stored["mark"]) if "mark" in stored else None
        return Drawn(
            stored["samples"], stored["tokens"], stored["documents"], stored["epochs"], mark
        )

    def to_json(self) -> dict[str, Any]:
        return self.counts() | ({"mark": list(self.mark)} if self.mark else {})

    def counts(self) -> dict[str, Any]:
        """Return the numbers that people read: samples, tokens, documents, epochs."""
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "documents": self.documents,
            "epochs": self.epochs,
        }


DrawnBySource = dict[str, Drawn]


# ---------------------------------------------------------------- segments


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """What open and closed segments have in common."""

    start: int
    """Consumed tokens (the clock) at its first sample."""
    phase: str
    settings: DataSettings
    fills: dict[str, float] | None = None
    """Tokens of an average sample of each source over its length; None = not needed yet."""

    def _to_json(self) -> dict[str, Any]:
        stored = {"start": self.start, "phase": self.phase, **self.settings.to_json()}
        return stored | ({} if self.fills is None else {"fills": self.fills})

    def renamed(self, names: dict[str, str]) -> Self:
        """Return the same with other names of sources; names: name now -> new name."""
        # Everything that is kept by the name of a source.
        fills = None if self.fills is None else _rename_keys(self.fills, names)
        return replace(self, settings=self.settings.renamed(names), fills=fills)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What an open segment had drawn when a checkpoint was saved."""

    clock: int
    drawn: DrawnBySource


@dataclass(frozen=True, kw_only=True)
class OpenSegment(_Segment):
    """The segment that a run draws from now."""

    saved: Saved | None = None
    """From the checkpoint that the run goes on from."""

    def closed(
        self,
        drawn: DrawnBySource,
        *,
        skipped_until: int | None = None,
        rewind: int | None = None,
    ) -> "ClosedSegment":
        """Return the segment as it stays after its end."""
        return ClosedSegment(
            start=self.start,
            phase=self.phase,
            settings=self.settings,
            fills=self.fills,
            drawn=drawn,
            skipped_until=skipped_until,
            rewind=rewind,
        )

    def sources_drawn(self) -> list[str]:
        """Name the sources that it had drawn from at the last save."""
        return _sources_drawn(self.saved.drawn) if self.saved else []

    def to_json(self) -> dict[str, Any]:
        stored = self._to_json()
        if self.saved is not None:
            stored |= {"at": self.saved.clock, "so_far": _drawn_to_json(self.saved.drawn)}
        return stored

    def renamed(self, names: dict[str, str]) -> Self:
        segment = super().renamed(names)
        if segment.saved is None:
            return segment
        saved = replace(segment.saved, drawn=_rename_keys(segment.saved.drawn, names))
        return replace(segment, saved=saved)


@dataclass(frozen=True, kw_only=True)
class ClosedSegment(_Segment):
    """A segment that is over, or a window that was passed over without training on it."""

    drawn: DrawnBySource
    skipped_until: int | None = None
    """End of the window that was passed over (--skip-data, or a rewind's); None where the model
    received it."""
    rewind: int | None = None
    """Number of the rewind for which it was passed over."""

    def reopened(self) -> OpenSegment:
        """Return the segment as it was before it closed."""
        return OpenSegment(
            start=self.start, phase=self.phase, settings=self.settings, fills=self.fills
        )

    def sources_drawn(self) -> list[str]:
        """Name the sources that it drew from."""
        return _sources_drawn(self.drawn)

    def to_json(self) -> dict[str, Any]:
        skipped = {} if self.skipped_until is None else {"skipped_until": self.skipped_until}
        if self.rewind is not None:
            skipped |= {"rewind": self.rewind}
        return self._to_json() | skipped | {"drawn": _drawn_to_json(self.drawn)}

    def renamed(self, names: dict[str, str]) -> Self:
        return replace(super().renamed(names), drawn=_rename_keys(self.drawn, names))


# ---------------------------------------------------------------- as JSON

Segment = OpenSegment | ClosedSegment


def read_segment(stored: dict[str, Any]) -> Segment:
    """Read a segment of a checkpoint: a closed one has "drawn", an open one "at" and "so_far"."""
    start: int = stored["start"]
    phase: str = stored["phase"]
    fills: dict[str, float] | None = stored.get("fills")
    settings = DataSettings.from_json(stored)
    if "drawn" in stored:
        return ClosedSegment(
            start=start,
            phase=phase,
            settings=settings,
            fills=fills,
            drawn=_drawn_from_json(stored["drawn"]),
            skipped_until=stored.get("skipped_until"),
            rewind=stored.get("rewind"),
        )
    # An open segment is stored with what it had drawn at the save.
    saved = None
    if "so_far" in stored:
        saved = Saved(clock=stored["at"], drawn=_drawn_from_json(stored["so_far"]))
    return OpenSegment(start=start, phase=phase, settings=settings, fills=fills, saved=saved)


def _sources_drawn(drawn: DrawnBySource) -> list[str]:
    return [name for name, entry in drawn.items() if entry.samples]


def _drawn_from_json(stored: dict[str, dict[str, Any]]) -> DrawnBySource:
    return {name: Drawn.from_json(entry) for name, entry in stored.items()}


def _drawn_to_json(drawn: DrawnBySource) -> dict[str, dict[str, Any]]:
    return {name: entry.to_json() for name, entry in drawn.items()}


def _rename_keys(by_name: dict[str, Value], names: dict[str, str]) -> dict[str, Value]:
    # Names that are not listed stay.
    return {names.get(name, name): value for name, value in by_name.items()}
