"""Describe the result of the step benchmark: its table and bars, as Markdown."""

import os
from dataclasses import dataclass

from data.stream import usable_cores
from model.config import ModelConfig
from pretrain.planner.model_size import ModelSize
from tools.bench.contenders import (
    CHECKPOINTED,
    OURS,
    THEIRS,
    VOCABULARY,
    Dtype,
    causal_pairs,
    preset,
)
from tools.bench.report import bar, bar_at_least, markdown_table
from tools.bench.step_arguments import Arguments, FreedMemory, show_tokens

LEAN_FROM = 8192
"""Tokens from which memory counts, too."""
BARS = {
    "products": 1.25,
    "transformers": 1.0,
    "checkpointing": 1.3,
    "documents": 1.15,
}

FREED_MEMORY: dict[FreedMemory, str] = {
    "glibc": "freed memory left to glibc's own rule",
    "kept": "freed memory kept for the process",
}
"""How the report names the choices of --freed-memory."""


@dataclass(frozen=True)
class Shape:
    """Describe a sample by the lengths of its documents."""

    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the sample."""
        return sum(self.lengths)

    @property
    def squares(self) -> int:
        """Sum of the squared lengths: the work of attention."""
        return sum(length**2 for length in self.lengths)

    def __str__(self) -> str:
        whole = show_tokens(self.tokens)
        return (
            whole
            if len(self.lengths) == 1
            else f"{whole} as {len(self.lengths)} x {show_tokens(self.lengths[0])}"
        )


@dataclass(frozen=True)
class Row:
    """Hold each contender's figures on one shape."""

    shape: Shape
    seconds: dict[str, float]
    """Contender -> median seconds of a step."""
    own: dict[str, dict[str, float]]
    """Contender of ours -> median seconds of its products and of its attention kernels alone."""
    peaks: dict[str, int]
    """Contender -> bytes that its step takes above the built model and optimizer."""
    plain_gflops: float
    """Rate of a plain product."""
    loss: float
    """First loss, on which all agree."""

    def over_own(self, name: str) -> float:
        """Divide a step's time by that of its products and attention alone."""
        return self.seconds[name] / sum(self.own[name].values())


@dataclass(frozen=True)
class Share:
    """Compare the attention of many documents with that of one of as many tokens."""

    packed: Shape
    whole: Shape
    packed_seconds: float
    whole_seconds: float

    @property
    def predicted(self) -> float:
        """Share by the sum of squared lengths."""
        return self.packed.squares / self.whole.squares

    @property
    def measured(self) -> float:
        """Share by time."""
        return self.packed_seconds / self.whole_seconds


def describe(
    rows: list[Row], share: Share | None, machine: str, dtype: Dtype, arguments: Arguments
) -> str:
    """Describe the whole result as Markdown."""
    # The model that was measured.
    config = preset(
        "tiny", **({"num_layers": arguments.num_layers} if arguments.num_layers else {})
    )
    # Say how the precision was chosen.
    if arguments.dtype:
        why = "asked for"
    elif dtype == "bfloat16":
        why = "this CPU multiplies it in hardware"
    else:
        why = "this CPU has no bf16 units"
    peers_way = (
        "torch.autocast over fp32 weights"
        if arguments.autocast
        else "bf16 weights beside fp32 masters"
    )
    lines = [
        "## Training step against transformers",
        "",
        machine,
        "",
        f"tiny preset ({config.num_layers} layers, vocabulary {VOCABULARY:,}), each contender in a "
        f"process of its own on {usable_cores()} cores, "
        f"{dtype} ({why}{f'; transformers: {peers_way}' if dtype == 'bfloat16' else ''}), sdpa; "
        f"forward, backward, clip, fused AdamW. Medians of {arguments.repeats} steps in turns, "
        f"{FREED_MEMORY[arguments.freed_memory]}. "
        "Model GFLOP/s: the causal half of the attention, no recompute. Peak: resident memory of "
        "one step above the built model and optimizer, in a further process. Alone: the step's own "
        "matrix products and attention kernels, recompute included, at the same shapes, in a "
        "process without a contender.",
        "",
        table(rows, config),
        "",
    ]
    for row in rows:
        lines += bars_of(row)
    if share is not None:
        lines.append(
            bar(
                f"{share.packed}: attention {share.packed_seconds * 1e3:.0f} ms, of one document "
                f"{share.whole_seconds * 1e3:.0f} ms; its share / the share of the sum of squares "
                f"({share.predicted:.4f})",
                share.measured / share.predicted,
                BARS["documents"],
            )
        )
    lines.append(f"- load at the end: {os.getloadavg()[0]:.1f}")
    if arguments.num_layers:
        lines.append("- the bars are set for 8 layers")
    return "\n".join(lines)


def table(rows: list[Row], config: ModelConfig) -> str:
    """Show a line per shape and contender."""
    header = [
        "tokens",
        "contender",
        "s/step",
        "tokens/s",
        "GFLOP/s",
        "a plain product",
        "peak MiB",
        "products alone s",
        "attention alone s",
        "step / alone",
    ]
    lines = []
    for row in rows:
        pairs = causal_pairs(row.shape.lengths)
        flops = ModelSize(config, VOCABULARY).step_flops(row.shape.tokens, pairs)
        for name, seconds in row.seconds.items():
            # Peers' products are not recorded.
            alone = ["", "", ""]
            if own := row.own.get(name):
                times = (own["products"], own["attention"], row.over_own(name))
                alone = [f"{figure:.3f}" for figure in times]
            lines.append(
                [
                    str(row.shape),
                    name,
                    f"{seconds:.3f}",
                    f"{row.shape.tokens / seconds:,.0f}",
                    f"{flops / seconds / 1e9:.0f}",
                    f"{row.plain_gflops:.0f}",
                    f"{row.peaks[name] / 2**20:.0f}",
                    *alone,
                ]
            )
    return markdown_table(header, lines)


def bars_of(row: Row) -> list[str]:
    """Judge one shape, a line per bar."""
    shape = row.shape
    seconds = row.seconds
    lines = [bar(f"{shape}: step / (products + attention)", row.over_own(OURS), BARS["products"])]
    lines.append(
        bar_at_least(
            f"{shape}: times transformers' tokens/s",
            seconds[THEIRS] / seconds[OURS],
            BARS["transformers"],
        )
    )
    # Short samples and packed ones have no memory bar.
    if len(shape.lengths) > 1 or shape.tokens < LEAN_FROM:
        return lines
    # Of our modes, those that take no more memory than transformers with checkpointing.
    allowed = row.peaks[CHECKPOINTED]
    fitting = [name for name in row.own if row.peaks[name] <= allowed]
    # No mode fits: the bar is missed, whatever the times.
    if not fitting:
        least = min(row.own, key=row.peaks.__getitem__)
        return [
            *lines,
            f"- {shape}: transformers with checkpointing takes {allowed / 2**20:.0f} MiB, {least} "
            f"{row.peaks[least] / 2**20:.0f} MiB: NOT reached",
        ]
    best = min(fitting, key=seconds.__getitem__)
    return [
        *lines,
        bar_at_least(
            f"{shape}: times the tokens/s of transformers with checkpointing, in no more memory "
            f"({best})",
            seconds[CHECKPOINTED] / seconds[best],
            BARS["checkpointing"],
        ),
    ]
