"""The type of a setting that counts tokens."""

from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

from data.units import parse_tokens

Tokens = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="TOKENS",
        instance_from_str=lambda args: parse_tokens(args[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""A count of tokens in a field: YAML and flags accept 800B and 8Mi."""
