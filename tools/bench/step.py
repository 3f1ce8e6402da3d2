"""Tokens per second of one optimizer step against transformers, and against the step's own matrix
products.

One process on all cores. Contenders take the same weights, tokens and AdamW; their losses are
compared before anything is timed. See README.md for what each figure means.
"""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.attention_backends.choice import choose_attention
from pretrain.planner.model_size import step_flops
from tools.bench.contenders import (
    CHECKPOINTED,
    OURS,
    PEERS,
    THEIRS,
    VOCABULARY,
    Dtype,
    Ours,
    causal_pairs,
    check_losses,
    default_dtype,
    make_contender,
    make_sample,
    one_process,
    preset,
)
from tools.bench.fresh import KEEP_MEMORY, RETURN_MEMORY, measured, run_fresh, trim
from tools.bench.products import KINDS, Replay, TimedAttend, record
from tools.bench.report import (
    bar,
    bar_at_least,
    describe_machine,
    markdown_table,
    publish,
    usable_cores,
)

CPU = torch.device("cpu")
PLAIN_SIZE = 2048
"""Rows, columns and depth of the plain product."""
SHORT = 2048
LEAN_FROM = 8192
"""Tokens at which transformers must be left behind; from which memory counts, too."""
BARS = {
    "products": 1.25,
    "transformers": 1.0,
    "short": 1.3,
    "checkpointing": 1.3,
    "documents": 1.15,
}
RECOMPUTING = {"ours, selective": "selective", "ours, attention kept": "attention_kept"}
"""Contenders that keep less, and their levels of recompute. What is leaner still: memory.py."""


@dataclass(kw_only=True)
class Arguments:
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    """Tokens of the samples of one document."""
    packed: int = 8192
    """Tokens of the sample that is cut into --documents equal ones; 0 leaves it out."""
    documents: int = 16
    """Of that sample."""
    dtype: Dtype | None = None
    """Precision of forward and backward; by default bfloat16 where the device multiplies it in
    hardware."""
    autocast: bool = False
    """Run transformers in bfloat16 by torch.autocast over fp32 weights; by default its weights are
    bf16 copies."""
    repeats: int = 5
    """Timed steps of each contender; the median counts."""
    num_layers: int | None = None
    """Other than the tiny preset's 8, to try it out."""
    seed: int = 1234
    """Of weights and tokens."""
    output: str | None = None
    """File to append the result to, as Markdown."""


@dataclass(frozen=True)
class Shape:
    """One sample: the lengths of its documents."""

    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def squares(self) -> int:
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
    """One shape, each contender's figures."""

    shape: Shape
    seconds: dict[str, float]
    """Contender -> median seconds of a step."""
    own: dict[str, dict[str, float]]
    """Contender of ours -> median seconds of its products and of its attention kernels alone."""
    peaks: dict[str, int]
    """Contender -> bytes that its step takes above the built model and optimizer."""
    plain_gflops: float
    """Of a plain product."""
    loss: float
    """The first, on which all agree."""

    def over_own(self, name: str) -> float:
        return self.seconds[name] / sum(self.own[name].values())


def show_tokens(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def run(arguments: Arguments) -> int:
    """Measure every shape and publish the result; 0, or 1 where contenders disagree or fail, or
    2."""
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    dtype = arguments.dtype or default_dtype(CPU)
    machine = describe_machine(["transformers"])
    shapes = [Shape((length,)) for length in arguments.lengths]
    if arguments.packed:
        shapes.append(Shape((arguments.packed // arguments.documents,) * arguments.documents))
    rows = []
    try:
        for shape in shapes:
            print(f"{shape} ...", file=sys.stderr, flush=True)
            rows.append(measure(shape, contenders_of(shape, arguments), dtype, arguments))
        share = measure_documents(dtype, arguments) if arguments.packed else None
    except RuntimeError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    publish(describe(rows, share, machine, dtype, arguments), arguments.output)
    return 0


def find_problem(arguments: Arguments) -> str | None:
    """Why the benchmark cannot run, with a fix, or None."""
    if arguments.repeats < 1:
        return f"--repeats {arguments.repeats}: too few. Fix: at least 1."
    if not arguments.lengths or min(arguments.lengths) < 2:
        return f"--lengths {arguments.lengths}: a document needs 2 tokens. Fix: at least one length of 2 or more."
    if arguments.packed and (
        arguments.documents < 2
        or arguments.packed % arguments.documents
        or arguments.packed < 2 * arguments.documents
    ):
        return (
            f"--packed {arguments.packed} --documents {arguments.documents}: not equal documents of 2 tokens or "
            "more. Fix: a multiple of the documents, and at least 2 of them."
        )
    return None


def contenders_of(shape: Shape, arguments: Arguments) -> dict[str, dict]:
    """Contender -> its settings of ModelConfig."""
    found: dict[str, dict] = {OURS: {}}
    if len(shape.lengths) == 1 and shape.tokens >= LEAN_FROM:
        found |= {name: {"recompute_granularity": level} for name, level in RECOMPUTING.items()}
    if arguments.num_layers:
        found = {
            name: settings | {"num_layers": arguments.num_layers}
            for name, settings in found.items()
        }
    changed = {"num_layers": arguments.num_layers} if arguments.num_layers else {}
    return found | {THEIRS: changed, CHECKPOINTED: changed}


def measure(shape: Shape, settings: dict[str, dict], dtype: Dtype, arguments: Arguments) -> Row:
    """One row: times with the contenders in turns, then the peak of each in a process of its
    own."""
    common = {
        "lengths": list(shape.lengths),
        "dtype": dtype,
        "seed": arguments.seed,
        "autocast": arguments.autocast,
    }
    timed = run_fresh(
        time_steps,
        usable_cores(),
        environment=KEEP_MEMORY,
        settings=settings,
        repeats=arguments.repeats,
        **common,
    )
    print(timed, file=sys.stderr, flush=True)
    peaks = {
        name: run_fresh(
            peak_of_step,
            usable_cores(),
            environment=RETURN_MEMORY,
            name=name,
            changes=changes,
            **common,
        )["above_bytes"]
        for name, changes in settings.items()
    }
    median = statistics.median
    return Row(
        shape,
        {name: median(times) for name, times in timed["seconds"].items()},
        {
            name: {kind: median(times) for kind, times in kinds.items()}
            for name, kinds in timed["own"].items()
        },
        peaks,
        median(timed["plain_gflops"]),
        timed["loss"],
    )


# ---- in a process of their own ----


def time_steps(
    settings: dict[str, dict],
    lengths: list[int],
    dtype: Dtype,
    repeats: int,
    seed: int,
    autocast: bool = False,
) -> dict:
    """Seconds of every repeat: of each contender's step, of our own products and attention, of the
    plain product.

    In each round everything runs once, in an order that turns from round to round.

    Raises:
        ValueError: losses differ.
    """
    with one_process() as layout:
        sample = make_sample(lengths, VOCABULARY, seed)
        contenders = {
            name: make_contender(
                name, preset("tiny", **changes), VOCABULARY, dtype, layout, seed, autocast=autocast
            )
            for name, changes in settings.items()
        }
        losses = check_losses(contenders, sample)
        replays = {
            name: Replay(record(lambda contender=contender: contender.step(sample)))
            for name, contender in contenders.items()
            if name not in PEERS
        }
        plain = PlainProduct(PLAIN_SIZE, dtype)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        own: dict[str, dict[str, list[float]]] = {
            name: {kind: [] for kind in KINDS} for name in replays
        }
        rates: list[float] = []
        for replay in replays.values():
            replay.run()
        plain.gflops()

        def time_one(name: str) -> None:
            seconds[name].append(seconds_of(lambda: contenders[name].step(sample)))

        def replay_one(name: str) -> None:
            for kind, found in replays[name].run().items():
                own[name][kind].append(found)

        in_turns(
            [
                *(lambda name=name: time_one(name) for name in contenders),
                *(lambda name=name: replay_one(name) for name in replays),
                lambda: rates.append(plain.gflops()),
            ],
            repeats,
        )
    return {"seconds": seconds, "own": own, "plain_gflops": rates, "loss": losses[OURS][0]}


def in_turns(tasks: list[Callable[[], None]], rounds: int) -> None:
    """Every task once a round, in an order that turns from round to round, without the garbage
    collector."""
    for number in range(rounds):
        for task in tasks[:: -1 if number % 2 else 1]:
            gc.collect()
            gc.disable()
            task()
            gc.enable()


def seconds_of(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


class PlainProduct:
    """A square matrix product: what the cores reach without anything around it."""

    def __init__(self, size: int, dtype: Dtype):
        generator = torch.Generator().manual_seed(0)
        self.size = size
        self.left, self.right = (
            torch.randn(size, size, generator=generator).to(getattr(torch, dtype)) for _ in range(2)
        )
        self.out = torch.empty_like(self.left)

    def gflops(self) -> float:
        return (
            2
            * self.size**3
            / seconds_of(lambda: torch.mm(self.left, self.right, out=self.out))
            / 1e9
        )


def peak_of_step(
    name: str, changes: dict, lengths: list[int], dtype: Dtype, seed: int, autocast: bool = False
) -> dict:
    """Seconds and peak of one step above the built model and optimizer, after a step on a few
    tokens."""
    with one_process() as layout:
        contender = make_contender(
            name, preset("tiny", **changes), VOCABULARY, dtype, layout, seed, autocast=autocast
        )
        contender.step(make_sample([64], VOCABULARY, seed))
        sample = make_sample(lengths, VOCABULARY, seed)
        trim()
        with measured() as found:
            contender.step(sample)
    return found


def attention_times(
    shapes: list[list[int]], changes: dict, dtype: Dtype, repeats: int, seed: int
) -> dict:
    """Seconds inside `attend`, forward and backward, of every repeat of our step on each of the
    shapes, in turns."""
    with one_process() as layout:
        config = preset("tiny", **changes)
        attend, _ = choose_attention(config.attention_backend, CPU, getattr(torch, dtype))
        timer = TimedAttend(attend, CPU)
        ours = Ours(config, VOCABULARY, dtype, layout, seed, timer)
        samples = [make_sample(lengths, VOCABULARY, seed) for lengths in shapes]
        seconds: list[list[float]] = [[] for _ in shapes]

        def time_one(place: int) -> None:
            with timer.counting() as found:
                ours.step(samples[place])
            seconds[place] += found

        in_turns([lambda place=place: time_one(place) for place in range(len(shapes))], repeats + 1)
    return {"seconds": [times[1:] for times in seconds]}  # the first warmed up


# ---- the report ----


@dataclass(frozen=True)
class Share:
    """Attention of many documents beside that of one with as many tokens."""

    packed: Shape
    whole: Shape
    packed_seconds: float
    whole_seconds: float

    @property
    def predicted(self) -> float:
        return self.packed.squares / self.whole.squares

    @property
    def measured(self) -> float:
        return self.packed_seconds / self.whole_seconds


def measure_documents(dtype: Dtype, arguments: Arguments) -> Share:
    """The attention's time in the packed sample, and in one document of as many tokens."""
    packed = Shape((arguments.packed // arguments.documents,) * arguments.documents)
    whole = Shape((arguments.packed,))
    found = run_fresh(
        attention_times,
        usable_cores(),
        environment=KEEP_MEMORY,
        shapes=[list(packed.lengths), list(whole.lengths)],
        dtype=dtype,
        repeats=arguments.repeats,
        changes={"num_layers": arguments.num_layers} if arguments.num_layers else {},
        seed=arguments.seed,
    )["seconds"]
    return Share(packed, whole, *(statistics.median(times) for times in found))


def describe(
    rows: list[Row], share: Share | None, machine: str, dtype: Dtype, arguments: Arguments
) -> str:
    """The whole result as Markdown."""
    config = preset(
        "tiny", **({"num_layers": arguments.num_layers} if arguments.num_layers else {})
    )
    why = (
        "asked for"
        if arguments.dtype
        else (
            "this CPU multiplies it in hardware"
            if dtype == "bfloat16"
            else "this CPU has no bf16 units"
        )
    )
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
        f"tiny preset ({config.num_layers} layers, vocabulary {VOCABULARY:,}), one process on {usable_cores()} cores, "
        f"{dtype} ({why}{f'; transformers: {peers_way}' if dtype == 'bfloat16' else ''}), sdpa; forward, backward, "
        f"clip, fused AdamW. Medians of {arguments.repeats} steps in turns. Model GFLOP/s: the causal half of the "
        "attention, no recompute. Peak: resident memory of one step above the built model and optimizer, in a process "
        "of its own. Alone: the step's own matrix products and attention kernels, recompute included, at the same "
        "shapes.",
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


def table(rows: list[Row], config) -> str:
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
        flops = step_flops(config, VOCABULARY, row.shape.tokens, causal_pairs(row.shape.lengths))
        for name, seconds in row.seconds.items():
            own = row.own.get(name)
            lines.append(
                [
                    str(row.shape),
                    name,
                    f"{seconds:.3f}",
                    f"{row.shape.tokens / seconds:,.0f}",
                    f"{flops / seconds / 1e9:.0f}",
                    f"{row.plain_gflops:.0f}",
                    f"{row.peaks[name] / 2**20:.0f}",
                    *(
                        [
                            f"{own['products']:.3f}",
                            f"{own['attention']:.3f}",
                            f"{row.over_own(name):.3f}",
                        ]
                        if own
                        else ["", "", ""]
                    ),
                ]
            )
    return markdown_table(header, lines)


def bars_of(row: Row) -> list[str]:
    """The lines of one shape."""
    shape = row.shape
    seconds = row.seconds
    lines = [bar(f"{shape}: step / (products + attention)", row.over_own(OURS), BARS["products"])]
    limit = BARS["short"] if shape.tokens == SHORT else BARS["transformers"]
    lines.append(
        bar_at_least(
            f"{shape}: times transformers' tokens/s", seconds[THEIRS] / seconds[OURS], limit
        )
    )
    if len(shape.lengths) > 1 or shape.tokens < LEAN_FROM:
        return lines
    allowed = row.peaks[CHECKPOINTED]
    fitting = [name for name in row.own if row.peaks[name] <= allowed]
    if not fitting:
        least = min(row.own, key=row.peaks.get)
        return [
            *lines,
            f"- {shape}: transformers with checkpointing takes {allowed / 2**20:.0f} MiB, {least} "
            f"{row.peaks[least] / 2**20:.0f} MiB: NOT reached",
        ]
    best = min(fitting, key=seconds.get)
    return [
        *lines,
        bar_at_least(
            f"{shape}: times the tokens/s of transformers with checkpointing, in no more memory "
            f"({best})",
            seconds[CHECKPOINTED] / seconds[best],
            BARS["checkpointing"],
        ),
    ]
