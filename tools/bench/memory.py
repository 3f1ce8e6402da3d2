"""Measure the peak memory of one forward and backward over sequence length, rung by rung.

Transformers and ALST's parts are measured beside our rungs.

Every rung at every length runs in fresh processes, on the same weights and tokens; losses are
compared. See README.md for what each figure means.
"""

import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data.stream import usable_cores
from model.config import ModelConfig
from tools.bench.contenders import (
    ALST,
    CHECKPOINTED,
    LOSS_CHUNK,
    THEIRS,
    VOCABULARY,
    Dtype,
    default_dtype,
    lean,
    make_sample,
    one_process,
    preset,
)
from tools.bench.fresh import RETURN_MEMORY, measured, run_fresh, trim
from tools.bench.memory_cells import MIB, Cell, label
from tools.bench.memory_plot import draw
from tools.bench.option_checks import find_too_small
from tools.bench.peers import LOSS_TOLERANCES, PEERS, make_contender
from tools.bench.report import bar, describe_machine, markdown_table, publish
from tools.bench.step_arguments import show_tokens

BARS = {CHECKPOINTED: 0.25, ALST: 0.8}
BAR_TOKENS = 65536
"""Length for which the bars are set."""
NOT_ON_CPU = "n/a on CPU"
MLP_TILE = 512
"""Tokens in a tile of our tiled MLP; twice as many as in ALST's on this model."""
NOT_CHUNKED = 2**30
"""A chunk of the loss that holds every sample."""


@dataclass(frozen=True)
class Rung:
    """Describe a rung of the ladder: what it adds to the settings of those below it."""

    name: str
    adds: tuple[str, ...]
    """Memory settings that it adds, with the values of `lean`."""
    only: tuple[tuple[str, str | int], ...] = ()
    """Fields and values that hold for this rung alone."""
    gpu_only: bool = False


LADDER = (
    Rung("baseline", (), (("loss_chunk_tokens", NOT_CHUNKED),)),
    Rung("+ chunked loss", ("loss_chunk_tokens",)),
    Rung("+ tiled MLP", ("mlp_tiles",)),
    Rung("+ full recompute", (), (("recompute_granularity", "full"),)),
    Rung("+ head chunks", ("attention_head_chunks",)),
    Rung("+ attention kept", ("recompute_granularity",)),
    Rung("+ offload", ("cpu_offloading_num_layers",), gpu_only=True),
)
PEER_NAMES = (THEIRS, CHECKPOINTED, ALST)


@dataclass(kw_only=True)
class Arguments:
    """Hold the options of the command line."""

    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    """Tokens of the samples."""
    documents: int = 1
    """Equal documents of a sample; transformers gets them as rows of a batch. Many take less time
    than one as long."""
    dtype: Dtype | None = None
    """Precision of forward and backward; by default bfloat16 where the device multiplies it in
    hardware."""
    repeats: int = 5
    """Runs of each rung at each length; the median time and the highest peak count."""
    seconds: float = 120.0
    """No further run of a rung at a length begins after these; the table says how many there
    were."""
    without: tuple[str, ...] = ()
    """Rungs or peers to leave out, by their names in the table."""
    num_layers: int | None = None
    """Other than the tiny preset's 8, to try it out."""
    seed: int = 1234
    """Seed of weights and tokens."""
    plot: str | None = None
    """PNG file for the peaks over the length."""
    output: str | None = None
    """File to append the result to, as Markdown."""


def run(arguments: Arguments) -> int:
    """Climb the ladder at every length and publish the result.

    Returns:
        the exit code: 0, 1 where losses disagree, 2 where it cannot run.
    """
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    dtype = arguments.dtype or default_dtype(torch.device("cpu"))
    # The load at the start is part of the result.
    machine = describe_machine(["transformers", "deepspeed"])
    cells: dict[str, dict[int, Cell]] = {}
    for tokens in arguments.lengths:
        for name, changes, note in contenders_at(tokens, arguments):
            print(f"{tokens}: {name} ...", file=sys.stderr, flush=True)
            cells.setdefault(name, {})[tokens] = (
                Cell(note=note) if note else climb(name, changes, tokens, dtype, arguments)
            )
    # A peak counts only where all compute the same.
    wrong = disagreements(cells)
    publish(describe(cells, wrong, machine, dtype, arguments), arguments.output)
    # The picture of the same peaks.
    if arguments.plot:
        draw(cells, dtype, Path(arguments.plot))
    return 1 if wrong else 0


def find_problem(arguments: Arguments) -> str | None:
    """Say why the benchmark cannot run, with a fix; None = it can."""
    names = [*(rung.name for rung in LADDER), *PEER_NAMES]
    unknown = [name for name in arguments.without if name not in names]
    if unknown:
        return f"--without {' '.join(unknown)}: no such rung. Fix: of {', '.join(names)}."
    too_small = find_too_small(arguments, repeats=1, lengths=2, documents=1, num_layers=1)
    if too_small:
        return too_small
    if any(tokens % arguments.documents for tokens in arguments.lengths):
        return (
            f"--documents {arguments.documents}: must divide the lengths {arguments.lengths}. Fix: "
            "a power of two."
        )
    return None


def ladder(config: ModelConfig, tokens: int, mlp_tile: int = MLP_TILE) -> dict[str, dict]:
    """Map each rung to its settings: its own and those of the rungs below."""
    values = lean(config, tokens, mlp_tile) | {"cpu_offloading_num_layers": config.num_layers}
    settings = {}
    found = {}
    for rung in LADDER:
        # `only` holds until a later rung sets the same field.
        settings = settings | {name: values[name] for name in rung.adds} | dict(rung.only)
        found[rung.name] = settings
    return found


def contenders_at(tokens: int, arguments: Arguments) -> list[tuple[str, dict, str]]:
    """List (name, settings, why it does not run or "") of each rung and peer to measure."""
    layers = {"num_layers": arguments.num_layers} if arguments.num_layers else {}
    found = []
    # Our rungs, then the peers.
    steps = ladder(preset("tiny", **layers), tokens)
    for rung in LADDER:
        found.append((rung.name, steps[rung.name] | layers, NOT_ON_CPU if rung.gpu_only else ""))
    found += [(name, layers, "") for name in PEER_NAMES]
    return [(name, changes, note) for name, changes, note in found if name not in arguments.without]


def climb(name: str, changes: dict, tokens: int, dtype: Dtype, arguments: Arguments) -> Cell:
    """Run one rung at one length, again while time is left."""
    found: list[dict] = []
    began = time.monotonic()
    while len(found) < arguments.repeats and (
        not found or time.monotonic() - began < arguments.seconds
    ):
        try:
            found.append(
                run_fresh(
                    peak_of_backward,
                    usable_cores(),
                    environment=RETURN_MEMORY,
                    name=name,
                    changes=changes,
                    tokens=tokens,
                    documents=arguments.documents,
                    dtype=dtype,
                    seed=arguments.seed,
                )
            )
        except RuntimeError as failure:
            # Killed for its memory, as a rule; the other rungs go on.
            return Cell(note=str(failure).split(" ", 1)[1])
        print(found[-1], file=sys.stderr, flush=True)
    return Cell(
        max(one["above_bytes"] for one in found),
        statistics.median(one["seconds"] for one in found),
        len(found),
        found[0]["loss"],
    )


def peak_of_backward(
    name: str, changes: dict, tokens: int, documents: int, dtype: Dtype, seed: int
) -> dict:
    """Measure loss, seconds and peak above the built model of one forward and backward."""
    with one_process() as layout:
        contender = make_contender(
            name, preset("tiny", **changes), VOCABULARY, dtype, layout, seed, batched=True
        )
        # What is made at the first use is not the length's.
        contender.forward_backward(make_sample([64], VOCABULARY, seed))
        contender.clear()
        sample = make_sample([tokens // documents] * documents, VOCABULARY, seed)
        trim()
        with measured() as found:
            loss = contender.forward_backward(sample)
    return found | {"loss": loss}


def disagreements(cells: dict[str, dict[int, Cell]]) -> list[str]:
    """List the losses that differ from the first that was measured at that length."""
    wrong = []
    for tokens in sorted({tokens for row in cells.values() for tokens in row}):
        run = {
            name: row[tokens].loss
            for name, row in cells.items()
            if tokens in row and row[tokens].runs
        }
        # The first rung is plain.
        expected = next(iter(run.values()), 0.0)
        wrong += [
            f"{tokens} tokens: loss {loss:.6f} of {name}, {expected:.6f} of {next(iter(run))}"
            for name, loss in run.items()
            if not abs(loss - expected) <= LOSS_TOLERANCES[0] * abs(expected)
        ]
    return wrong


def describe(
    cells: dict[str, dict[int, Cell]],
    wrong: list[str],
    machine: str,
    dtype: Dtype,
    arguments: Arguments,
) -> str:
    """Describe the whole result as Markdown."""
    lengths = list(arguments.lengths)
    config = preset(
        "tiny", **({"num_layers": arguments.num_layers} if arguments.num_layers else {})
    )
    settings = ", ".join(
        f"{name} {value}" for name, value in lean(config, lengths[-1], MLP_TILE).items()
    )
    return "\n".join(
        [
            "## Memory over sequence length",
            "",
            machine,
            "",
            f"tiny preset ({config.num_layers} layers, vocabulary {VOCABULARY:,}), one process on "
            f"{usable_cores()} cores, "
            f"{dtype}, {arguments.documents} document{'s' * (arguments.documents > 1)}; forward "
            "and backward, each run "
            "in a process of its own. Every rung keeps those above it (at the greatest length: "
            f"{settings}). Peak: resident memory above the built model, MiB.",
            f"{ALST}: TiledMLP in tiles of as many tokens as the model is wide, and "
            "TiledFusedLogitsLoss in tiles of "
            f"{LOSS_CHUNK:,} tokens, on transformers with gradient checkpointing. Its third part, "
            "UlyssesSPAttentionHF, "
            "does nothing on one process (register_with_transformers returns at "
            "sequence_parallel_size 1), and its "
            "offload saves nothing on a CPU.",
            "",
            peak_table(cells, lengths),
            "",
            "Seconds of one forward and backward, the median (number of runs):",
            "",
            time_table(cells, lengths),
            "",
            *bars_at(cells, BAR_TOKENS if BAR_TOKENS in lengths else max(lengths)),
            *(f"- wrong: {line}" for line in wrong),
            f"- load at the end: {os.getloadavg()[0]:.1f}",
            *(["- the bars are set for 8 layers"] if arguments.num_layers else []),
        ]
    )


def peak_table(cells: dict[str, dict[int, Cell]], lengths: list[int]) -> str:
    """Show the peaks in MiB, a row per contender."""
    rows = []
    for name, row in cells.items():
        figures = [show(row[tokens], f"{row[tokens].peak / MIB:,.0f}") for tokens in lengths]
        rows.append([label(name), *figures])
    return markdown_table(length_header(lengths), rows)


def time_table(cells: dict[str, dict[int, Cell]], lengths: list[int]) -> str:
    """Show the seconds and the number of runs, a row per contender."""
    rows = []
    for name, row in cells.items():
        figures = [
            show(row[tokens], f"{row[tokens].seconds:.1f} ({row[tokens].runs})")
            for tokens in lengths
        ]
        rows.append([label(name), *figures])
    return markdown_table(length_header(lengths), rows)


def length_header(lengths: list[int]) -> list[str]:
    """Head a table whose columns are lengths."""
    return ["", *map(show_tokens, lengths)]


def show(cell: Cell, figure: str) -> str:
    """Show a figure, or why there is none."""
    return cell.note or figure


def bars_at(cells: dict[str, dict[int, Cell]], tokens: int) -> list[str]:
    """Compare our best rung at this length with the peers, a line each."""
    # Bars hold for one length.
    lines = (
        []
        if tokens == BAR_TOKENS
        else [f"- the bars are set for {BAR_TOKENS:,} tokens, not for {tokens:,}"]
    )
    # Peers, and rungs that did not run, are no candidates.
    rungs = {
        name: row[tokens] for name, row in cells.items() if name not in PEERS and row[tokens].runs
    }
    if not rungs:
        return lines
    # The rung with the lowest peak, whichever it is.
    best = min(rungs, key=lambda name: rungs[name].peak)
    for peer, limit in BARS.items():
        cell = cells.get(peer, {}).get(tokens)
        if cell is None or not cell.runs:
            lines.append(
                f"- {tokens:,} tokens, {best} / {peer}: not run{f' ({cell.note})' if cell else ''}"
            )
            continue
        lines.append(
            bar(
                f"{tokens:,} tokens, peak of {best} / of {peer}",
                rungs[best].peak / cell.peak,
                limit,
            )
        )
    return lines
