"""Continue a text with an exported model: `bash launch/ithaca.sh generate --load HF_DIR --prompt
TEXT`.

The folder's own generation settings decide where it stops. A folder without a tokenizer takes the
prompt as token ids, `--prompt "5 17 3"`, and prints ids.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.tokenizers.tokenizer import HUGGINGFACE_FILES, NullTokenizer
from tools.shared.door import run_door
from tools.shared.message_text import one_line

LEAST_TEMPERATURE = 1e-4
"""Smallest temperature above 0; logits divided by a smaller one overflow."""

OWN_CODE_ONLY = {"trust_remote_code": False, "local_files_only": True}
"""The folder's own code is never run, and nobody is asked whether it may be."""


@dataclass(kw_only=True)
class Arguments:
    load: str
    """A Hugging Face folder (the command `export` writes one)."""
    prompt: str = ""
    """Text to continue; token ids where the folder has no tokenizer."""
    max_new_tokens: int = 80
    """Tokens to add."""
    temperature: float = 0.8
    """0 = always the likeliest token."""
    seed: int = 1234
    """Seed of the sampling."""


def check_arguments(arguments: Arguments) -> None:
    """Raise ValueError for settings that no model can follow."""
    if not (Path(arguments.load) / "config.json").is_file():
        raise ValueError(
            f"load = {arguments.load}: no Hugging Face folder (no config.json). "
            "Fix: export one with tools.export_hf."
        )
    try:
        arguments.prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prompt = {arguments.prompt!r}: is not valid UTF-8 ({error.reason}). Fix: give text."
        ) from None
    if arguments.max_new_tokens < 0:
        raise ValueError(
            f"max_new_tokens = {arguments.max_new_tokens}: must be at least 0. Fix: for example 80."
        )
    temperature = arguments.temperature
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature = {temperature}: must be 0 (always the likeliest token) or a finite "
            f"number of at least {LEAST_TEMPERATURE}. Fix: for example 0.8."
        )
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"seed = {arguments.seed}: must be in [0, 2**63). Fix: for example 1234.")


def open_tokenizer(folder: Path) -> Any:
    """Open the folder's tokenizer; without one, say on standard error that ids are used -> None."""
    from transformers import AutoTokenizer

    if any((folder / name).is_file() for name in HUGGINGFACE_FILES):
        return AutoTokenizer.from_pretrained(folder, **OWN_CODE_ONLY)
    print(f"note: {folder} has no tokenizer: the prompt and what follows are ids", file=sys.stderr)
    return None


def encode_prompt(arguments: Arguments, tokenizer: Any, model: Any) -> list[int]:
    """Encode the prompt; an empty one as the token that documents begin after.

    Raises:
        ValueError: ids that the model does not have, or an empty prompt that nothing can begin.
    """
    vocab_size = model.config.vocab_size
    if tokenizer is None:
        ids = NullTokenizer(vocab_size).encode(arguments.prompt)
    else:
        ids = tokenizer.encode(arguments.prompt, add_special_tokens=False)
    ids = ids or _beginning(tokenizer, model)
    if not ids:
        raise ValueError(
            f"prompt = {arguments.prompt!r}: is empty, and {arguments.load} names no token to "
            "begin with. Fix: give a prompt."
        )
    if max(ids) >= vocab_size:
        raise ValueError(
            f"prompt: the tokenizer gives id {max(ids)}, and the model has {vocab_size} ids. "
            "Fix: put the model's own tokenizer into the folder."
        )
    return ids


def _beginning(tokenizer: Any, model: Any) -> list[int]:
    """Return the token that begins a text: the tokenizer's, else that which ends documents."""
    own = tokenizer.encode("", add_special_tokens=True) if tokenizer is not None else []
    settings = model.generation_config
    others = _as_list(settings.eos_token_id) + _as_list(settings.bos_token_id)
    # Some folders say -1 where they mean none.
    return own[:1] or [token for token in others if token >= 0][:1]


def _as_list(ids: int | list[int] | None) -> list[int]:
    """Return the ids of a setting that may hold one, several or none."""
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list | tuple) else [ids]


def tokens_to_add(arguments: Arguments, prompt_length: int, model: Any) -> int:
    """Return how many tokens fit after the prompt; say so where they are fewer than asked.

    Raises:
        ValueError: the prompt alone fills the model's context.
    """
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    if arguments.max_new_tokens and prompt_length >= context:
        raise ValueError(
            f"prompt: {prompt_length:,} tokens, and the model's context is {context:,}. "
            "Fix: a shorter prompt."
        )
    # A context that is not named has no end.
    room = min(arguments.max_new_tokens, max(0, context - prompt_length))
    if room < arguments.max_new_tokens:
        print(
            f"note: max_new_tokens = {arguments.max_new_tokens}: {room} fit into the model's "
            f"context of {context:,}",
            file=sys.stderr,
        )
    return int(room)


def continue_prompt(arguments: Arguments, tokenizer: Any, model: Any) -> list[int]:
    """Generate -> the token ids of the prompt and what the model adds.

    Raises:
        ValueError: bad input, settings in the folder that transformers cannot follow, or logits
            that are not numbers.
    """
    # Nothing to add: the prompt alone, also where it fills the context.
    ids = encode_prompt(arguments, tokenizer, model)
    count = tokens_to_add(arguments, len(ids), model)
    if count == 0:
        return ids
    settings = model.generation_config
    if settings.pad_token_id is None:
        # One text needs no padding; without an id the library warns.
        settings.pad_token_id = (_as_list(settings.eos_token_id) or [0])[0]
    # The folder's settings decide about the rest, like stop ids and top_p.
    options: dict[str, Any] = {
        "do_sample": False,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
    }
    if arguments.temperature > 0:
        options |= {"do_sample": True, "temperature": float(arguments.temperature)}
    torch.manual_seed(arguments.seed)
    prompt = torch.tensor([ids])
    try:
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            logits_processor=[_refuse_nan],
            **options,
        )
    except Exception as error:  # a folder's settings may lead to errors of any kind
        raise ValueError(
            f"load = {arguments.load}: transformers cannot generate with it ({one_line(error)}). "
            "Fix: correct its generation_config.json, or export it again."
        ) from None
    return out[0].tolist()


def _refuse_nan(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Stop where logits are not numbers: the likeliest token would be the first of those."""
    if logits.isnan().any():
        raise ValueError("its logits are NaN")
    return logits


def generate(arguments: Arguments) -> str:
    """Continue the prompt -> it and its continuation, as text or as ids.

    Raises:
        ValueError: bad input, or a folder that transformers cannot read.
    """
    check_arguments(arguments)
    # Imported late: it takes seconds, and bad arguments are refused before.
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = Path(arguments.load)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **OWN_CODE_ONLY).eval()
        tokenizer = open_tokenizer(folder)
    except Exception as error:  # transformers raises many kinds for a bad folder
        raise ValueError(
            f"load = {folder}: transformers cannot read it ({one_line(error)}). "
            "Fix: export it again."
        ) from None
    ids = continue_prompt(arguments, tokenizer, model)
    if tokenizer is None:
        return " ".join(map(str, ids))
    return tokenizer.decode(ids)


def print_continuation(arguments: Arguments) -> None:
    """Print the prompt and its continuation."""
    print(generate(arguments))


def main(argv: list[str] | None = None) -> int:
    return run_door(
        Arguments, print_continuation, name="tools.generate", description=__doc__, argv=argv
    )


if __name__ == "__main__":
    sys.exit(main())
