"""Draw what the charts of a report share: colours, the tokens and phases below them, SVG and PNG.

A chart for the page is drawn once, in colours that stand for CSS variables: the page's style gives
them their values, so that one picture is right on a light and on a dark ground. A PNG takes the
values for a light ground.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402  (after the backend is chosen)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator  # noqa: E402

from data.files import open_atomically  # noqa: E402
from tools.outputs.files import PNG_METADATA  # noqa: E402
from tools.reporting.run_record import RunRecord  # noqa: E402
from tools.shared.number_text import length, short  # noqa: E402

# Variable -> (on a light ground, on a dark one). The series can be told apart with any colour
# vision (after Okabe and Ito); each has its own marker too.
COLORS = {
    "ink": ("#333333", "#d6d9de"),
    "muted": ("#6b6f76", "#9aa0a8"),
    "grid": ("#dcdfe3", "#343a43"),
    "ground": ("#ffffff", "#16191d"),
    "band-0": ("#eef3fa", "#1d2430"),
    "band-1": ("#fdf6ea", "#2a2720"),
    "raw": ("#a9c4e4", "#35587f"),
    "series-0": ("#0b5fa5", "#6cb6f5"),
    "series-1": ("#c8501d", "#ff9c5b"),
    "series-2": ("#00825f", "#45cfa3"),
    "series-3": ("#8f2d7a", "#e48bd0"),
    "series-4": ("#966f00", "#e8c54a"),
    "series-5": ("#3d8fb8", "#a8dcf7"),
    "series-6": ("#b5657f", "#f3b6c9"),
    "series-7": ("#4f5358", "#c3c7cc"),
    # For bars that have more parts than there are series.
    "part-0": ("#94979c", "#7d838b"),
    "part-1": ("#9fa8e8", "#5660b8"),
    "part-2": ("#e0a878", "#96602f"),
}
MARKERS = "os^Dv<>P"
SERIES = 8
POINTS = 800
"""Most points of a drawn line."""
NARROWEST = 0.06
"""Least share of the horizontal scale that a phase gets."""
RIGHT_MARGIN = 0.012
"""Share of the horizontal scale that stays free behind the last token, for the last marks."""
ROUND_STEPS = (1, 2, 2.5, 5, 10)
"""Distances between ticks, times a power of ten."""


def round_ticks(most: int) -> MaxNLocator:
    """Choose at most so many ticks, at numbers that people count in."""
    return MaxNLocator(most, steps=ROUND_STEPS)


@dataclass(frozen=True)
class Palette:
    """Map the names of COLORS to what matplotlib draws with."""

    colors: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.colors[name]

    def series(self, number: int) -> str:
        """Give the colour of a series; they repeat after SERIES."""
        return self.colors[f"series-{number % SERIES}"]


LIGHT = Palette({name: light for name, (light, _) in COLORS.items()})
VARIABLES = Palette({name: f"#0f0f{number:02x}" for number, name in enumerate(COLORS)})
"""Stand-ins, which `to_svg` writes as var(--name)."""


def style_rules() -> tuple[str, str]:
    """Declare the variables in CSS, for a light and for a dark ground."""
    light = "".join(f"--{name}:{value};" for name, (value, _) in COLORS.items())
    dark = "".join(f"--{name}:{value};" for name, (_, value) in COLORS.items())
    return light, dark


class TokenScale:
    """Map tokens to places from 0 to 1.

    Linear, unless that makes a phase narrower than NARROWEST: then it is linear within each phase,
    and the narrow ones get more than their share.
    """

    def __init__(self, run: RunRecord):
        phases = run.phases()
        self.knots = np.array([phases[0].begin, *(phase.end for phase in phases)], dtype=float)
        shares = np.diff(self.knots) / (self.knots[-1] - self.knots[0])
        least = min(NARROWEST, 0.5 / len(shares))
        self.is_stretched = bool((shares < least).any())
        if self.is_stretched:
            shares = np.maximum(shares, least)
        self.places = np.concatenate(([0.0], np.cumsum(shares / shares.sum())))
        # Behind its end the last phase goes on at its scale.
        self.far_knots = np.append(self.knots, 2 * self.knots[-1] - self.knots[-2])
        self.far_places = np.append(self.places, 2 * self.places[-1] - self.places[-2])

    def place(self, tokens):
        """Map a token count, or an array of them, to its place."""
        return np.interp(tokens, self.far_knots, self.far_places)

    def tokens(self, place):
        """Map a place, or an array of them, to its token count."""
        return np.interp(place, self.far_places, self.far_knots)

    def apply(self, axes: Axes) -> None:
        """Give the chart this horizontal scale, with few and readable ticks."""
        right = self.tokens(1 + RIGHT_MARGIN)
        axes.set_xlim(self.knots[0], right)
        axes.xaxis.set_major_locator(round_ticks(6))
        if self.is_stretched:
            axes.set_xscale(
                "function",
                functions=(self.place, self.tokens),
            )
            axes.set_xlim(self.knots[0], right)
            # Ticks at the ends of phases, from the right, where there is room for their text.
            shown = [self.knots[-1]]
            for knot in self.knots[-2::-1]:
                if self.place(shown[-1]) - self.place(knot) > 0.12:
                    shown.append(knot)
            axes.xaxis.set_major_locator(FixedLocator(shown))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(short))


def prepare(axes: Axes, run: RunRecord, palette: Palette, scale: TokenScale) -> None:
    """Draw the horizontal scale, the phases as bands behind the curves, and the grid."""
    scale.apply(axes)
    for number, phase in enumerate(run.phases()):
        axes.axvspan(
            phase.begin, phase.end, color=palette[f"band-{number % 2}"], linewidth=0, zorder=0
        )
        # A line where the phase before it ends.
        if number:
            axes.axvline(
                phase.begin, color=palette["muted"], linewidth=0.7, linestyle=(0, (4, 3)), zorder=1
            )
    clothe(axes, palette)


def clothe(axes: Axes, palette: Palette) -> None:
    """Give grid, frame and text the palette's colours."""
    axes.set_facecolor("none")
    axes.grid(color=palette["grid"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(palette["muted"])
    axes.tick_params(labelsize=9, color=palette["muted"], labelcolor=palette["ink"], which="both")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(palette["ink"])
        label.set_fontsize(10)


def label_phases(axes: Axes, run: RunRecord, palette: Palette, scale: TokenScale) -> int:
    """Write each phase's name above it, in as many rows as it takes that none touches another.

    Returns:
        The number of rows.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    # The charts' frames take about a seventh of the width.
    width = figure.get_size_inches()[0] * 0.86 / (1 + RIGHT_MARGIN)
    # Where the last text of each row ends, in inches.
    ends: list[float] = []
    for phase in run.phases():
        name = phase.name if len(phase.name) <= 24 else phase.name[:23] + "…"
        text = f"{name}, {length(phase.seq_length)}"
        # Half the width of the text at 10 points, in inches.
        half = 0.041 * len(text) + 0.06
        # Centred over the phase, but within the picture.
        middle = float(scale.place((phase.begin + phase.end) / 2)) * width
        center = min(max(middle, half), width - half)
        # The first row that is free there, or a new one.
        row = next((i for i, right in enumerate(ends) if center - half >= right), len(ends))
        ends[row : row + 1] = [center + half]
        axes.annotate(
            text,
            (center / width / (1 + RIGHT_MARGIN), 1),
            xycoords="axes fraction",
            xytext=(0, 5 + 14 * row),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=10,
            color=palette["ink"],
        )
    return len(ends)


def fit_scale(axes: Axes, values: Iterable[float]) -> None:
    """Fit the vertical scale to the finite values."""
    # A diverged run has infinities and NaN.
    shown = [value for value in values if math.isfinite(value)]
    if shown:
        low = min(shown)
        high = max(shown)
        margin = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)


# ---------------------------------------------------------------- values


def first_tenth(run: RunRecord) -> float:
    """Return the tokens at which a tenth of the run is over: its loss has fallen by then."""
    phases = run.phases()
    return phases[0].begin + 0.1 * (phases[-1].end - phases[0].begin)


def column(run: RunRecord, name: str, factor: float = 1.0) -> np.ndarray:
    """Collect a field of every step as floats; NaN where it is null or missing."""
    return np.array(
        [math.nan if (value := step.get(name)) is None else value * factor for step in run.steps]
    )


def running_median(run: RunRecord, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take the centred median of finite values within each phase: the curve without its spikes.

    Returns:
        (indices of at most `POINTS` values, their medians)
    """
    # Phase number p holds the steps [ends[p - 1], ends[p]).
    ends = np.searchsorted(
        [step["tokens"] for step in run.steps], [phase.end for phase in run.phases()], side="right"
    )
    centers = np.unique(
        np.linspace(0, len(values) - 1, min(POINTS, len(values))).round().astype(int)
    )
    finite = np.where(np.isfinite(values), values, np.nan)
    half = window_of(len(values)) // 2
    medians = []
    with warnings.catch_warnings():
        # A window without any finite value gives NaN, and numpy warns of it.
        warnings.simplefilter("ignore", RuntimeWarning)
        for i in centers:
            phase = int(np.searchsorted(ends, i, side="right"))
            first = ends[phase - 1] if phase else 0
            end = ends[phase]
            medians.append(np.nanmedian(finite[max(first, i - half) : min(end, i + half + 1)]))
    return centers, np.array(medians)


def window_of(steps: int) -> int:
    """Give the width of the running median in steps."""
    return max(1, steps // 50)


def thin(values: np.ndarray) -> np.ndarray:
    """Choose at most `POINTS` indices that keep the line's shape.

    The least and the greatest value of each part stay, so that spikes do.
    """
    if len(values) <= POINTS:
        return np.arange(len(values))
    kept = []
    for part in np.array_split(np.arange(len(values)), POINTS // 2):
        finite = part[np.isfinite(values[part])]
        if len(finite):
            kept += sorted(
                {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
            )
    return np.array(kept, dtype=int)


def distinct(tokens: list[int], scale: TokenScale) -> list[int]:
    """Leave out marks that would stand on top of another."""
    kept: dict[int, int] = {}
    for position in tokens:
        kept.setdefault(int(scale.place(position) * 300), position)
    return list(kept.values())


# ---------------------------------------------------------------- files


def new_figure(width: float, height: float) -> Figure:
    """Make a figure in inches that pyplot does not keep: nothing has to be closed."""
    return Figure(figsize=(width, height), layout="constrained")


def settings(salt: str = "report"):
    """Set up matplotlib for everything that is drawn: no name of a phase or a set is a formula."""
    return pyplot.rc_context(
        {
            "text.parse_math": False,
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "font.family": "sans-serif",
            "axes.unicode_minus": True,
        }
    )


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Write the figure as an <svg> element whose colours are CSS variables.

    Args:
        name: keeps the ids apart from those of other charts on the page.
        description: what a screen reader says; escaped here.
    """
    buffer = io.StringIO()
    with settings(name), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    # Only the element itself, without the XML head and comments.
    text = re.sub(
        r"<!--.*?-->\s*", "", buffer.getvalue()[buffer.getvalue().index("<svg") :], flags=re.DOTALL
    )
    # Stand-in colours become variables.
    for variable, stand_in in VARIABLES.colors.items():
        text = re.sub(rf"\b(fill|stroke|stop-color): {stand_in}\b", rf"\1: var(--{variable})", text)
    # Ids that something refers to get the chart's name in front; the others go.
    used = set(re.findall(r'(?:url\(|xlink:href=")#([\w.-]+)', text))
    text = re.sub(
        r' id="([\w.-]+)"',
        lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "",
        text,
    )
    text = re.sub(r'((?:url\(|xlink:href=")#)', rf"\1{name}-", text)
    # The page's own font.
    text = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 sans-serif", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    # The size comes from the page's style, and a screen reader reads the description.
    label = re.sub(r'[&<>"]', lambda found: f"&#{ord(found[0])};", description)
    opening = f'role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        lambda found: f"<svg {found[1]} {opening}",
        text,
        count=1,
    )


def to_png(figure: Figure, path: Path) -> None:
    """Write the picture, whole or not at all, with a note of who made it."""
    with open_atomically(path) as file, settings(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, dpi=130, format="png", metadata=PNG_METADATA)
