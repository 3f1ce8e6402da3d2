"""What the rest of a run will draw from each source."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data.ledger import Ledger
from data.mixture import Mixture
from data.packing.place import Place
from data.segments import DataSettings


@dataclass(frozen=True)
class Forecast:
    """What a phase will draw of a source."""

    phase: str
    source: str
    share: float
    """Share of the phase's tokens."""
    samples: int
    tokens: int
    epoch_tokens: int
    """Tokens of the whole source."""
    from_epoch: float
    """Epochs of the source that are read before the phase."""
    to_epoch: float
    """Epochs of the source that are read at its end."""


def forecast(
    ledger: Ledger, clock: int, phases: Sequence[tuple[str, int, DataSettings]]
) -> list[Forecast]:
    """Tell what the rest of each phase will draw, an entry per phase and source.

    best_fit is estimated as full samples, without packing them.

    Args:
        clock: consumed tokens now.
        phases: (name, clock at its end, settings), those that end after `clock`, in order.
    """
    entries = []
    places = _places_now(ledger, clock)
    # Phase after phase: the places at the end of one are where the next begins.
    for phase, end, settings in phases:
        for _, name in settings.blend:
            if name not in places:
                places[name] = Place(ledger.place(name).tokens_read)
        # As `concat`, which finds any place by arithmetic.
        mixture = Mixture(replace(settings, packing="concat"), ledger.streams, places)
        samples = -(-(end - clock) // settings.seq_length)
        if settings.packing == "concat":  # best_fit is checked when its phase begins
            mixture.check(samples)
        total_weight = sum(weight for weight, _ in settings.blend)
        counts = mixture.counts(min(samples, mixture.order.samples))
        for (weight, _), (name, packer, count) in zip(settings.blend, counts, strict=True):
            before = places[name]
            places[name] = packer.after(count)
            epoch_tokens = packer.stream.tokens_per_epoch
            entries.append(
                Forecast(
                    phase=phase,
                    source=name,
                    share=weight / total_weight,
                    samples=count,
                    tokens=count * settings.seq_length,
                    epoch_tokens=epoch_tokens,
                    from_epoch=before.position / epoch_tokens,
                    to_epoch=places[name].position / epoch_tokens,
                )
            )
        clock = end
    return entries


def _places_now(ledger: Ledger, clock: int) -> dict[str, Place]:
    """Estimate the places in the open segment, as if all before was read in order."""
    if not ledger.has_open:
        return {}
    return {
        name: Place(ledger.place(name).tokens_read + drawn.tokens)
        for name, drawn in ledger.drawn_so_far(clock).items()
        if name in ledger.streams
    }
