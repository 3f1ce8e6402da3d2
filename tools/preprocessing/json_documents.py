"""Documents in JSON: an object per line, or a file that is one array or object of several lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from tools.preprocessing.input_kinds import ending_of, strip_byte_order_mark
from tools.preprocessing.streams import read_blocks, read_whole
from tools.preprocessing.tables import Unreadable, Value

HEAD_BYTES = 64 << 10
"""Beginning of a .json file that shows whether its first line is an object."""
MOST_GUESSED_BYTES = 1 << 30
"""Size up to which a .json file is parsed to find out whether it is one object of several lines."""
NAMES = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
"""Python types -> what a value of JSON is called in messages."""


def parse(data: bytes) -> Any:
    """Parse some JSON -> its value.

    Raises:
        ValueError: it is not JSON, or not UTF-8.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        # NaN is not JSON to orjson, nor is half a surrogate pair; the other parser decides.
        pass
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 ({error.reason} at byte {error.start}). Fix: convert it, or "
            "--skip-bad-lines to leave it out."
        ) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"not JSON ({error}). Fix: one JSON object per line, or --skip-bad-lines."
        ) from None


def text_of_line(data: bytes, key: str, *, lists: bool) -> str | list:
    """Return the text under the key of a line, or with `lists` also a list.

    Raises:
        ValueError: there is none.
    """
    return text_of(parse(data), key, lists=lists)


def text_of(value: Any, key: str, *, lists: bool) -> str | list:
    """Return the text under the key of an object, or with `lists` also a list.

    Raises:
        ValueError: there is none; what is there instead is named.
    """
    # Each way of having no text has its own fix.
    if not isinstance(value, dict):
        raise ValueError(
            f"is {NAMES[type(value)]}, not an object with a key {key!r}. Fix: objects, or "
            "--skip-bad-lines."
        )
    if key not in value:
        raise ValueError(
            f"no key {key!r} (found: {', '.join(value)}). Fix: --json-keys, --skip-bad-lines, or "
            "--extensions without the ending of such files."
        )
    found = value[key]
    if isinstance(found, str):
        return encodable(found)
    if isinstance(found, list):
        if lists:
            return found
        raise ValueError(
            f"key {key!r} is a list, not text. Fix: --tokenizer-type NullTokenizer if it is token "
            "ids, --json-keys, or --skip-bad-lines."
        )
    wanted = "text or a list of token ids" if lists else "text"
    raise ValueError(
        f"key {key!r} is {NAMES[type(found)]}, not {wanted}. Fix: --json-keys, or --skip-bad-lines."
    )


def encodable(text: str) -> str:
    """Return the text, unless it holds half a surrogate pair: ValueError.

    JSON can write one (`\\ud800`), UTF-8 and tokenizers cannot.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half a surrogate pair at character {error.start}. Fix: the text, or --skip-bad-lines."
        ) from None
    return text


def is_whole_json(path: str | Path) -> bool:
    """Tell whether a .json file is one array or object of several lines, not an object per line."""
    if ending_of(path) != ".json":
        return False
    # The first line shows it, most often.
    head = b""
    for block, _ in read_blocks(str(path)):
        head += block
        if len(head) >= HEAD_BYTES:
            break
    head = strip_byte_order_mark(head[:HEAD_BYTES]).lstrip()
    if head.startswith(b"["):
        return True
    line, newline, _ = head.partition(b"\n")
    if not newline or not line.startswith(b"{") or _is_json(line):
        return False
    # A first line of half an object, or a bad one of many: only the whole file tells.
    if Path(path).stat().st_size > MOST_GUESSED_BYTES:
        return False
    return _is_json(strip_byte_order_mark(read_whole(str(path))))


def _is_json(data: bytes) -> bool:
    """Tell whether some bytes are valid JSON."""
    try:
        parse(data)
    except ValueError:
        return False
    return True


def read_whole_json(path: str, key: str, block_bytes: int) -> Iterator[tuple[list[Value], int]]:
    """Read a file that is one array or object, as (its next values, bytes of the file so far).

    The file has to fit into memory. Values are the texts or lists under the key, about
    `block_bytes` of them at a time.

    Raises:
        ValueError: the file is not JSON.
    """
    # All at once: JSON cannot be cut without parsing it.
    data = strip_byte_order_mark(read_whole(path))
    try:
        whole = parse(data)
    except ValueError as error:
        raise ValueError(f"{path}: begins as one JSON array or object, and is {error}") from None
    # Shares of the file stand for bytes: where an element ended is not known.
    elements = whole if isinstance(whole, list) else [whole]
    size = Path(path).stat().st_size
    values: list[Value] = []
    held = 0
    for number, element in enumerate(elements):
        value = _value_of(element, key)
        values.append(value)
        held += 1 + len(value)
        if held >= block_bytes:
            yield values, size * (number + 1) // len(elements)
            values = []
            held = 0
    if values:
        yield values, size


def _value_of(element: Any, key: str) -> str | list | Unreadable:
    """Return the text or list under the key of an element, or why there is none."""
    try:
        return text_of(element, key, lists=True)
    except ValueError as error:
        return Unreadable(str(error))
