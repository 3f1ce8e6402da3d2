"""Several pairs of token files from one: `python -m tools.split_dataset --input A --output-prefix B --parts N`.

B_0 ... hold whole documents in A's order, with about the same number of tokens each; merged again they
give A. (For validation there is --split of the trainer, which draws documents at random.)
"""

import sys
from dataclasses import dataclass

import numpy as np
import tyro

from data.indexed import read_index, read_side_file
from data.indexed_writer import IndexedWriter


@dataclass(kw_only=True)
class Arguments:
    input: str
    """Prefix of a .bin/.idx pair."""
    output_prefix: str
    """Part i is written to PREFIX_i, with zeros before i so that all are as long."""
    parts: int
    """How many."""


def split(arguments: Arguments) -> list[str]:
    """Write the parts -> their prefixes.

    Raises:
        ValueError: the input is damaged, or its documents do not make so many parts; nothing was written. Or the
            disk is full: the parts before stand.
    """
    index, parts = read_index(arguments.input), arguments.parts
    if not 1 <= parts <= len(index.document_lengths):
        raise ValueError(f"parts = {parts}: must be in [1, {len(index.document_lengths)}], the documents of "
                         f"{arguments.input}. Fix: give such a number.")
    ends = np.cumsum(index.document_lengths, dtype=np.int64)
    goals = [index.num_tokens * part // parts for part in range(1, parts)]
    cuts = np.concatenate([[0], np.searchsorted(ends, goals) + 1, [len(ends)]])
    if (np.diff(cuts) < 1).any():
        raise ValueError(f"parts = {parts}: a document of {index.document_lengths.max():,} tokens is longer than a "
                         f"part of {index.num_tokens // parts:,}. Fix: fewer parts.")
    tokens = np.diff(np.concatenate([[0], ends[cuts[1:] - 1]]))
    if not tokens.all():
        # Empty documents alone: no run could train on such a part.
        raise ValueError(f"parts = {parts}: part {int(np.argmin(tokens))} would hold no token. Fix: fewer parts.")
    tokenizer, prefixes = (read_side_file(arguments.input) or {}).get("tokenizer"), []
    for part in range(parts):
        prefixes.append(f"{arguments.output_prefix}_{part:0{len(str(parts - 1))}d}")
        with IndexedWriter(prefixes[-1], index.dtype) as writer:
            writer.append_from(arguments.input, int(cuts[part]), int(cuts[part + 1]))
            writer.finish(tokenizer)
    return prefixes


def main() -> int:
    arguments = tyro.cli(Arguments, prog="tools.split_dataset", description=__doc__)
    try:
        prefixes = split(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {len(prefixes):,} parts, {prefixes[0]} to {prefixes[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
