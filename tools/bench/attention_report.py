"""Describe the result of the attention benchmark: its tables and bars, as Markdown."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tools.bench.report import bar, markdown_table

OURS = "ours"


THEIRS = "DeepSpeed"


REPEATED = "DeepSpeed, K/V repeated first"


ATTENTION = "attention"


ADDITION = "addition"


BARS = {"all": 1.0, "worst": 1.1, "grouped": 0.8}


@dataclass(frozen=True)
class Shape:
    """One attention layer over one document of `tokens` tokens."""

    tokens: int
    heads: int
    kv_heads: int
    head_size: int = 64

    @property
    def grouped(self) -> bool:
        return self.kv_heads < self.heads

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.heads} heads, {self.kv_heads} kv"


SHAPES = (
    Shape(2048, 8, 8),
    Shape(2048, 16, 16),
    Shape(1024, 32, 32),
    Shape(2048, 8, 4),
    Shape(2048, 16, 4),
    Shape(1024, 32, 8),
    Shape(2048, 8, 1),
)
"""Head counts of models from 0.1B to 8B parameters, at lengths that two cores attend over in a
second: the whole benchmark then takes about four minutes there."""


@dataclass(frozen=True)
class Result:
    """One row: a shape on a number of processes, with what each contender took and sent."""

    processes: int
    kernel: str
    shape: Shape
    seconds: dict[str, float]
    """Contender -> median over the repeats of the slowest rank's time of one forward and
    backward."""
    sent: dict[str, int]
    """Contender -> bytes that a rank sends to other ranks in them, of the rank that sends most."""


def describe(results: list[Result], machine: str, repeats: int) -> str:
    """Describe the whole result as Markdown: attention, then the exchange alone."""
    attention = [row for row in results if row.kernel == ATTENTION]
    addition = [row for row in results if row.kernel == ADDITION]
    # Fewer key/value heads than query heads: where DeepSpeed may send more than it needs.
    grouped = [row for row in attention if row.shape.grouped]
    grouped_addition = [row for row in addition if row.shape.grouped]
    # No single shape may be far behind.
    worst = max(attention, key=ratio)
    # Geometric: each shape counts alike.
    means = math.exp(statistics.fmean(math.log(ratio(row)) for row in attention))
    return "\n".join(
        [
            "## Ulysses attention, forward and backward, against DeepSpeed",
            "",
            machine,
            "",
            f"gloo, fp32, head size {SHAPES[0].head_size}, one document, processes x threads = "
            "cores where cores suffice; "
            f"medians of {repeats} repeats in turns, each as long as its slowest rank; freed "
            "memory stays with "
            "the process, as with torch's allocator on a GPU. MiB: sent by a rank to "
            "others in forward and backward.",
            "DeepSpeed takes fewer key/value heads than query heads as they are (fewer than "
            "processes: repeated to "
            "their number); where the last three columns are filled, K/V were also repeated to the "
            "query heads before "
            "its exchange, as Megatron-DeepSpeed does.",
            "",
            table(attention),
            "",
            bar(
                "all shapes together, sum of medians ours / DeepSpeed",
                together(attention),
                BARS["all"],
            ),
            bar(
                f"worst shape ({worst.processes} processes, {worst.shape})",
                ratio(worst),
                BARS["worst"],
            ),
            bar("shapes with grouped heads, sum of medians", together(grouped), BARS["grouped"]),
            f"- geometric mean of the ratios: {means:.3f}",
            "- shapes with grouped heads, against DeepSpeed with K/V repeated first: "
            f"{together(grouped, REPEATED):.3f}",
            "",
            "The exchange alone (an addition in the place of the attention, where both spend most "
            "of the time):",
            "",
            table(addition),
            "",
            bar("all shapes together", together(addition), BARS["all"]),
            bar("shapes with grouped heads", together(grouped_addition), BARS["grouped"]),
            bar(
                "shapes with grouped heads, against DeepSpeed with K/V repeated first",
                together(grouped_addition, REPEATED),
                BARS["grouped"],
            ),
        ]
    )


def ratio(row: Result, peer: str = THEIRS) -> float:
    """Divide our time by the peer's, on one shape."""
    return row.seconds[OURS] / row.seconds[peer]


def together(rows: Sequence[Result], peer: str = THEIRS) -> float:
    """Divide the sum of our medians by that of the peer's."""
    return sum(row.seconds[OURS] for row in rows) / sum(row.seconds[peer] for row in rows)


def table(rows: Sequence[Result]) -> str:
    """Show a line per shape and process count."""
    header = [
        "processes",
        "tokens",
        "heads",
        "kv",
        "ours ms",
        "MiB",
        "DeepSpeed ms",
        "MiB",
        "ratio",
        "repeated first ms",
        "MiB",
        "ratio",
    ]
    lines = []
    for row in rows:
        shape = row.shape
        line = [
            str(number) for number in (row.processes, shape.tokens, shape.heads, shape.kv_heads)
        ]
        for name in (OURS, THEIRS, REPEATED):
            # Only grouped heads have the third contender.
            known = name in row.seconds
            line += (
                [f"{row.seconds[name] * 1e3:.1f}", f"{row.sent[name] / 2**20:.2f}"]
                if known
                else ["", ""]
            )
            line += [f"{ratio(row, name):.3f}" if known else ""] if name != OURS else []
        lines.append(line)
    return markdown_table(header, lines)
