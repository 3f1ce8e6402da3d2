"""Prompts as the user gives them: arguments, lines or JSON lines of a file or of standard input."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizers.tokenizer import NullTokenizer, Tokenizer
from tools.inference.open_model import OpenModel
from tools.shared.message_text import short

STDIN = "-"
"""Stands for standard input in place of a file."""
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
"""Endings of files that hold a JSON value per line."""


@dataclass(frozen=True)
class Prompt:
    """Holds one prompt: its text, or its token ids."""

    name: str
    """What messages call it."""
    text: str | None
    ids: tuple[int, ...] = ()


def prompts_of_arguments(texts: list[str]) -> list[Prompt]:
    """Take prompts from the command line; ValueError where one is not text."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt = {text!r}: is not valid UTF-8 ({error.reason}). Fix: give text."
            ) from None
    names = ["prompt"] if len(texts) == 1 else [f"prompt {i + 1}" for i in range(len(texts))]
    return [Prompt(name, text) for name, text in zip(names, texts, strict=True)]


def read_prompts(source: str) -> list[Prompt]:
    """Read the prompts of a file, or of standard input: a line each, or a JSON value each.

    Raises:
        ValueError: no such file, not UTF-8, no prompt in it, or a line that holds none.
    """
    is_stdin = source == STDIN
    has_json = Path(source).suffix in JSON_LINES
    try:
        if is_stdin:
            content = sys.stdin.buffer.read().decode()
        else:
            content = Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompts = {source}: is not valid UTF-8 ({error.reason}). Fix: give a text file."
        ) from None
    except OSError as error:
        raise ValueError(
            f"prompts = {source}: cannot be read ({error.strerror}). Fix: give a text file."
        ) from None
    # Not splitlines: other separators belong to the text.
    lines = [line.removesuffix("\r") for line in content.split("\n")]
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"prompts = {source}: holds no prompt. Fix: a prompt per line.")
    where = "standard input" if is_stdin else source
    return [
        _prompt_of_json(f"{where}:{number}", line)
        if has_json or (is_stdin and line.startswith('{"'))
        else Prompt(f"{where}:{number}", line)
        for number, line in numbered
    ]


def _prompt_of_json(name: str, line: str) -> Prompt:
    """Read one JSON value; ValueError where it holds no prompt."""
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: is not valid JSON ({error}). Fix: correct the line.") from None
    if isinstance(value, dict):
        value = value.get("prompt", value.get("ids"))
    if isinstance(value, str):
        return Prompt(name, value)
    if isinstance(value, list) and all(type(each) is int for each in value):
        return Prompt(name, None, tuple(value))
    raise ValueError(
        f"{name}: {short(line)}: must hold a text or a list of token ids. "
        'Fix: {"prompt": "text"} or {"ids": [5, 17, 3]}.'
    )


def encode_prompt(prompt: Prompt, model: OpenModel) -> list[int]:
    """Encode a prompt; an empty one as the token that texts begin after.

    Raises:
        ValueError: ids that the model does not have, or an empty prompt that nothing can begin.
    """
    ids = list(prompt.ids)
    if prompt.text is not None:
        ids = tokenizer_of(model).encode(prompt.text)
        begin = list(model.first_ids)
        # A text that has the token already gets no second one.
        if ids[: len(begin)] != begin:
            ids = [*begin, *ids]
    first = model.generation.first_id
    if not ids and first is not None and first < model.vocab_size:
        return [first]
    if not ids:
        raise ValueError(
            f"{prompt.name}: is empty, and {model.source} names no token to begin with. "
            "Fix: give a prompt."
        )
    wrong = next((each for each in ids if not 0 <= each < model.vocab_size), None)
    if wrong is not None and prompt.text is None:
        raise ValueError(
            f"{prompt.name}: token id {wrong}: must be in [0, vocab_size = {model.vocab_size}). "
            "Fix: correct it."
        )
    if wrong is not None:
        raise ValueError(
            f"{prompt.name}: the tokenizer gives id {wrong}, and the model has "
            f"{model.vocab_size} ids. Fix: put the model's own tokenizer into the folder."
        )
    return ids


def tokenizer_of(model: OpenModel) -> Tokenizer:
    """Return the model's tokenizer; without one, texts are token ids."""
    return model.tokenizer or NullTokenizer(model.vocab_size)
