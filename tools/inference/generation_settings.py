"""What a model's source says of generation: ids that end a text, and how tokens are drawn."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizers.folder import HuggingFace
from data.tokenizers.tokenizer import Tokenizer
from pretrain.checkpointing.model_files import CONFIG, GENERATION
from tools.shared.message_text import short

FOLLOWED = ("temperature", "top_p", "top_k", "repetition_penalty", "do_sample")
"""Keys of generation_config.json that decide how tokens are drawn here."""
_WITHOUT_EFFECT = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "stop_strings": None,
    "watermarking_config": None,
    "diversity_penalty": 0.0,
    "constraints": None,
    "force_words_ids": None,
}
"""Key that would change tokens and is not followed -> the value that changes none."""
_CORRECT = "Fix: correct the file, or remove it."


@dataclass(frozen=True)
class GenerationSettings:
    """Holds what the source says of generation; None where it says nothing."""

    stop_ids: tuple[int, ...] = ()
    """Ids that end a text."""
    first_id: int | None = None
    """Id after which a text begins: that of an empty prompt."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    do_sample: bool | None = None
    unfollowed: tuple[str, ...] = ()
    """Settings that would change tokens and are not followed, as `name = value`."""


def read_generation_settings(
    folder: Path | None, eod: int | None, tokenizer: Tokenizer | None
) -> GenerationSettings:
    """Read generation_config.json, or the ids that config.json names.

    Args:
        folder: with these files; None where the model has no such folder.
        eod: the tokenizer's end-of-document id, which counts for a model without such a folder.

    Raises:
        ValueError: values that mean nothing, a line each.
    """
    content: dict[str, Any] = {}
    if folder is not None and (folder / GENERATION).is_file():
        content = _read_object(folder / GENERATION)
    problems = _value_problems(content)
    stops = content.get("eos_token_id")
    begin = content.get("bos_token_id")
    if folder is not None and (stops is None or begin is None) and (folder / CONFIG).is_file():
        of_config = _read_with_transformers(folder)
        stops = getattr(of_config, "eos_token_id", None) if stops is None else stops
        begin = getattr(of_config, "bos_token_id", None) if begin is None else begin
    stop_ids, stop_problems = _ids_of("eos_token_id", stops)
    begin_ids, begin_problems = _ids_of("bos_token_id", begin)
    problems += stop_problems + begin_problems
    if problems:
        raise ValueError("\n".join(f"{folder}: {problem}" for problem in problems))
    if folder is None and eod is not None:
        stop_ids = [eod]
    own = tokenizer.prefix_id if isinstance(tokenizer, HuggingFace) else None
    candidates = [*([own] if own is not None else []), *stop_ids, *begin_ids]
    return GenerationSettings(
        stop_ids=tuple(stop_ids),
        first_id=candidates[0] if candidates else None,
        unfollowed=tuple(
            f"{name} = {short(content[name])}"
            for name, neutral in _WITHOUT_EFFECT.items()
            if content.get(name) not in (None, neutral)
        ),
        **{name: content.get(name) for name in FOLLOWED},
    )


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON ({error}). {_CORRECT}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {short(content)}, not an object. {_CORRECT}")
    return content


def _read_with_transformers(folder: Path) -> Any:
    """Read config.json with transformers, whose classes have ids of their own by default."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _ids_of(name: str, value: Any) -> tuple[list[int], list[str]]:
    """Read a setting that holds one id, several or none -> (the ids, what is wrong)."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if any(type(each) is not int for each in values):
        return [], [f"{name} = {short(value)}: must be token ids. {_CORRECT}"]
    # Some folders say -1 where they mean none.
    return [each for each in values if each >= 0], []


def _value_problems(content: dict[str, Any]) -> list[str]:
    """List values that mean nothing, of the keys that are followed."""

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    rules: dict[str, tuple[str, Any]] = {
        "temperature": ("a number from 0", lambda value: is_number(value) and value >= 0),
        "top_p": ("a number above 0, up to 1", lambda value: is_number(value) and 0 < value <= 1),
        "top_k": ("a whole number from 0", lambda value: type(value) is int and value >= 0),
        "repetition_penalty": ("a number above 0", lambda value: is_number(value) and value > 0),
        "do_sample": ("true or false", lambda value: type(value) is bool),
    }
    return [
        f"{GENERATION}: {name} = {short(content[name])}: must be {rule}. {_CORRECT}"
        for name, (rule, holds) in rules.items()
        if content.get(name) is not None and not holds(content[name])
    ]
