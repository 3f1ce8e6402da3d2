"""What a coordinate check and a sweep found, as text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from tools.width_check.activations import KINDS

Row = Mapping[int, float]
"""Width -> a mean absolute value."""


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


def check_lines(name: str, found: Found) -> Iterator[str]:
    """Show a parametrization's activations."""
    for what, rows in (("mean size", found.sizes), ("mean change", found.changes)):
        widths = list(rows[KINDS[0]])
        yield f"{f'{name}, {what}':<28}" + "".join(f"{width:>10,}" for width in widths) + "  spread"
        for kind in KINDS:
            values = "".join(f"{rows[kind][width]:>10.4f}" for width in widths)
            yield f"  {kind:<26}{values}{100 * spread(rows[kind]):>6.1f} %"


def sweep_lines(rates: Sequence[float], losses: Mapping[int, Mapping[float, float]]) -> list[str]:
    """Show a sweep's last losses, the best of each width marked."""
    lines = [f"{'width':<10}" + "".join(f"{rate:>11.2g}" for rate in rates)]
    for width, row in losses.items():
        best = best_rate(row)
        values = [f"{row[rate]:.4f}{'*' if rate == best else ' '}" for rate in rates]
        lines.append(f"{width:<10,}" + "".join(f"{value:>11}" for value in values))
    return lines


def best_rate(row: Mapping[float, float]) -> float | None:
    """Return the learning rate with the smallest loss; None where no loss is finite."""
    finite = [rate for rate, loss in row.items() if math.isfinite(loss)]
    return min(finite, key=lambda rate: row[rate], default=None)


def steps_between(
    rates: Sequence[float], losses: Mapping[int, Mapping[float, float]]
) -> int | None:
    """Return how many places of the list lie between the best rates of the widths.

    None: a width diverged at every rate.
    """
    best = [best_rate(row) for row in losses.values()]
    places = [rates.index(rate) for rate in best if rate is not None]
    return max(places) - min(places) if len(places) == len(best) else None
