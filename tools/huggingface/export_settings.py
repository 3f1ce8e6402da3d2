"""Settings of an exported folder: its context length, config.json, generation and tokenizer files.

How each of these files is made: tools/huggingface/export_files.py.
"""

import sys
from pathlib import Path
from typing import Any

from model.hf.config_json import context_to_declare, huggingface_config
from pretrain.checkpointing.model_files import CONFIG
from tools.huggingface import export_files
from tools.huggingface.stored_model import StoredModel


def declared_context(stored: StoredModel, asked: int | None = None) -> int:
    """Return the longest context that the model is for.

    Args:
        asked: what somebody wants to declare instead.
    """
    longest = stored.progress.longest_seq_length
    asked = asked or stored.config.model.max_position_embeddings
    if asked:
        return asked
    theirs = export_files.parse_json(stored.carried.get(CONFIG))
    before = theirs.get("max_position_embeddings")
    # Training on shorter samples takes no context away from a model whose rope is the source's.
    if isinstance(before, int) and export_files.source_rope(theirs) == stored.rope:
        return max(before, longest)
    return context_to_declare(stored.rope, longest)


def choose_context(stored: StoredModel, asked: int | None) -> int:
    """Choose the max_position_embeddings to declare.

    Warns where versions of transformers before 5 would make another rope of it.

    Args:
        asked: --max-position-embeddings.
    """
    declared = declared_context(stored, asked)
    if stored.rope.type == "yarn" and declared != stored.rope.scaled_length:
        print(
            f"warning: max_position_embeddings = {declared}: transformers before 5 divides it by "
            "original_max_position_embeddings for yarn's factor, which gives another model than "
            f"{stored.rope.scaled_length} does",
            file=sys.stderr,
        )
    return declared


def write_settings(
    stored: StoredModel, folder: Path, declared: int, dtype: str, *, with_tokenizer: bool
) -> dict[str, Any]:
    """Write all files but the weights, and print what training changed -> config.json.

    Args:
        declared: the context length to declare.
        dtype: of the exported weights.
    """
    eod = stored.tokenizer.eod if stored.tokenizer else None
    # config.json: the source's, with what training changed.
    theirs = export_files.parse_json(stored.carried.get(CONFIG))
    ours = huggingface_config(
        stored.architecture,
        stored.form.config,
        stored.vocab_size,
        stored.rope,
        declared,
        dtype,
        eod,
    )
    config, changes = export_files.merge_config(ours, theirs)
    changes += export_files.rope_change(theirs, stored.rope)
    # transformers reads config.json to open the tokenizer, whose ids are asked for below.
    export_files.write_json(folder / CONFIG, config)

    ids = {} if eod is None else {"eos_token_id": eod}
    if with_tokenizer and _write_tokenizer(stored, folder):
        lines = export_files.complete_tokenizer(folder, stored.carried, declared)
        changes += [f"tokenizer: {line}" for line in lines]
        if not theirs:
            ids = export_files.tokens_by_role(folder) | ids
    # A model that began here gets its tokenizer's ids; an imported one keeps the source's.
    if not theirs:
        config |= ids
        export_files.write_json(folder / CONFIG, config)
    export_files.write_generation(folder, stored.carried, ids)
    export_files.write_legal_files(folder, stored.carried)

    for change in changes:
        print(f"changed since the import: {change}")
    stops = export_files.stop_ids(folder)
    if eod is not None and eod not in stops:
        print(
            f"note: generation stops at {stops}, as the source says; "
            f"documents in training ended with {eod}"
        )
    return config


def _write_tokenizer(stored: StoredModel, folder: Path) -> bool:
    """Write the tokenizer's files -> whether there is one; an error names the way without it."""
    try:
        return export_files.write_tokenizer(folder, stored.tokenizer, stored.carried)
    except ValueError as error:
        raise ValueError(f"{error} Or export without it: --no-tokenizer.") from None
