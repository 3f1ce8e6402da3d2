"""What a corpus holds, and what a run is fed: `bash launch/ithaca.sh inspect` with `--data-path
[weight prefix ...]`, `--config run.yaml [--phase NAME --batch K]`, or `--load DIR`.

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
from pretrain.checkpointing.damage import find_verified
from pretrain.checkpointing.progress import Progress
from tools.inspection.batch import describe_batch, describe_plan
from tools.inspection.length_plot import plot_lengths
from tools.shared.door import run_door
from tools.shared.message_text import count_of

LONG_DOCUMENTS = (8 << 10, 64 << 10, 1 << 20)
"""Lengths in tokens; the summary says which share of all tokens is in documents as long."""
SHOWN_TOKENS = 40
"""Tokens of a sample that are shown from its beginning, and as many from its end."""


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
    """Look at what the arguments name -> the lines to print.

    Args:
        run_flags: flags of the run that --config names, as for pretrain.train.

    Raises:
        ValueError: nothing or too much to inspect is named, or it cannot be read.
    """
    # One of three things to look at.
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
    return describe_sources(arguments)


def describe_sources(arguments: Arguments) -> list[str]:
    """Describe each source of --data-path once; write the plot."""
    # Without a tokenizer, samples are shown as ids.
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
    # A source of several weights is one corpus.
    blend = parse_blend(arguments.data_path, "data_path")
    for prefix in dict.fromkeys(source.prefix for _, source in blend):
        reader = IndexedReader(prefix)
        lengths[prefix] = reader.document_lengths
        lines += describe_corpus(reader) + show_samples(reader, arguments.samples, tokenizer)
    if arguments.plot:
        plot_lengths(lengths, arguments.plot)
        lines.append(f"wrote {arguments.plot}")
    return lines


def describe_corpus(reader: IndexedReader) -> list[str]:
    """Describe documents, tokens, lengths and the tokenizer of a source."""
    lengths = reader.document_lengths
    # A corpus of Megatron-LM, or of older versions, does not name its tokenizer.
    side = read_side_file(reader.prefix) or {}
    tokenizer = side.get("tokenizer") or {}
    known = "not recorded"
    if {"type", "vocab_size", "fingerprint"} <= tokenizer.keys():
        fingerprint = tokenizer["fingerprint"][:8]
        known = f"{tokenizer['type']}, {tokenizer['vocab_size']:,} ids, {fingerprint}"

    low, median, high = np.quantile(lengths, (0.05, 0.5, 0.95)).astype(np.int64)
    mean = reader.num_tokens / reader.num_documents
    empty = int((lengths == 0).sum())
    # How much of the corpus can teach long contexts.
    total = max(1, reader.num_tokens)
    shares = [
        f"{100 * int(lengths[lengths >= limit].sum(dtype=np.int64)) / total:.1f} % in documents of "
        f"{limit >> 10:,}Ki or more"
        for limit in LONG_DOCUMENTS
    ]
    lines = [
        f"{reader.prefix}: {count_of(reader.num_documents, 'document')} ({empty:,} empty), "
        f"{count_of(reader.num_tokens, 'token')}, {np.dtype(reader.dtype).name}, tokenizer {known}",
        f"  length: least {int(lengths.min()):,}, 5 % {low:,}, median {median:,}, "
        f"mean {mean:,.0f}, 95 % {high:,}, most {int(lengths.max()):,}",
        f"  tokens: {', '.join(shares)}",
    ]
    single = int((lengths == 1).sum())
    if single:
        with_tokens = int(np.count_nonzero(lengths))
        lines.append(f"  {describe_one_token_documents(single, with_tokens)}")
    return lines


def show_samples(reader: IndexedReader, count: int, tokenizer: Tokenizer | None) -> list[str]:
    """Show the first and last tokens of documents drawn at random, as text or as ids."""
    # The seed is fixed: the same documents each time.
    order = Permutation.make(reader.num_documents, 0)
    lines = []
    for document in order.values(0, min(count, reader.num_documents)).tolist():
        length = int(reader.document_lengths[document])
        first = reader.read(document, 0, min(length, SHOWN_TOKENS))
        # Of a short document, what the beginning has left over.
        left = length - len(first)
        last_start = max(len(first), length - SHOWN_TOKENS)
        last = reader.read(document, last_start, min(left, SHOWN_TOKENS))
        lines.append(f"  document {document:,}, {count_of(length, 'token')}")
        for part in (first, last):
            if len(part):
                lines.append(f"    {_show_tokens(reader.prefix, part, tokenizer)}")
    return lines


def _show_tokens(prefix: str, ids: np.ndarray, tokenizer: Tokenizer | None) -> str:
    """Write tokens as text, or as ids; ValueError where the tokenizer does not have them."""
    if tokenizer is None:
        return " ".join(map(str, ids.tolist()))
    lowest = int(ids.min())
    highest = int(ids.max())
    if lowest < 0 or highest >= tokenizer.vocab_size:
        raise ValueError(
            f"{prefix}: holds token id {lowest if lowest < 0 else highest}, and the tokenizer "
            f"has {tokenizer.vocab_size} ids. Fix: give the tokenizer that made the corpus."
        )
    return repr(tokenizer.decode(ids.tolist()))


def describe_account(folder: str) -> list[str]:
    """Say what a checkpoint's ledger has drawn, by phase and source."""
    published = find_verified(Path(folder))
    if published is None:
        raise ValueError(
            f"load = {folder}: no checkpoint is published there. "
            "Fix: give the --save folder of a run."
        )
    progress = Progress.read(published)
    if progress.data is None:
        raise ValueError(
            f"load = {folder}: its checkpoint is weights only, which no data was drawn for. "
            "Fix: give the --save folder of a run that trained."
        )
    rows = progress.data["account"]
    lines = [
        f"{published}: clock {progress.clock:,}, {progress.real_tokens:,} real tokens",
        f"{'phase':<12}{'samples':>12}{'tokens':>18}{'documents':>14}{'epochs':>9}   source",
    ]
    for row in rows:
        note = " (passed over)" if row["skipped"] else ""
        counts = f"{row['samples']:>12,}{row['tokens']:>18,}{row['documents']:>14,}"
        epochs = f"{row['epochs']:>9.3f}"
        lines.append(f"{row['phase']:<12}{counts}{epochs}   {row['source']}{note}")
    # Totals: what was drawn, and what --skip-data passed over.
    for name, skipped in (("drawn", False), ("passed over", True)):
        chosen = [row for row in rows if row["skipped"] == skipped]
        if chosen:
            samples = sum(row["samples"] for row in chosen)
            tokens = sum(row["tokens"] for row in chosen)
            documents = sum(row["documents"] for row in chosen)
            lines.append(f"{name:<12}{samples:>12,}{tokens:>18,}{documents:>14,}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
