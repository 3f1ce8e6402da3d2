"""What has been drawn from each source, and therefore what comes next: the run's account of its
data.

The run is a row of segments, stretches of the clock with unchanged data settings. A closed segment
says how many samples it drew from each source; folding the closed segments gives each source's
place, from which the open one draws. So a sample is a function of (seed, closed segments, settings
of the open one, its number there) and of nothing else: not of batch, layout or machine count. A
checkpoint stores the segments; later settings cannot change the past.
"""

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data.batch import Sample
from data.blend import BlendOrder
from data.config import Exhausted, Packing
from data.packing import PACKINGS, Place
from data.stream import DocumentStream


@dataclass(frozen=True)
class DataSettings:
    """What a segment keeps fixed."""

    seq_length: int
    blend: tuple[tuple[float, str], ...]
    """(weight by tokens, name of the source) each."""
    packing: Packing = "concat"
    exhausted: Exhausted = "repeat"
    """At the end of a source's epoch: the next epoch; draw no more from it; or refuse the run."""

    @staticmethod
    def from_json(stored: dict) -> "DataSettings":
        blend = tuple((weight, name) for weight, name in stored["blend"])
        return DataSettings(stored["seq_length"], blend, stored["packing"], stored["exhausted"])

    def to_json(self) -> dict:
        return asdict(self) | {"blend": [list(entry) for entry in self.blend]}


class Mixture:
    """The samples of one segment, by their number in it. Safe to use from several threads."""

    def __init__(
        self,
        settings: DataSettings,
        streams: dict[str, DocumentStream],
        places: dict[str, Place],
        marks: dict[str, Any] | None = None,
        fills: dict[str, float] | None = None,
    ):
        """
        Args:
            marks: of each source's packer (packing.py: BestFit).
            fills: tokens of an average sample of each source, as a share of its length; reckoned if
                not given.
        """
        self.settings = settings
        self.names = [name for _, name in settings.blend]
        self.packers = [
            PACKINGS[settings.packing](
                streams[name], places[name], settings.seq_length, (marks or {}).get(name)
            )
            for name in self.names
        ]
        limits = [None] * len(self.packers)
        if settings.exhausted != "repeat":
            limits = [
                packer.samples_before(packer.place.epoch_end(packer.stream))
                for packer in self.packers
            ]
        self.limits, self._lock = limits, threading.RLock()
        if (
            fills is None
        ):  # weights are shares of the tokens, and best_fit's samples are not equally full
            is_packed = settings.packing == "best_fit" and len(self.names) > 1
            fills = {
                name: packer.fill() if is_packed else 1.0
                for name, packer in zip(self.names, self.packers, strict=True)
            }
        self.fills = fills
        self.order = BlendOrder(
            [weight / fills[name] for weight, name in settings.blend],
            limits if settings.exhausted == "stop" else [None] * len(limits),
        )

    def check(self, samples: int) -> None:
        """Raises ValueError unless the sources have that many samples under the segment's
        `exhausted`."""
        if samples > self.order.samples:
            raise ValueError(
                f"data_exhausted = stop: the sources have {self.order.samples:,} samples of "
                f"{self.settings.seq_length:,} tokens left, {samples:,} are to be drawn. Fix: fewer "
                "tokens, more data, or --data-exhausted repeat."
            )
        if self.settings.exhausted == "error":
            counts = self.order.counts(samples).tolist()
            short = [
                f"{name} has {limit:,} samples left, {count:,} are to be drawn"
                for name, limit, count in zip(self.names, self.limits, counts, strict=True)
                if count > limit
            ]
            if short:
                raise ValueError(
                    f"data_exhausted = error: {'; '.join(short)} (of {self.settings.seq_length:,} tokens "
                    "each). Fix: fewer tokens, more data, other weights, or --data-exhausted repeat."
                )

    def samples(self, numbers: Sequence[int]) -> list[Sample]:
        """The samples of these numbers."""
        with self._lock:
            first = min(numbers)
            sources, places = (
                array.tolist() for array in self.order.draw(first, max(numbers) + 1 - first)
            )
            return [
                self.packers[sources[number - first]].sample(places[number - first])
                for number in numbers
            ]

    def tokens(self, samples: int) -> dict[str, int]:
        """Tokens that the first `samples` hold, by source; padding is not counted."""
        with self._lock:
            counts = self.order.counts(samples).tolist()
            return {
                name: packer.tokens(count)
                for name, packer, count in zip(self.names, self.packers, counts, strict=True)
            }

    def draw(self, samples: int) -> dict[str, dict]:
        """What a segment that closes after `samples` has to remember of each source."""
        with self._lock:
            counts = self.order.counts(samples).tolist()
            return {
                name: _remember(packer, count)
                for name, packer, count in zip(self.names, self.packers, counts, strict=True)
            }


def fresh_mixture(
    blend: Sequence[tuple[float, DocumentStream]],
    seq_length: int,
    packing: Packing = "concat",
    exhausted: Exhausted = "repeat",
) -> Mixture:
    """The samples of some streams from their beginnings: validation sets, tools, tests."""
    streams = {str(number): stream for number, (_, stream) in enumerate(blend)}
    weights = tuple((weight, str(number)) for number, (weight, _) in enumerate(blend))
    return Mixture(
        DataSettings(seq_length, weights, packing, exhausted),
        streams,
        dict.fromkeys(streams, Place()),
    )


def _remember(packer, samples: int) -> dict:
    """Samples, tokens, documents, epochs (of its stream, passed over or not) and, for best_fit, the
    mark."""
    place = packer.after(samples)
    stream = packer.stream
    drawn = {
        "samples": samples,
        "tokens": place.tokens_read - packer.place.tokens_read,
        "documents": place.documents_read(stream) - packer.place.documents_read(stream),
        "epochs": place.tokens_read / stream.tokens_per_epoch,
    }
    mark = packer.mark(samples)
    return drawn | ({"mark": list(mark)} if mark else {})


class Ledger:
    """The segments of a run, over the sources that its settings name.

    Args:
        streams: the sources that may be drawn from, by name.
        stored: `to_json` of an earlier run that this one continues.
        accept_changes: a source that is not what it was begins anew, instead of being an error.
        another_seed: the order of the documents is another: every source begins anew.

    Raises:
        ValueError: a source is not what the stored segments drew from; names it and what changed.
    """

    def __init__(
        self,
        streams: dict[str, DocumentStream],
        stored: dict | None = None,
        accept_changes: bool = False,
        another_seed: bool = False,
    ):
        self.streams = streams
        self.segments: list[dict] = []
        self._sources: dict[str, dict] = {}
        self._mixture: Mixture | None = None
        self.begun_anew: list[str] = []
        """Sources that are not what the stored segments drew from."""
        if stored and "segments" not in stored:
            raise ValueError(
                "the checkpoint's account of its data is of an earlier version. Fix: start a new run from "
                "its weights with --finetune and a new --save."
            )
        if stored:
            renamed = _match(stored["sources"], streams, accept_changes, another_seed)
            self.segments = [_rename(segment, renamed) for segment in stored["segments"]]
            self._sources = {
                renamed.get(name, name): found for name, found in stored["sources"].items()
            }
            self.begun_anew = [name for name in streams if renamed.get(name, name) != name]
        self._sources |= {name: stream.fingerprint() for name, stream in streams.items()}

    @property
    def open(self) -> dict:
        assert self.segments and "drawn" not in self.segments[-1], "no segment is open"
        return self.segments[-1]

    def enter(self, clock: int, phase: str, settings: DataSettings) -> None:
        """Draw by `settings` from `clock` on; a segment of its own unless the open one has the
        same."""
        opening = {"phase": phase, **settings.to_json()}
        if self.segments and "drawn" not in self.segments[-1]:
            if all(self.open[key] == value for key, value in opening.items()):
                return
            self._close(clock)
        self._append({"start": clock, **opening})

    def rename_phase(self, before: str, now: str) -> None:
        """The phase of the open segment is called otherwise from now on; what it draws stays the
        same."""
        if self.open["phase"] == before:
            self.open["phase"] = now

    def skip(self, clock: int, until: int) -> None:
        """Pass over what the clock's window [clock, until) would have drawn, and go on after it."""
        same = {
            key: self.open[key] for key in ("phase", "seq_length", "blend", "packing", "exhausted")
        }
        self._close(clock)
        self._append({"start": clock, "skipped_until": until, **same})
        samples = max(0, -(-(until - clock) // same["seq_length"]))
        self.mixture().check(samples)
        self.open["drawn"] = self.mixture().draw(samples)
        self._append({"start": clock, **same})

    def has_skipped(self, until: int) -> bool:
        """Was the window that ends at `until` passed over?"""
        return any(segment.get("skipped_until") == until for segment in self.segments)

    def as_of(self, clock: int) -> "Ledger":
        """The ledger as it stood at an earlier clock, its segment of that time open."""
        begun = [segment for segment in self.segments if segment["start"] <= clock]
        assert begun and "skipped_until" not in begun[-1], clock
        earlier = Ledger(self.streams)
        last = {
            key: value for key, value in begun[-1].items() if key not in ("drawn", "at", "so_far")
        }
        earlier.segments = [*begun[:-1], last]
        return earlier

    def mixture(self) -> Mixture:
        """The samples of the last segment; number 0 is the one at its start."""
        if self._mixture is None:
            segment = self.segments[-1]
            settings = DataSettings.from_json(segment)
            places = {name: self.place(name) for _, name in settings.blend}
            marks = {name: drawn.get("mark") for name, drawn in segment.get("so_far", {}).items()}
            self._mixture = Mixture(settings, self.streams, places, marks, segment.get("fills"))
            segment["fills"] = self._mixture.fills
        return self._mixture

    def place(self, name: str) -> Place:
        """What of a source is unread at the start of the last segment."""
        place = Place()
        for segment in self.segments[:-1]:
            drawn = segment["drawn"].get(name)
            if drawn and drawn["samples"]:
                mark = tuple(drawn["mark"]) if "mark" in drawn else None
                packer = PACKINGS[segment["packing"]](
                    self.streams[name], place, segment["seq_length"], mark
                )
                place = packer.after(drawn["samples"])
        return place

    def places_at(self, clock: int) -> dict[str, Place]:
        """What of each source is unread at `clock`, in the open segment."""
        mixture = self.mixture()
        counts = dict(
            zip(mixture.names, mixture.order.counts(self.samples_at(clock)).tolist(), strict=True)
        )
        packers = dict(zip(mixture.names, mixture.packers, strict=True))
        return {
            name: packers[name].after(counts[name]) if name in packers else self.place(name)
            for name in self.streams
        }

    def samples_at(self, clock: int) -> int:
        """Number in the open segment of the first sample at `clock`."""
        samples, rest = divmod(clock - self.open["start"], self.open["seq_length"])
        assert samples >= 0 and rest == 0, (clock, self.open["start"], self.open["seq_length"])
        return samples

    def tokens_by_source(self, clock: int) -> dict[str, int]:
        """Real tokens that the model received up to `clock`."""
        totals: dict[str, int] = {}
        open_tokens = self.mixture().tokens(self.samples_at(clock))
        parts = [
            {name: drawn["tokens"] for name, drawn in segment["drawn"].items()}
            for segment in self.segments[:-1]
            if "skipped_until" not in segment
        ]
        for part in (*parts, open_tokens):
            for name, tokens in part.items():
                totals[name] = totals.get(name, 0) + tokens
        return totals

    def account(self, clock: int) -> list[dict]:
        """A row per segment and source up to `clock`: phase, source, samples, tokens, documents,
        epochs, skipped."""
        open_drawn = self.drawn_so_far(clock)
        return [
            {
                "phase": segment["phase"],
                "source": name,
                "skipped": "skipped_until" in segment,
                **{key: drawn[key] for key in ("samples", "tokens", "documents", "epochs")},
            }
            for segment in self.segments
            for name, drawn in segment.get("drawn", open_drawn).items()
        ]

    def to_json(self, clock: int) -> dict:
        """What a checkpoint at `clock` stores."""
        segments = [
            *self.segments[:-1],
            self.open | {"at": clock, "so_far": self.drawn_so_far(clock)},
        ]
        return {"sources": self._sources, "segments": segments, "account": self.account(clock)}

    def drawn_so_far(self, clock: int) -> dict[str, dict]:
        """What the open segment drew of each source before `clock`. Where a checkpoint was there,
        from it: a source that the run no longer names is not needed any more."""
        if self.open.get("at") == clock:
            return self.open["so_far"]
        return self.mixture().draw(self.samples_at(clock))

    def _append(self, segment: dict) -> None:
        self.segments.append(segment)
        self._mixture = None

    def _close(self, clock: int) -> None:
        drawn = self.drawn_so_far(clock)
        self.segments[-1] = {
            key: value for key, value in self.open.items() if key not in ("at", "so_far")
        }
        self.open["drawn"] = drawn


def _match(
    stored: dict[str, dict],
    streams: dict[str, DocumentStream],
    accept_changes: bool,
    another_seed: bool,
) -> dict[str, str]:
    """Names of stored sources -> theirs now, for those that moved or, where that is accepted,
    changed."""
    renamed = {}
    problems = []
    for name, stream in streams.items():
        found = stream.fingerprint()
        if name in stored and (stored[name] != found or another_seed):
            if accept_changes:
                renamed[name] = f"{name} before it changed ({stored[name]['corpus'][:8]})"
            else:
                changed = ", ".join(
                    f"{key} {stored[name].get(key)} -> {found[key]}"
                    for key in found
                    if stored[name].get(key) != found[key]
                )
                problems.append(
                    f"{name}: is not the data that the checkpoint was trained on ({changed}). Fix: give "
                    "that data, or --accept-changes data to draw the new one from its beginning."
                )
        elif name not in stored and not another_seed:
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


def _rename(segment: dict, renamed: dict[str, str]) -> dict:
    """The segment with its sources under their present names."""

    def now(name: str) -> str:
        return renamed.get(name, name)

    segment = segment | {"blend": [[weight, now(name)] for weight, name in segment["blend"]]}
    return segment | {
        key: {now(name): value for name, value in segment[key].items()}
        for key in ("drawn", "so_far", "fills")
        if key in segment
    }


def forecast(
    ledger: Ledger, clock: int, phases: Sequence[tuple[str, int, DataSettings]]
) -> list[dict]:
    """What the rest of each phase will draw: a row per phase and source, with its epochs at the
    phase's end.

    best_fit is reckoned as full samples, without packing them.

    Args:
        phases: (name, clock at its end, settings), those that end after `clock`, in order.
    """
    rows = []
    places = {}
    if ledger.segments and "drawn" not in ledger.segments[-1]:
        for name, drawn in ledger.drawn_so_far(clock).items():
            if name in ledger.streams:
                places[name] = Place(ledger.place(name).tokens_read + drawn["tokens"])
    for phase, end, settings in phases:
        for _, name in settings.blend:
            if name not in places:
                places[name] = Place(ledger.place(name).tokens_read if ledger.segments else 0)
        samples = -(-(end - clock) // settings.seq_length)
        concat = DataSettings(settings.seq_length, settings.blend, "concat", settings.exhausted)
        mixture = Mixture(concat, ledger.streams, places)
        if settings.packing == "concat":
            mixture.check(samples)
        samples = min(samples, mixture.order.samples)  # best_fit is checked when its phase begins
        total = sum(weight for weight, _ in settings.blend)
        drawn = mixture.order.counts(samples).tolist()
        for (weight, name), packer, count in zip(
            settings.blend, mixture.packers, drawn, strict=True
        ):
            before, places[name] = places[name], packer.after(count)
            epoch = packer.stream.tokens_per_epoch
            rows.append(
                {
                    "phase": phase,
                    "source": name,
                    "share": weight / total,
                    "samples": count,
                    "tokens": count * settings.seq_length,
                    "epoch_tokens": epoch,
                    "from_epoch": before.position / epoch,
                    "to_epoch": places[name].position / epoch,
                }
            )
        clock = end
    return rows
