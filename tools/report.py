"""Plot a run: `python -m tools.report --load DIR [--output FILE.png]`.

Reads DIR/metrics.jsonl (a line per step) and DIR/validation.jsonl; writes one picture (loss over tokens with its
phases, throughput, learning rate) and prints the run in a few lines.
"""

import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402  (after the backend is chosen)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: E402

PHASE_COLORS = ("#eef3fa", "#fdf3e3", "#eaf5ea", "#f7ecf6", "#f3f3f0", "#e8f5f6")
LOSS, SMOOTH, VALIDATION, RATE, LEARNING = "#9db8d9", "#1f4e8c", "#c8401d", "#2f7d4f", "#7a4ea3"
MARKERS = "os^Dv<>P"


@dataclass(kw_only=True)
class Arguments:
    load: str
    """Folder of a run's checkpoints (its --save), with metrics.jsonl in it."""
    output: str | None = None
    """PNG file to write; by default loss.png in that folder."""


@dataclass(frozen=True)
class Run:
    """What a run wrote about itself, in the order of its clock."""

    steps: list[dict]
    evaluations: list[dict]

    def validation_sets(self) -> dict[str, list[dict]]:
        """Name of each validation set -> its evaluations, in order."""
        sets: dict[str, list[dict]] = {}
        for evaluation in self.evaluations:
            sets.setdefault(evaluation.get("set", "valid"), []).append(evaluation)
        return sets

    def phases(self) -> list[tuple[str, int, int, int]]:
        """(name, sequence length, first position, end) of each stretch with one phase; positions in tokens."""
        stretches: list[list] = []
        begin = 0
        for step in self.steps:
            key = [step["phase"], step["seq_length"]]
            if not stretches or stretches[-1][:2] != key:
                stretches.append([*key, begin, step["tokens"]])
            stretches[-1][3] = begin = step["tokens"]
        return [tuple(stretch) for stretch in stretches]


def read_lines(path: Path) -> list[dict]:
    """The records of a .jsonl file; a last line that is still being written is left out.

    Raises:
        ValueError: the file is broken in the middle.
    """
    texts = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, text in enumerate(texts, 1):
        try:
            records.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise ValueError(f"{path}: line {number} is not JSON ({error}). Fix: remove that line.") from None
    return records


def read_run(folder: Path) -> Run:
    """Raises ValueError if there is no run in `folder`, or nothing to draw yet."""
    metrics, validation = folder / "metrics.jsonl", folder / "validation.jsonl"
    if not metrics.is_file():
        raise ValueError(f"load = {folder}: no metrics.jsonl in it. Fix: give the --save folder of a run.")
    steps = read_lines(metrics)
    evaluations = read_lines(validation) if validation.is_file() else []
    evaluations = [record for record in evaluations if record.get("kind", "loss") == "loss"]
    if not steps:
        raise ValueError(f"load = {folder}: metrics.jsonl holds no step yet. Fix: train one.")
    needed = ("step", "tokens", "phase", "seq_length", "loss", "lr", "tokens_per_second")
    for record in steps:
        if missing := [name for name in needed if name not in record]:
            raise ValueError(f"{metrics}: step {record.get('step', '?')} has no {', '.join(missing)}. "
                             "Fix: give a file that this trainer wrote.")
    return Run(sorted(steps, key=lambda r: r["tokens"]), sorted(evaluations, key=lambda r: r["tokens"]))


def smooth(values: list[float], window: int) -> list[float]:
    """Centered running median: follows the curve, not the spikes."""
    half = window // 2
    finite = [value if value is not None else float("nan") for value in values]
    result = []
    for i in range(len(finite)):
        near = [v for v in finite[max(0, i - half):i + half + 1] if v == v]
        result.append(statistics.median(near) if near else float("nan"))
    return result


def short(number: float, _=None) -> str:
    """1500 -> "1.5K"."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def length(tokens: int) -> str:
    """8192 -> "8Ki", 1000 -> "1,000"."""
    if tokens >= 2**20 and tokens % 2**20 == 0:
        return f"{tokens // 2**20}Mi"
    return f"{tokens // 1024}Ki" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"


def draw(run: Run, title: str) -> Figure:
    """The whole picture."""
    tokens = [step["tokens"] for step in run.steps]
    figure, (loss, rate, learning) = pyplot.subplots(
        3, 1, figsize=(11, 8.5), sharex=True, height_ratios=(4, 1.2, 1.2), layout="constrained")
    _draw_loss(loss, run, tokens)
    speeds = [step["tokens_per_second"] for step in run.steps]
    rate.plot(tokens, speeds, ".", markersize=3, color=RATE, alpha=0.35)
    rate.plot(tokens, smooth(speeds, _window(len(tokens))), color=RATE)
    rate.set_ylabel("tokens / s")
    rate.set_ylim(bottom=0)
    learning.plot(tokens, [step["lr"] for step in run.steps], color=LEARNING)
    learning.set_ylabel("learning rate")
    learning.set_ylim(bottom=0)
    learning.set_xlabel("tokens (positions consumed)")
    for axes in (loss, rate, learning):
        for i, (_, _, begin, end) in enumerate(run.phases()):
            axes.axvspan(begin, end, color=PHASE_COLORS[i % len(PHASE_COLORS)], linewidth=0, zorder=0)
        axes.grid(color="#d8d8d8", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=10)
        axes.yaxis.label.set_size(11)
        axes.yaxis.set_major_locator(MaxNLocator(6 if axes is loss else 3))
    rate.yaxis.set_major_formatter(FuncFormatter(short))
    learning.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
    learning.xaxis.set_major_formatter(FuncFormatter(short))
    loss.set_xlim(0, tokens[-1])
    _label_phases(loss, run)
    figure.suptitle(title, fontsize=13)
    figure.align_ylabels()
    return figure


def _window(steps: int) -> int:
    return max(1, steps // 50)


def _draw_loss(axes: Axes, run: Run, tokens: list[int]) -> None:
    losses = [step["loss"] for step in run.steps]
    smoothed = smooth(losses, _window(len(losses)))
    if _window(len(losses)) > 1:
        axes.plot(tokens, losses, color=LOSS, linewidth=0.8, label="training, each step")
        axes.plot(tokens, smoothed, color=SMOOTH, linewidth=1.8, label="training, running median")
    else:
        axes.plot(tokens, losses, color=SMOOTH, linewidth=1.8, label="training")
    for number, (name, evaluations) in enumerate(run.validation_sets().items()):
        axes.plot([e["tokens"] for e in evaluations], [e["valid_loss"] for e in evaluations],
                  MARKERS[number % len(MARKERS)], color=VALIDATION, markersize=6, markeredgecolor="white", zorder=5,
                  label="validation" if name == "valid" else f"validation: {name}", clip_on=False)
    skipped = [step["tokens"] for step in run.steps if step.get("skipped")]
    if skipped:
        axes.plot(skipped, [0.015] * len(skipped), "x", color="black", transform=axes.get_xaxis_transform(),
                  label="skipped step", clip_on=False)
    axes.set_ylabel("loss (nats per token)")
    # A spike of one step may leave the picture, the curve may not.
    shown = [v for v in smoothed + [e["valid_loss"] for e in run.evaluations] if v == v and abs(v) != float("inf")]
    if shown:
        low, high = min(shown), max(shown)
        margin = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
    axes.legend(fontsize=10, framealpha=0.9, loc="upper right")


def _label_phases(axes: Axes, run: Run) -> None:
    """Names over the picture, each above its phase; in as many rows as it takes that none touches another."""
    width = axes.figure.get_size_inches()[0] * 0.88  # inches of the x axis, about
    total = axes.get_xlim()[1]
    ends: list[float] = []  # of each row, in inches
    for name, seq_length, begin, end in run.phases():
        text = f"{name}, {length(seq_length)}"
        half = 0.04 * len(text) + 0.06  # inches, at 10 points
        center = min(max((begin + end) / 2 / total * width, half), width - half)
        row = next((i for i, right in enumerate(ends) if center - half >= right), len(ends))
        ends[row:row + 1] = [center + half]
        if begin:
            axes.axvline(begin, color="#909090", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(text, (center / width, 1), xycoords="axes fraction", xytext=(0, 5 + 14 * row),
                      textcoords="offset points", ha="center", va="bottom", fontsize=10, color="#404040")


def summary(run: Run) -> str:
    """The run in a few lines of text."""
    last = run.steps[-1]
    lines = [f"{last['step']:,} steps, {short(last['tokens'])} tokens, training loss {run.steps[0]['loss']:.4f} -> "
             f"{last['loss']:.4f}"]
    for name, evaluations in run.validation_sets().items():
        first, final = evaluations[0], evaluations[-1]
        of_set = "" if name == "valid" else f" of {name}"
        lines.append(f"validation loss{of_set} {first['valid_loss']:.4f} (step {first['step']:,}) -> "
                     f"{final['valid_loss']:.4f} (step {final['step']:,})")
    for name, seq_length, begin, end in run.phases():
        speeds = [s["tokens_per_second"] for s in run.steps if begin < s["tokens"] <= end]
        lines.append(f"phase {name}: length {seq_length:,}, {short(end - begin)} tokens, "
                     f"{short(statistics.median(speeds))} tokens/s")
    return "\n".join(lines)


def main() -> int:
    arguments = tyro.cli(Arguments, prog="tools.report", description=__doc__)
    folder = Path(arguments.load)
    output = Path(arguments.output) if arguments.output else folder / "loss.png"
    try:
        if output.suffix.lower() != ".png":
            raise ValueError(f"output = {output}: only .png is written. Fix: end the name in .png.")
        run = read_run(folder)
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".{output.name}.{os.getpid()}")
        figure = draw(run, f"{folder.resolve().parent.name} / {folder.resolve().name}")
        figure.savefig(temporary, dpi=130, format="png")
        os.replace(temporary, output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(run))
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
