"""What a coordinate check and a sweep found, as text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from tools.width_check.activations import KINDS

Row = Mapping[int, float]
"""Width -> a root mean square."""

Losses = Mapping[float, float]
"""Learning rate -> a mean loss."""


@dataclass(frozen=True)
class Found:
    """Holds what was measured of a parametrization, over all widths."""

    sizes: Mapping[str, Row]
    """Kind -> its size after the last step."""
    changes: Mapping[str, Row]
    """Kind -> the size of its change since the start."""


def spread(row: Row) -> float:
    """Return the largest distance from the mean of the widths, as a share of it."""
    mean = fmean(row.values())
    return max(abs(value - mean) for value in row.values()) / mean if mean > 0 else float("inf")


def last_growth(row: Row) -> float:
    """Return by what share the widest width's value is above the next one's.

    What narrow widths have by chance is gone there; a wrong power of the width is not.
    """
    *_, before, widest = sorted(row)
    return row[widest] / row[before] - 1 if row[before] > 0 else float("inf")


def check_lines(name: str, found: Found) -> Iterator[str]:
    """Show a parametrization's activations."""
    for what, rows in (("size", found.sizes), ("change", found.changes)):
        widths = list(rows[KINDS[0]])
        yield (
            f"{f'{name}, {what}':<28}"
            + "".join(f"{width:>10,}" for width in widths)
            + "  spread      last"
        )
        for kind in KINDS:
            values = "".join(f"{rows[kind][width]:>10.4f}" for width in widths)
            distance = f"{100 * spread(rows[kind]):>6.1f} %"
            growth = 100 * last_growth(rows[kind])
            yield f"  {kind:<26}{values}{distance}{growth:>+8.1f} %"


def mean_losses(of_seeds: Sequence[Losses]) -> Losses:
    """Return the mean over the seeds, at each rate."""
    return {rate: fmean(losses[rate] for losses in of_seeds) for rate in of_seeds[0]}


def rates_line(rates: Sequence[float]) -> str:
    """Title the columns of a sweep."""
    return f"{'width':<10}" + "".join(f"{rate:>11.2g}" for rate in rates) + "   best of each seed"


def losses_line(width: int, losses: Losses, of_seeds: Sequence[Losses]) -> str:
    """Show a width's losses, with a star at the best, and where that of each seed is."""
    best = best_rate(losses)
    values = [f"{loss:.4f}{'*' if rate == best else ' '}" for rate, loss in losses.items()]
    of_each = [best_rate(row) for row in of_seeds]
    names = " ".join("none" if rate is None else f"{rate:.2g}" for rate in of_each)
    return f"{width:<10,}" + "".join(f"{value:>11}" for value in values) + f"   {names}"


def best_rate(losses: Losses) -> float | None:
    """Return the learning rate with the smallest loss; None where no loss is finite."""
    finite = [rate for rate, loss in losses.items() if math.isfinite(loss)]
    return min(finite, key=lambda rate: losses[rate], default=None)


def steps_between(rates: Sequence[float], losses: Mapping[int, Losses]) -> int | None:
    """Return how many places of the list lie between the best rates of the widths.

    None: a width diverged at every rate.
    """
    best = [best_rate(row) for row in losses.values()]
    places = [rates.index(rate) for rate in best if rate is not None]
    return max(places) - min(places) if len(places) == len(best) else None
