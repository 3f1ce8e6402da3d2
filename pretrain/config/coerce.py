"""From the text of a flag or a YAML scalar to the type that a setting declares.

Kept in place of pydantic's TypeAdapter, which reads `1.0` as a whole number, `y` as true and `none`
as a text, takes no comma-separated lists, and words its messages otherwise: what we would have to
configure or translate is longer than this file.
"""

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from data.units import parse_tokens
from pretrain.config.token_count import Tokens

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
NOTHING = ("null", "none", "~", "")
"""Words for None, where a setting may be None and has no value of that name."""


def coerce(value: Any, annotation: Any) -> Any:
    """Return `value` (text, or a list of texts) as the type that a field declares.

    Raises:
        ValueError: it is not of that type.
    """
    if annotation is Tokens:
        return parse_tokens(_text(value))
    origin = get_origin(annotation)
    args = get_args(annotation)
    if origin is Annotated:
        return coerce(value, args[0])
    if origin in (Union, types.UnionType):
        # Always `T | None`. A phase's "none" is a value of its own (recompute_granularity).
        inner = next(arg for arg in args if arg is not type(None))
        named = get_args(inner) if get_origin(inner) is Literal else ()
        if isinstance(value, str) and value.lower() in NOTHING and value not in named:
            return None
        return coerce(value, inner)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"must be one of {', '.join(map(str, args))}")
        return value
    # What is left is a list or a single value.
    if origin is list:
        return _list(value, args[0])
    return _scalar(_text(value), annotation)


def _list(value: Any, item: Any) -> list[Any]:
    """Return a list of `item`s; a single value is a list of one, nothing is an empty one."""
    items = value if isinstance(value, list) else [value] if value else []
    if item is int:  # "4 8" and "4,8" are two numbers
        items = [part for each in items for part in _text(each).replace(",", " ").split()]
    return [coerce(each, item) for each in items]


def _scalar(text: str, annotation: Any) -> bool | int | float | str:
    """Return a text as bool, int, float or str."""
    if annotation is bool:
        if text.lower() not in TRUE + FALSE:
            raise ValueError("must be true or false")
        return text.lower() in TRUE
    if annotation in (int, float):
        try:
            return annotation(text.replace("_", ""))
        except ValueError:
            kind = "a whole number" if annotation is int else "a number"
            raise ValueError(f"must be {kind}") from None
    assert annotation is str, annotation
    return text


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a single value, not a {type(value).__name__}")
    return value


def choices_of(annotation: Any) -> tuple:
    """Return the values of a setting that has a list of them, else nothing."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for part in get_args(annotation) if (found := choices_of(part))), ())


def takes(annotation: Any, kind: type) -> bool:
    """Return whether the annotation is `kind`, `kind | None` or `list[...]` (for kind list)."""
    if get_origin(annotation) in (Union, types.UnionType):
        return any(takes(arg, kind) for arg in get_args(annotation))
    return annotation is kind or get_origin(annotation) is kind
