"""What a corpus holds, and what a run is fed: `python -m tools.inspect_data --data-path [weight
prefix ...]`, `--config run.yaml [--phase NAME --batch K]`, or `--load DIR`.

With `--data-path`: documents, tokens and lengths of each source, `--plot FILE.png` for a histogram,
`--samples N` for the beginnings and ends of documents. With `--config` and the flags of a run
(after `--`): what each phase will draw; with `--phase` and `--batch`, what that batch holds on each
rank. With `--load`: what a checkpoint has drawn.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.blend import parse_blend
from data.config import TokenizerType
from data.idx_format import describe_one_token_documents, read_side_file
from data.indexed import IndexedReader
from data.permutation import Permutation
from data.tokenizers.folder import IdsFrom
from data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.progress import Progress
from tools.inspection.batch import describe_batch, describe_plan
from tools.inspection.length_plot import plot_lengths
from tools.shared.door import run_door

LONG = (8 << 10, 64 << 10, 1 << 20)
"""Lengths in tokens of whose documents the share of all tokens is told."""
SHOWN_TOKENS = 40


@dataclass(kw_only=True)
class Arguments:
    data_path: list[str] = field(default_factory=list)
    """Sources, as in training: prefixes, with or without weights."""
    samples: int = 0
    """Documents of each source to show the beginning and end of, drawn at random."""
    plot: str | None = None
    """PNG file for a histogram of the lengths."""
    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """Type of the tokenizer that decodes."""
    tokenizer_model: str | None = None
    """Decode with this tokenizer; without one, ids are shown."""
    tokenizer_ids_from: IdsFrom | None = None
    """Which of a Hugging Face folder's definitions gives the ids; needed where the two differ."""
    config: str | None = None
    """A run's YAML file."""
    phase: str | None = None
    """Name of a phase of --config."""
    batch: int = 0
    """Step of the phase, from 0."""
    world_size: int = 1
    """Processes of the run."""
    load: str | None = None
    """Folder of a run's checkpoints."""


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    # What follows "--" are the flags of the run that --config names.
    own = words[: words.index("--")] if "--" in words else words
    run_flags = words[len(own) + 1 :]

    def print_lines(arguments: Arguments) -> None:
        for line in inspect(arguments, run_flags):
            print(line, flush=True)

    return run_door(
        Arguments, print_lines, name="tools.inspect_data", description=__doc__, argv=own
    )


def inspect(arguments: Arguments, run_flags: list[str]) -> list[str]:
    """The lines to print.

    Args:
        run_flags: flags of the run that --config names, as for pretrain.train.

    Raises:
        ValueError: nothing or too much to inspect is named, or it cannot be read.
    """
    given = [name for name in ("data_path", "config", "load") if getattr(arguments, name)]
    if len(given) != 1:
        raise ValueError(
            f"data_path, config, load: {' and '.join(given) or 'none'} given. Fix: give one of "
            "--data-path, --config and --load."
        )
    if arguments.load:
        return describe_account(arguments.load)
    if arguments.config:
        flags = ["--config", arguments.config, *run_flags]
        if arguments.phase is None:
            return describe_plan(flags, arguments.world_size)
        return describe_batch(flags, arguments.world_size, arguments.phase, arguments.batch)
    tokenizer = None
    if arguments.tokenizer_model:
        tokenizer = build_tokenizer(
            arguments.tokenizer_type,
            arguments.tokenizer_model,
            None,
            ids_from=arguments.tokenizer_ids_from,
        )
    lines = []
    lengths = {}
    for prefix in dict.fromkeys(
        source.prefix for _, source in parse_blend(arguments.data_path, "data_path")
    ):
        reader = IndexedReader(prefix)
        lengths[prefix] = reader.document_lengths
        lines += describe_corpus(reader) + show_samples(reader, arguments.samples, tokenizer)
    if arguments.plot:
        plot_lengths(lengths, arguments.plot)
        lines.append(f"wrote {arguments.plot}")
    return lines


def describe_corpus(reader: IndexedReader) -> list[str]:
    lengths = reader.document_lengths
    side = read_side_file(reader.prefix) or {}
    tokenizer = side.get("tokenizer") or {}
    known = (
        f"{tokenizer['type']}, {tokenizer['vocab_size']:,} ids, {tokenizer['fingerprint'][:8]}"
        if {"type", "vocab_size", "fingerprint"} <= tokenizer.keys()
        else "not recorded"
    )
    quantiles = np.quantile(lengths, (0.05, 0.5, 0.95)).astype(np.int64)
    total = max(1, reader.num_tokens)
    shares = [
        f"{100 * int(lengths[lengths >= limit].sum(dtype=np.int64)) / total:.1f} % in documents of "
        f"{limit >> 10:,}Ki or more"
        for limit in LONG
    ]
    lines = [
        f"{reader.prefix}: {reader.num_documents:,} documents ({int((lengths == 0).sum()):,} empty), "
        f"{reader.num_tokens:,} tokens, {np.dtype(reader.dtype).name}, tokenizer {known}",
        f"  length: least {int(lengths.min()):,}, 5 % {quantiles[0]:,}, median {quantiles[1]:,}, mean "
        f"{reader.num_tokens / reader.num_documents:,.0f}, 95 % {quantiles[2]:,}, most {int(lengths.max()):,}",
        f"  tokens: {', '.join(shares)}",
    ]
    single = int((lengths == 1).sum())
    if single:
        full = int(np.count_nonzero(lengths))
        lines.append(f"  {describe_one_token_documents(single, full)}")
    return lines


def show_samples(reader: IndexedReader, count: int, tokenizer: Tokenizer | None) -> list[str]:
    """The first and last tokens of some documents, as text or as ids."""
    lines = []
    for document in (
        Permutation.make(reader.num_documents, 0)
        .values(0, min(count, reader.num_documents))
        .tolist()
    ):
        length = int(reader.document_lengths[document])
        first = reader.read(document, 0, min(length, SHOWN_TOKENS))
        last = reader.read(
            document, max(len(first), length - SHOWN_TOKENS), min(length - len(first), SHOWN_TOKENS)
        )
        highest = int(max(first.max(initial=0), last.max(initial=0)))
        lowest = int(min(first.min(initial=0), last.min(initial=0)))
        if tokenizer and (lowest < 0 or highest >= tokenizer.vocab_size):
            raise ValueError(
                f"{reader.prefix}: holds token id {lowest if lowest < 0 else highest}, and the tokenizer "
                f"has {tokenizer.vocab_size} ids. Fix: give the tokenizer that made the corpus."
            )
        lines.append(f"  document {document:,}, {length:,} tokens")
        lines += [
            f"    {text!r}" if tokenizer else f"    {text}"
            for text in (
                tokenizer.decode(part.tolist()) if tokenizer else " ".join(map(str, part.tolist()))
                for part in (first, last)
                if len(part)
            )
        ]
    return lines


def describe_account(folder: str) -> list[str]:
    """What a checkpoint's ledger says was drawn."""
    published = find_published(Path(folder))
    if published is None:
        raise ValueError(
            f"load = {folder}: no checkpoint is published there. Fix: give the --save folder of a run."
        )
    progress = Progress.read(published)
    rows = progress.data["account"]
    lines = [
        f"{published}: clock {progress.clock:,}, {progress.real_tokens:,} real tokens",
        f"{'phase':<12}{'samples':>12}{'tokens':>18}{'documents':>14}{'epochs':>9}   source",
    ]
    lines += [
        f"{row['phase']:<12}{row['samples']:>12,}{row['tokens']:>18,}{row['documents']:>14,}"
        f"{row['epochs']:>9.3f}   {row['source']}{' (passed over)' if row['skipped'] else ''}"
        for row in rows
    ]
    for skipped in (False, True):
        chosen = [row for row in rows if row["skipped"] == skipped]
        if chosen:
            lines.append(
                f"{'passed over' if skipped else 'drawn':<12}{sum(row['samples'] for row in chosen):>12,}"
                f"{sum(row['tokens'] for row in chosen):>18,}{sum(row['documents'] for row in chosen):>14,}"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
