"""Measure the rows of the data benchmark, each side in an interpreter of its own."""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.bench import exactly_once, tokenizing
from tools.bench.data_engine import corpus as data_corpus
from tools.bench.data_engine import ours as data_ours
from tools.bench.data_engine.arguments import CORES, Arguments
from tools.bench.fresh import measured, run_fresh
from tools.bench.report import bar, bar_at_least, markdown_table

OURS = "ours"


THEIRS = "Megatron-Core"


MILLION = 1 << 20
INDEX_LENGTH = 8192
"""Tokens of a sample in the index row."""
NEXT_LENGTH = 32768
"""Tokens of a sample where that row changes the length."""
MEAN = 1000
"""Tokens of a document, on average, in the rows that do not set it."""


SLICE_SAMPLES = 4
"""Samples that the slices row reads."""


BARS = {
    "index seconds": 6.0,
    "index GB": 1.6,
    "another length seconds": 1.0,
    "packing M documents/s": 5.0,
    "packing GB per 10M documents": 0.5,
    "reading Mtok/s": 150.0,
    "tokenizing MB/s": 150.0,
}


def measure_index(folder: Path, arguments: Arguments) -> tuple[list[str], bool]:
    """Measure opening a corpus up to its first sample, and going on at another length."""
    from tools.bench.data_engine import megatron as data_megatron

    # The index is all that either side reads of it but one sample.
    total = data_corpus.write_hollow(
        folder / "hollow", arguments.documents, arguments.tokens, arguments.seed
    )
    common = {
        "prefix": str(folder / "hollow"),
        "warm_up": make_warm_up(folder),
        "seq_length": INDEX_LENGTH,
        "next_length": NEXT_LENGTH,
    }
    found = in_turns(
        {OURS: data_ours.index, THEIRS: data_megatron.index}, arguments.repeats, **common
    )
    remove(folder / "hollow")
    rows = [
        [
            name,
            f"{one['seconds']:.2f}",
            f"{one['cpu_seconds']:.2f}",
            f"{one['peak_bytes'] / 1e9:.2f}",
            f"{one['above_bytes'] / 1e9:.2f}",
            f"{one['again_seconds']:.3f}",
            f"{one['again_cpu_seconds']:.3f}",
            f"{one['again_peak_bytes'] / 1e9:.2f}",
        ]
        for name, one in found.items()
    ]
    ours = found[OURS]
    return [
        "### Index",
        "",
        f"{arguments.documents:,} documents, {total:,} tokens; from opening the files to the first "
        "sample of "
        f"{INDEX_LENGTH} tokens, with no index cached; then {NEXT_LENGTH} tokens, with the files "
        "open. Medians of "
        f"{arguments.repeats}, highest peaks.",
        "",
        markdown_table(
            ["", "seconds", "cpu s", "peak GB", "above GB", "another length s", "cpu s", "peak GB"],
            rows,
        ),
        "",
        bar("index, seconds", ours["seconds"], BARS["index seconds"]),
        bar("index, peak GB", ours["peak_bytes"] / 1e9, BARS["index GB"]),
        bar("another length, seconds", ours["again_seconds"], BARS["another length seconds"]),
    ], True


def measure_packing(folder: Path, arguments: Arguments) -> tuple[list[str], bool]:
    """Measure best-fit packing: the algorithm alone, and an epoch as a run packs it."""
    count = arguments.packed_documents
    data_corpus.write_hollow(folder / "packed", count, count * MEAN, arguments.seed)
    common = {
        "prefix": str(folder / "packed"),
        "warm_up": make_warm_up(folder),
        "documents": count,
        "seq_length": MILLION,
    }
    found = in_turns(
        {"all at once, one core": data_ours.pack_lengths, "a run's windows": data_ours.pack_stream},
        arguments.repeats,
        **common,
    )
    remove(folder / "packed")
    rows = []
    bars = []
    for name, one in found.items():
        # All at once, only the algorithm is timed; a run has no such part.
        seconds = one.get("pack_seconds", one["seconds"])
        rate = count / seconds / 1e6
        # In GB per ten million documents.
        memory = one["above_bytes"] / 1e9 / count * 1e7
        # Share of the samples that is not padding.
        fill = one["tokens"] / (one["samples"] * MILLION)
        rows.append(
            [
                name,
                f"{seconds:.2f}",
                f"{one.get('pack_cpu_seconds', one['cpu_seconds']):.2f}",
                f"{rate:.2f}",
                f"{memory:.2f}",
                f"{one['peak_bytes'] / 1e9:.2f}",
                f"{100 * fill:.2f}",
            ]
        )
        bars += [
            bar_at_least(f"{name}, M documents/s", rate, BARS["packing M documents/s"]),
            bar(
                f"{name}, GB per 10M documents, above", memory, BARS["packing GB per 10M documents"]
            ),
        ]
    return [
        "### Best-fit packing",
        "",
        f"{count:,} documents into samples of {MILLION:,} tokens. All at once: the algorithm over "
        "an array of "
        "lengths. A run's windows: opening .idx, and an epoch in windows of 1,024 samples, drawn "
        "in the stream's "
        "order, cut, packed and put in order. OLMo-core, quoted: 0.072 to 0.075 M documents/s, 10 "
        "GB per 10M.",
        "",
        markdown_table(
            ["", "seconds", "cpu s", "M documents/s", "GB per 10M, above", "peak GB", "fill %"],
            rows,
        ),
        "",
        *bars,
    ], True


def measure_reading(folder: Path, arguments: Arguments) -> tuple[list[str], bool]:
    """Measure samples per second, read in process."""
    from tools.bench.data_engine import megatron as data_megatron

    prefix = make_tokens(folder, arguments)
    warm_up = make_warm_up(folder)
    # First the results, then the times.
    wrong = run_fresh(data_ours.check, 1, prefix=prefix, seq_length=MILLION, samples=3)["wrong"]
    # Times of wrong results would say nothing.
    if wrong:
        return ["### Reading", "", f"- wrong results, not timed: {'; '.join(wrong)}"], False
    # rates[contender][length, clock] in Mtok/s; clock: wall or CPU seconds.
    rates: dict[str, dict[tuple[int, str], float]] = {}
    for seq_length in (MILLION, INDEX_LENGTH):
        common = {
            "prefix": prefix,
            "warm_up": warm_up,
            "seq_length": seq_length,
            "samples": arguments.samples * (1 if seq_length == MILLION else 16),
        }
        sides: tuple[tuple[str, Callable[..., dict], dict[str, Any]], ...] = (
            (OURS, data_ours.read, {}),
            (THEIRS, data_megatron.read, {"reset_positions": True}),
            (
                f"{THEIRS}, positions from 0 to the sample's end",
                data_megatron.read,
                {"reset_positions": False},
            ),
        )
        for name, function, options in sides:
            for clock, seconds in run_fresh(function, 1, **common, **options).items():
                rates.setdefault(name, {})[seq_length, clock] = (
                    seq_length / statistics.median(seconds) / 1e6
                )
    rows = [[name, *(f"{rate:.1f}" for rate in found.values())] for name, found in rates.items()]
    return [
        "### Reading",
        "",
        f"Samples with labels and per-document positions ({OURS}: cu_seqlens and checked ids too), "
        "in process, one "
        f"core, warm page cache; the median of {arguments.samples} samples of {MILLION:,} tokens "
        "and of "
        f"{16 * arguments.samples} of {INDEX_LENGTH:,}. Our positions are those of Megatron-Core's "
        "own function on "
        "the same tokens.",
        "",
        markdown_table(["Mtok/s", "1Mi", "by CPU time", "8Ki", "by CPU time"], rows),
        "",
        bar_at_least(
            "reading 1Mi samples, Mtok/s", rates[OURS][MILLION, "seconds"], BARS["reading Mtok/s"]
        ),
    ], True


def measure_slices(folder: Path, arguments: Arguments) -> tuple[list[str], bool]:
    """Count what a context-parallel rank reads of a sample."""
    prefix = make_tokens(folder, arguments)
    ranks = data_ours.RANKS
    rows = []
    worst = -1
    share = MILLION // ranks
    for packing in ("concat", "best_fit"):
        for balanced in (False, True):
            found = run_fresh(
                data_ours.slices,
                CORES,
                prefix=prefix,
                seq_length=MILLION,
                samples=SLICE_SAMPLES,
                packing=packing,
                balanced=balanced,
            )
            # Any rank, packing and slicing may be the worst.
            worst = max(worst, found["beyond"], found["entries_beyond"])
            rows.append(
                [
                    packing,
                    "2" if balanced else "1",
                    f"{found['tokens']:,}",
                    f"{share + 1 + balanced:,}",
                    str(found["entries"]),
                    str(max(0, found["entries_beyond"])),
                ]
            )
    return [
        "### A slice of a 1Mi sample",
        "",
        f"What the rank of {ranks} that reads most copies from .bin, and looks up in .idx (8 bytes "
        "a document), "
        f"counted at the reader, over {SLICE_SAMPLES} samples. Allowed: 1/{ranks} of the sample "
        "and a token per "
        "contiguous chunk, and an entry for each document in the slice. Every rank also walks the "
        "lengths of the "
        "sample's documents, which are in memory.",
        "",
        markdown_table(
            ["packing", "chunks", "tokens", "allowed", ".idx entries", "beyond its documents"], rows
        ),
        "",
        bar("tokens or entries beyond what is allowed", max(0, worst), 0.0),
    ], True


def measure_exactly_once(folder: Path, arguments: Arguments) -> tuple[list[str], bool]:
    """Count how often each token of a run of random phases was an input and a label."""
    inside = folder / "counted"
    inside.mkdir()
    found = run_fresh(
        count_tokens,
        CORES,
        folder=str(inside),
        tokens=arguments.counted_tokens,
        seed=arguments.seed,
    )
    # It takes gigabytes: gone before the next row.
    for name in inside.iterdir():
        name.unlink()
    # None = every token came once.
    problems = found["problems"]
    return [
        "### Exactly once",
        "",
        f"{found['tokens']:,} tokens in 3 sources; {found['phases']} random phases "
        f"({min(found['lengths']):,} to "
        f"{max(found['lengths']):,} tokens; concat and best_fit; other blends, batches, dp, cp), "
        f"{found['steps']:,} steps, {found['restarts']} restarts from the ledger's JSON, "
        f"{found['passed_over']:,} tokens passed over on purpose; {found['drawn']:,} tokens "
        "counted as inputs and "
        f"as labels; {found['seconds']:.0f} s.",
        "",
        f"- each token exactly once: {'NOT ' if problems else ''}reached",
        *(f"- {problem}" for problem in problems[:5]),
    ], not problems


def measure_tokenizing(folder: Path, arguments: Arguments) -> tuple[list[str], bool]:
    """Measure the tokenizing of text."""
    # Its own folder, which the benchmark removes with the others.
    rows = tokenizing.measure(arguments.text_bytes, folder=str(make_folder(folder / "text")))
    ours = rows[0]
    return [
        "### Tokenizing",
        "",
        f"tools.preprocess_data on {arguments.text_bytes / 1e6:,.0f} MB of JSON lines (Python's "
        "standard library "
        "in pieces) with a byte-level BPE tokenizer of 32,000 ids, files to files, on all cores; "
        "Hugging Face's "
        "tokenizer on the first of them, from memory. The median of 3.",
        "",
        markdown_table(tokenizing.HEADER, [row.cells() for row in rows]),
        "",
        bar_at_least(
            "tokenizing, MB/s", ours.text_bytes / ours.seconds / 1e6, BARS["tokenizing MB/s"]
        ),
        f"- ids as Hugging Face's: {'' if ours.identical else 'NOT '}reached",
    ], ours.identical


ROWS: dict[str, Callable[[Path, Arguments], tuple[list[str], bool]]] = {
    # name -> (folder, arguments) -> (lines of the report, is everything right?)
    "index": measure_index,
    "packing": measure_packing,
    "reading": measure_reading,
    "slices": measure_slices,
    "tokenizing": measure_tokenizing,
    "exactly-once": measure_exactly_once,
}


def count_tokens(folder: str, tokens: int, seed: int) -> dict:
    """Run exactly_once.run, in a process of its own."""
    with measured() as found:
        outcome = exactly_once.run(
            Path(folder), tokens, seed, log=lambda line: print(line, file=sys.stderr)
        )
    return {**found, **vars(outcome), "lengths": sorted(outcome.lengths)}


def in_turns(
    contenders: dict[str, Callable[..., dict]], repeats: int, **options
) -> dict[str, dict]:
    """Map contenders to what they measured: medians of seconds, the largest of everything else.

    The order turns from repeat to repeat, so none always finds the page cache as the other left it.
    """
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    # Each contender once per repeat.
    for repeat in range(repeats):
        for name in list(contenders)[:: -1 if repeat % 2 else 1]:
            runs[name].append(run_fresh(contenders[name], CORES, **options))
            print(f"{name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    return {
        name: {
            key: (statistics.median if key.endswith("seconds") else max)(
                [one[key] for one in found]
            )
            for key in found[0]
        }
        for name, found in runs.items()
    }


def make_tokens(folder: Path, arguments: Arguments) -> str:
    """Make the corpus with real ids once, and read it into the page cache; returns its prefix."""
    prefix = folder / "tokens"
    if not Path(f"{prefix}.bin").exists():
        data_corpus.write_tokens(prefix, arguments.read_tokens, MEAN, arguments.seed)
    with open(f"{prefix}.bin", "rb") as file:
        # Read once, so that both sides find it in memory.
        while file.read(1 << 24):
            pass
    return str(prefix)


def make_warm_up(folder: Path) -> str:
    """Make a small corpus, for what is compiled or loaded at the first use; returns its prefix."""
    prefix = folder / "warm-up"
    if not Path(f"{prefix}.bin").exists():
        data_corpus.write_tokens(prefix, 3 * MILLION, MEAN, 1)
    return str(prefix)


def remove(prefix: Path) -> None:
    """Remove a pair of files."""
    for end in ("idx", "bin"):
        Path(f"{prefix}.{end}").unlink()


def make_folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path
