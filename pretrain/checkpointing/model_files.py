"""What a Hugging Face folder holds besides weights, carried through training.

The import reads these files, each checkpoint keeps them in `huggingface/`, and the export writes
them again: what generation needs (end-of-text ids, sampling, chat templates) is the source's own,
and only what training changed is changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from data.tokenizers.tokenizer import HUGGINGFACE_FILES
from pretrain.checkpointing.folders import CARRIED

CONFIG = "config.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
CARD = "README.md"
"""The model card; of the source's an export keeps license and language."""
LEGAL = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
"""Files that must go wherever the model goes."""
MORE_TEMPLATES = "additional_chat_templates"
"""Folder of named chat templates."""
LARGEST_FILE = 64 << 20
"""Bytes; a larger file is not one of these, whatever its name."""


def read_model_files(folder: Path) -> dict[str, bytes]:
    """Read the small files of a Hugging Face folder -> relative name and content of each."""
    names = [CONFIG, GENERATION, *HUGGINGFACE_FILES, "chat_template.json", CARD]
    names += [path.name for pattern in LEGAL for path in sorted(folder.glob(pattern))]
    more = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    names += [f"{MORE_TEMPLATES}/{path.name}" for path in more]
    paths = {name: folder / name for name in dict.fromkeys(names)}
    return {
        name: path.read_bytes()
        for name, path in paths.items()
        if path.is_file() and path.stat().st_size <= LARGEST_FILE
    }


def read_carried(checkpoint: Path | None) -> dict[str, bytes]:
    """Read the files that a published checkpoint carries; none where its model began here."""
    return read_model_files(checkpoint / CARRIED) if checkpoint is not None else {}


def contents_of(files: Iterable[str]) -> dict[str, bytes]:
    """Read files whole -> name without the folder -> content."""
    return {Path(file).name: Path(file).read_bytes() for file in files}
