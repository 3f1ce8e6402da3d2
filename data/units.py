"""Counts of tokens and sizes in bytes as people write them."""

import re
from decimal import Decimal

UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "B": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
}
"""Unit -> tokens."""
GIB = 2**30
"""Bytes of one GiB."""


def parse_tokens(text: str) -> int:
    """Read a count like 8192, 64Ki, 1.5B or 8Mi; K, M, B, T are powers of ten, Ki, Mi, Gi of 1024.

    Raises:
        ValueError: not such a number, or not a whole number of tokens.
    """
    match = re.fullmatch(r"([0-9_]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2] not in UNITS:
        raise ValueError(
            f"{text!r} is no token count: write a number with an optional unit of "
            f"{', '.join(u for u in UNITS if u)}, like 800B or 8Mi"
        )
    # Decimal: in floating point 1.1B would be no whole number.
    tokens = Decimal(match[1].replace("_", "")) * UNITS[match[2]]
    if tokens > 2**63:
        raise ValueError(f"{text!r}: must be at most 2^63 tokens")
    if tokens != tokens.to_integral_value():
        raise ValueError(f"{text!r} is {tokens} tokens: must be a whole number")
    return int(tokens)


def show_bytes(size: int) -> str:
    """Write a size in bytes: in GiB, or below one in MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def show_tokens(count: int) -> str:
    """Write a count of tokens with the largest unit that it is a whole number of."""
    fitting = [name for name, unit in UNITS.items() if count and count % unit == 0]
    name = max(fitting, key=lambda name: UNITS[name], default="")
    return f"{count // UNITS[name]:,}{name}"
