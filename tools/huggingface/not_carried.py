"""What of a Hugging Face folder an import leaves behind, in words: nothing goes unsaid."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from data.tokenizers.tokenizer import HUGGINGFACE_FILES
from tools.huggingface.weights import INDEX, OTHER_FORMATS
from tools.outputs.folder import MARKER
from tools.shared.message_text import short

REASONS = (
    (("*.py",), "code, which is never run"),
    (OTHER_FORMATS, "weights in a format that is not read"),
    (("*",), "neither the model nor its tokenizer needs it"),
)
"""Patterns of names and why such a file is not carried; the first that fits counts."""
SHOWN_FILES = 8
"""Files that a line names."""


def describe_left_behind(folder: Path, carried: Iterable[str]) -> list[str]:
    """List the files and folders that no export will write again, a line for each reason.

    Hidden ones are notes of the tools that made the folder.

    Args:
        carried: relative names of the files that are kept.
    """
    kept = {Path(name).parts[0] for name in carried} | {INDEX, MARKER, *HUGGINGFACE_FILES}
    left = [
        path
        for path in sorted(folder.iterdir())
        if path.name not in kept
        and not path.name.startswith(".")
        and path.suffix != ".safetensors"  # read, or named by who reads them
    ]
    lines = []
    for number, (patterns, reason) in enumerate(REASONS):
        earlier = [pattern for others, _ in REASONS[:number] for pattern in others]
        names = [
            f"{path.name}/" if path.is_dir() else path.name
            for path in left
            if _fits(path, patterns) and not _fits(path, earlier)
        ]
        if names:
            more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
            lines.append(
                f"not carried: {', '.join(map(short, names[:SHOWN_FILES]))}{more}: {reason}"
            )
    return lines


def _fits(path: Path, patterns: Sequence[str]) -> bool:
    return any(path.match(pattern) for pattern in patterns)
