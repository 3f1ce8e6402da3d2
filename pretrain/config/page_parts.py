"""Parts of the pages about settings: explanations, values and defaults as cells of tables."""

import ast
import dataclasses
import inspect
import textwrap
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pretrain.config.token_count import Tokens

TITLES = {
    "model": "Model",
    "memory": "Memory of activations",
    "layout": "Layout",
    "data": "Data and tokenizer",
    "schedule": "Schedule",
    "optimizer": "Optimizer and learning rate",
    "checkpoint": "Checkpoints",
    "logging": "Logging and evaluation",
    "guards": "Guards against wrong numbers",
}
"""Section -> its heading, in the order of the pages."""


def docstrings_of_fields(cls: type) -> dict[str, str]:
    """Return the text below each field of a dataclass, those of its bases included, on one line."""
    found = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except OSError:  # from make_dataclass: its fields are explained elsewhere
            continue
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        # Python forgets these texts: they are read from the source, each behind its field.
        for statement, after in zip(definition.body, definition.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(after, ast.Expr):
                continue
            if isinstance(statement.target, ast.Name) and isinstance(after.value, ast.Constant):
                found[statement.target.id] = " ".join(str(after.value.value).split())
    return found


def values_of(annotation: Any) -> str:
    """Return what a field takes, in words."""
    if annotation is Tokens:
        return "tokens"
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return values_of(arguments[0])
    # `T | None`: that it may be left out shows in the default.
    if origin in (Union, UnionType):
        return values_of(next(argument for argument in arguments if argument is not type(None)))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"{values_of(arguments[0])} ..."
    return {bool: "switch", int: "number", float: "number", str: "text"}[annotation]


def default_of(declared: dataclasses.Field) -> Any:
    """Return the default of a field."""
    if declared.default_factory is not dataclasses.MISSING:
        return declared.default_factory()
    return declared.default


def show_default(declared: dataclasses.Field) -> str:
    """Return the default as a cell of a table, nothing for None."""
    value = default_of(declared)
    if isinstance(value, bool):
        return "on" if value else "off"
    # Left out means what the explanation says.
    if value is None or value == []:
        return ""
    return f"`{' '.join(map(str, value))}`" if isinstance(value, list) else f"`{value}`"


def show_flag(name: str) -> str:
    """Return a setting as the flag that gives it."""
    return f"`--{name.replace('_', '-')}`"


def make_row(cells: list[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
