"""What has been drawn from each source, and therefore what comes next: the run's account of its
data.

The run is a row of segments (segments.py). A closed segment says how many samples it drew from each
source; folding the closed segments gives each source's place, from which the open one draws. So a
sample is a function of (seed, closed segments, settings of the open one, its number there) and of
nothing else: not of batch, layout or machine count. A checkpoint stores the segments; later
settings cannot change the past.

`clock` is the run's one clock, the tokens consumed so far, padding included.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from data.mixture import Mixture, numbers_of_source
from data.packing.packers import make_packer
from data.packing.place import Place
from data.segments import (
    ClosedSegment,
    DataSettings,
    DrawnBySource,
    OpenSegment,
    Saved,
    Segment,
    read_segment,
)
from data.stream import DocumentStream


@dataclass(frozen=True)
class StoredLedger:
    """What a checkpoint says of the data that its run has drawn."""

    sources: dict[str, dict[str, Any]]
    """Name -> `DocumentStream.fingerprint`."""
    segments: list[Segment]

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> "StoredLedger":
        """Read progress.json's `data`.

        Raises:
            ValueError: it was stored before there were segments.
        """
        if "segments" not in stored:
            raise ValueError(
                "the checkpoint's account of its data is of an earlier version. Fix: start a new "
                "run from its weights with --finetune and a new --save."
            )
        return StoredLedger(
            stored["sources"], [read_segment(entry) for entry in stored["segments"]]
        )

    def renamed(self, names: dict[str, str]) -> "StoredLedger":
        """Return the same with other names of sources; names: name now -> new name."""
        sources = {names.get(name, name): found for name, found in self.sources.items()}
        return StoredLedger(sources, [segment.renamed(names) for segment in self.segments])


@dataclass(frozen=True)
class Window:
    """Data that a run passes over: what it would draw between two positions of the clock."""

    start: int
    end: int
    rewind: int | None = None
    """Number of the rewind that asks for it; None = --skip-data does."""


class Ledger:
    """The segments of a run, over the sources that its settings name.

    Attributes:
        begun_anew: names of the sources that start from their beginning, since they are not what
            the stored segments drew from.
    """

    def __init__(
        self,
        streams: dict[str, DocumentStream],
        stored: Mapping[str, Any] | None = None,
        *,
        accept_changes: bool = False,
        another_seed: bool = False,
    ):
        """
        Args:
            streams: the sources that may be drawn from, by name.
            stored: `to_json` of an earlier run that this one continues.
            accept_changes: a source that is not what it was starts from its beginning, instead of
                being an error.
            another_seed: the order of the documents is another: every source starts from its
                beginning.

        Raises:
            ValueError: a source is not what the stored segments drew from; names it and what
                changed.
        """
        self.streams = streams
        self.begun_anew: list[str] = []
        self._closed: list[ClosedSegment] = []
        self._open: OpenSegment | None = None
        self._sources: dict[str, dict[str, Any]] = {}
        self._mixture: Mixture | None = None
        # What was drawn before stays, under the names that its sources have now.
        if stored:
            account = StoredLedger.from_json(stored)
            names = _match(
                account.sources, streams, accept_changes=accept_changes, another_seed=another_seed
            )
            self._take_over(account.renamed(names))
            self.begun_anew = [name for name in streams if names.get(name, name) != name]
        self._sources |= {name: stream.fingerprint() for name, stream in streams.items()}

    def _take_over(self, stored: StoredLedger) -> None:
        """Go on from stored segments, of which the last may be open."""
        self._sources = dict(stored.sources)
        for segment in stored.segments:
            assert self._open is None, "a stored segment is open before the last one"
            if isinstance(segment, ClosedSegment):
                self._closed.append(segment)
            else:
                self._open = segment

    # ---------------------------------------------------------------- segments

    @property
    def open(self) -> OpenSegment:
        """The segment that the run draws from now."""
        assert self._open is not None, "no segment is open"
        return self._open

    @property
    def has_open(self) -> bool:
        """Whether the run draws from a segment."""
        return self._open is not None

    @property
    def segments(self) -> list[Segment]:
        """All segments in order, the open one last."""
        return [*self._closed, *([] if self._open is None else [self._open])]

    def enter(self, clock: int, phase: str, settings: DataSettings) -> None:
        """Draw by `settings` from `clock` on, in a new segment unless the open one has the same."""
        # The same settings go on in the same segment, and with its coefficients of the cost.
        if self._open is not None:
            if self._open.phase == phase and self._open.settings.agrees_with(settings):
                return
            self._close(clock)
        self._begin(clock, phase, settings)

    def rename_phase(self, before: str, now: str) -> None:
        """Give the phase of the open segment another name; what it draws stays the same."""
        if self.open.phase == before:
            self._open = replace(self.open, phase=now)

    def skip(self, clock: int, until: int, rewind: int | None = None) -> None:
        """Pass over what the window [clock, until) would have drawn, and go on after it.

        Args:
            rewind: number of the rewind that asks for it.
        """
        phase = self.open.phase
        settings = self.open.settings
        self._close(clock)
        # The window is a segment of its own, which draws its samples without showing them.
        self._begin(clock, phase, settings)
        samples = max(0, -(-(until - clock) // settings.seq_length))
        self.mixture().check(samples)
        drawn = self.mixture().draw(samples)
        self._closed.append(self.open.closed(drawn, skipped_until=until, rewind=rewind))
        self._begin(clock, phase, settings)

    def has_skipped(self, until: int) -> bool:
        """Was the window of --skip-data that ends at `until` passed over?"""
        return any(
            segment.skipped_until == until and segment.rewind is None for segment in self._closed
        )

    @property
    def skip_starts(self) -> list[int]:
        """Consumed tokens at which windows of --skip-data were passed over."""
        return [
            segment.start
            for segment in self._closed
            if segment.skipped_until is not None and segment.rewind is None
        ]

    @property
    def rewinds_passed(self) -> list[int]:
        """Numbers of the rewinds whose windows were passed over."""
        return [segment.rewind for segment in self._closed if segment.rewind is not None]

    def has_passed(self, window: Window) -> bool:
        """Was the window passed over?"""
        if window.rewind is not None:
            return window.rewind in self.rewinds_passed
        # One of --skip-data is known by its end; its start moves to the first step in it.
        return self.has_skipped(window.end)

    def as_of(self, clock: int) -> "Ledger":
        """Return the ledger as it stood at an earlier clock, its segment of that time open."""
        begun = sum(segment.start <= clock for segment in self.segments)
        assert begun, clock
        last = self.segments[begun - 1]
        assert isinstance(last, OpenSegment) or last.skipped_until is None, clock
        return self.as_of_segment(begun - 1)

    def as_of_segment(self, number: int) -> "Ledger":
        """Return the ledger as it stood while segment `number` was open."""
        segment = self.segments[number]
        earlier = Ledger(self.streams)
        earlier._closed = self._closed[:number]
        earlier._open = (
            segment.reopened()
            if isinstance(segment, ClosedSegment)
            else replace(segment, saved=None)
        )
        return earlier

    def _begin(self, clock: int, phase: str, settings: DataSettings) -> None:
        self._open = OpenSegment(start=clock, phase=phase, settings=settings)
        self._mixture = None

    def _close(self, clock: int) -> None:
        # This may mix the segment, and so give it its fills: it closes with them.
        drawn = self.drawn_so_far(clock)
        self._closed.append(self.open.closed(drawn))
        self._open = None

    # ---------------------------------------------------------------- what comes next

    def mixture(self) -> Mixture:
        """Mix the samples of the open segment; number 0 is the one at its start."""
        if self._mixture is None:
            segment = self.open
            places = {name: self.place(name) for _, name in segment.settings.blend}
            saved = segment.saved.drawn if segment.saved else {}
            marks = {name: drawn.mark for name, drawn in saved.items()}
            self._mixture = Mixture(segment.settings, self.streams, places, marks, segment.fills)
            # Stored with the segment, so that a restart need not estimate them again.
            self._open = replace(segment, fills=self._mixture.fills)
        return self._mixture

    def place(self, name: str) -> Place:
        """Find what of a source is unread after the closed segments."""
        # Each segment begins where the one before it left the source.
        place = Place()
        for segment in self._closed:
            drawn = segment.drawn.get(name)
            if drawn and drawn.samples:
                packer = make_packer(segment.settings, name, self.streams[name], place, drawn.mark)
                if segment.fills is not None:
                    packer.take_numbers(numbers_of_source(segment.settings, segment.fills, name))
                place = packer.after(drawn.samples)
        return place

    def places_at(self, clock: int) -> dict[str, Place]:
        """Find what of each source is unread at `clock`, in the open segment."""
        # Sources of the open segment stand where it left them, others where the closed ones did.
        drawn = {
            name: packer.after(count)
            for name, packer, count in self.mixture().counts(self.samples_at(clock))
        }
        return {name: drawn[name] if name in drawn else self.place(name) for name in self.streams}

    def samples_at(self, clock: int) -> int:
        """Compute the number in the open segment of the first sample at `clock`."""
        start = self.open.start
        seq_length = self.open.settings.seq_length
        samples, rest = divmod(clock - start, seq_length)
        assert samples >= 0 and rest == 0, (clock, start, seq_length)
        return samples

    # ---------------------------------------------------------------- what was drawn

    def drawn_so_far(self, clock: int) -> DrawnBySource:
        """Tell what the open segment drew of each source before `clock`.

        Where a checkpoint was saved at that clock, from the checkpoint: a source that the run no
        longer names is not needed then.
        """
        saved = self.open.saved
        if saved is not None and saved.clock == clock:
            return saved.drawn
        return self.mixture().draw(self.samples_at(clock))

    def tokens_by_source(self, clock: int) -> dict[str, int]:
        """Count the real tokens, without padding, that the model received up to `clock`."""
        parts = [
            {name: drawn.tokens for name, drawn in segment.drawn.items()}
            for segment in self._closed
            if segment.skipped_until is None
        ]
        parts.append(self.mixture().tokens(self.samples_at(clock)))
        totals: dict[str, int] = {}
        for part in parts:
            for name, tokens in part.items():
                totals[name] = totals.get(name, 0) + tokens
        return totals

    def account(self, clock: int) -> list[dict[str, Any]]:
        """List what was drawn up to `clock`, as ledger.jsonl has it: a row per segment and source
        with phase, source, skipped, samples, tokens, documents and epochs."""
        drawn_by_segment = [
            (segment.phase, segment.skipped_until is not None, segment.drawn)
            for segment in self._closed
        ]
        drawn_by_segment.append((self.open.phase, False, self.drawn_so_far(clock)))
        return [
            {"phase": phase, "source": name, "skipped": skipped, **drawn.counts()}
            for phase, skipped, by_source in drawn_by_segment
            for name, drawn in by_source.items()
        ]

    def to_json(self, clock: int) -> dict[str, Any]:
        """Return what a checkpoint at `clock` stores."""
        saved = Saved(clock=clock, drawn=self.drawn_so_far(clock))
        # The account repeats what the segments say, for people and for the report.
        segments = [*self._closed, replace(self.open, saved=saved)]
        return {
            "sources": self._sources,
            "segments": [segment.to_json() for segment in segments],
            "account": self.account(clock),
        }


def _match(
    stored: dict[str, dict[str, Any]],
    streams: dict[str, DocumentStream],
    *,
    accept_changes: bool,
    another_seed: bool,
) -> dict[str, str]:
    """Find the new names of stored sources that moved or, where that is accepted, changed.

    Raises:
        ValueError: a source changed, and that is not accepted; all of them, a line each.
    """
    renamed = {}
    problems = []
    for name, stream in streams.items():
        found = stream.fingerprint()
        if name in stored and (stored[name] != found or another_seed):
            if accept_changes:
                # What was drawn before stays in the account under a name of its own.
                renamed[name] = f"{name} before it changed ({stored[name]['corpus'][:8]})"
            else:
                problems.append(_describe_change(name, stored[name], found))
        elif name not in stored and not another_seed:
            # A stored source with the same content that no setting names any more: it has moved.
            moved = [
                old
                for old, known in stored.items()
                if known == found and old not in streams and old not in renamed
            ]
            if moved:
                renamed[moved[0]] = name
    if problems:
        raise ValueError("\n".join(problems))
    return renamed


def _describe_change(name: str, stored: dict[str, Any], found: dict[str, Any]) -> str:
    changed = ", ".join(
        f"{key} {stored.get(key)} -> {found[key]}" for key in found if stored.get(key) != found[key]
    )
    return (
        f"{name}: is not the data that the checkpoint was trained on ({changed}). Fix: give "
        "that data, or --accept-changes data to draw the new one from its beginning."
    )
