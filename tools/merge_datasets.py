"""Merge pairs of token files into one:
`bash launch/ithaca.sh merge --input A B --output-prefix C`.

Documents come in the order of the inputs; all must be from the same tokenizer. What is at C is
replaced with --overwrite only, and never where it is an input.
"""

import sys
from dataclasses import dataclass
from typing import Any

from data.idx_format import read_index, read_side_file
from data.tokenizers.identity import same_tokenizer
from data.writers.indexed_writer import IndexedWriter
from data.writers.output_prefix import check_output, prefix_files
from tools.shared.door import run_door


@dataclass(kw_only=True)
class Arguments:
    input: list[str]
    """Prefixes of .bin/.idx pairs."""
    output_prefix: str
    """Prefix of the files to write."""
    overwrite: bool = False
    """Replace the pair that is at the output prefix."""
    accept_unknown_tokenizers: bool = False
    """Take inputs without our .json, as Megatron-LM's; the output then names no tokenizer."""


def merge(arguments: Arguments) -> list[str]:
    """Write the merged pair -> the paths of its files.

    Raises:
        ValueError: an input is damaged, or of another tokenizer or dtype than the first, or the
            output may not be written; nothing was written.
    """
    # All checks come before the first byte is written.
    files = [file for prefix in arguments.input for file in prefix_files(prefix)]
    check_output(arguments.output_prefix, overwrite=arguments.overwrite, inputs=files)
    tokenizer = _common_tokenizer(arguments)
    # As bytes, with the dtype of the first; another dtype is refused.
    with IndexedWriter(arguments.output_prefix, read_index(arguments.input[0]).dtype) as writer:
        for prefix in arguments.input:
            writer.append_from(prefix)
        return writer.finish(tokenizer, _common_text_settings(arguments.input))


def _common_text_settings(prefixes: list[str]) -> dict[str, Any] | None:
    """Find the settings with which all inputs' text became ids; None where they differ or one has
    none.

    A difference is no error, but a warning.
    """
    found = [(read_side_file(prefix) or {}).get("text") for prefix in prefixes]
    if all(settings == found[0] for settings in found):
        return found[0]
    # Those that have settings: do they differ, or do others only have none?
    known = [(prefix, text) for prefix, text in zip(prefixes, found, strict=True) if text]
    first, settings = known[0]
    other = next(((prefix, text) for prefix, text in known if text != settings), None)
    if other:
        print(
            f"warning: text became ids with {settings} for {first}, and with {other[1]} for "
            f"{other[0]}: the output's .json names neither.",
            file=sys.stderr,
        )
    return None


def _common_tokenizer(arguments: Arguments) -> dict[str, Any] | None:
    """Find the tokenizer of all inputs; None where one may be unknown and is.

    Raises:
        ValueError: two inputs have different ones, or one is unknown and may not be.
    """
    first = arguments.input[0]
    found = {prefix: (read_side_file(prefix) or {}).get("tokenizer") for prefix in arguments.input}
    # Each against the first; ids of another tokenizer would mean other text.
    for prefix, tokenizer in found.items():
        if tokenizer is None and not arguments.accept_unknown_tokenizers:
            raise ValueError(
                f"input = {prefix}: no {prefix}.json that names its tokenizer. Fix: make it with "
                "bash launch/ithaca.sh preprocess, or --accept-unknown-tokenizers if you know that "
                "it is the same."
            )
        if tokenizer and found[first] and not same_tokenizer(tokenizer, found[first]):
            raise ValueError(
                f"input = {prefix}: made with the tokenizer {tokenizer}, but {first} with "
                f"{found[first]}. Fix: merge only what one tokenizer made."
            )
    return found[first] if None not in found.values() else None


def merge_and_report(arguments: Arguments) -> None:
    """Merge, then print what was written."""
    paths = merge(arguments)
    index = read_index(arguments.output_prefix)
    print(
        f"{len(index.document_lengths):,} documents, {index.num_tokens:,} tokens of "
        f"{len(arguments.input):,} inputs"
    )
    print(f"wrote {', '.join(paths)}")


def main(argv: list[str] | None = None) -> int:
    return run_door(
        Arguments, merge_and_report, name="tools.merge_datasets", description=__doc__, argv=argv
    )


if __name__ == "__main__":
    sys.exit(main())
