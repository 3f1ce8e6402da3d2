"""Split a pair of token files into several:
`bash launch/ithaca.sh split --input A --output-prefix B --parts N`.

B_0 ... hold whole documents in A's order, with about the same number of tokens each; merged again
they give A. What is there is replaced with --overwrite only. (For validation there is --split of
the trainer, which draws documents at random.)
"""

import glob
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.idx_format import read_index, read_side_file
from data.writers.indexed_writer import IndexedWriter
from data.writers.output_prefix import check_output, prefix_files
from tools.shared.door import run_door


@dataclass(kw_only=True)
class Arguments:
    input: str
    """Prefix of a .bin/.idx pair."""
    output_prefix: str
    """Part i is written to PREFIX_i, with zeros before i so that all are as long."""
    parts: int
    """Number of parts."""
    overwrite: bool = False
    """Replace the pairs that stand at the parts' prefixes."""


def split(arguments: Arguments) -> list[str]:
    """Write the parts -> their prefixes.

    Raises:
        ValueError: the input is damaged, its documents do not make this many parts, or a part may
            not be written; nothing was written. Or the disk is full: the parts before stand.
    """
    index = read_index(arguments.input)
    parts = arguments.parts
    if not 1 <= parts <= len(index.document_lengths):
        raise ValueError(
            f"parts = {parts}: must be in [1, {len(index.document_lengths)}], the documents of "
            f"{arguments.input}. Fix: give such a number."
        )
    # Cut behind the document that reaches each part's share of the tokens.
    ends = np.cumsum(index.document_lengths, dtype=np.int64)
    goals = [index.num_tokens * part // parts for part in range(1, parts)]
    cuts = np.concatenate([[0], np.searchsorted(ends, goals) + 1, [len(ends)]])
    if (np.diff(cuts) < 1).any():
        raise ValueError(
            f"parts = {parts}: a document of {index.document_lengths.max():,} tokens is longer "
            f"than a part of {index.num_tokens // parts:,}. Fix: fewer parts."
        )
    # Tokens of each part.
    tokens = np.diff(np.concatenate([[0], ends[cuts[1:] - 1]]))
    if not tokens.all():
        # Empty documents alone: no run could train on such a part.
        raise ValueError(
            f"parts = {parts}: part {int(np.argmin(tokens))} would hold no token. Fix: fewer parts."
        )
    prefixes = _part_prefixes(arguments)
    side = read_side_file(arguments.input) or {}
    for part, prefix in enumerate(prefixes):
        with IndexedWriter(prefix, index.dtype) as writer:
            writer.append_from(arguments.input, int(cuts[part]), int(cuts[part + 1]))
            writer.finish(side.get("tokenizer"), side.get("text"))
    return prefixes


def _part_prefixes(arguments: Arguments) -> list[str]:
    """Name the parts, each of which may be written.

    Raises:
        ValueError: one may not, or parts of another split would remain beside them.
    """
    digits = len(str(arguments.parts - 1))
    prefixes = [f"{arguments.output_prefix}_{part:0{digits}d}" for part in range(arguments.parts)]
    for prefix in prefixes:
        check_output(prefix, overwrite=arguments.overwrite, inputs=prefix_files(arguments.input))
    # Parts of another split beside the new ones would be taken for theirs.
    written = {Path(f"{prefix}.idx").name for prefix in prefixes}
    stem = Path(arguments.output_prefix)
    for idx in sorted(stem.parent.glob(f"{glob.escape(stem.name)}_*.idx")):
        number = idx.stem.removeprefix(f"{stem.name}_")
        is_other_part = number.isdecimal() and idx.name not in written
        if is_other_part and not idx.samefile(f"{arguments.input}.idx"):
            raise ValueError(
                f"output_prefix = {arguments.output_prefix}: {idx} is a part of another split, and "
                "would remain beside the new ones. Fix: remove it, or another prefix."
            )
    return prefixes


def split_and_report(arguments: Arguments) -> None:
    """Split, then print what was written."""
    prefixes = split(arguments)
    print(f"wrote {len(prefixes):,} parts, {prefixes[0]} to {prefixes[-1]}")


def main(argv: list[str] | None = None) -> int:
    return run_door(
        Arguments, split_and_report, name="tools.split_dataset", description=__doc__, argv=argv
    )


if __name__ == "__main__":
    sys.exit(main())
