"""Counts of tokens as people write them."""

import re
from math import isfinite

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def parse_tokens(text: str) -> int:
    """'8192', '64Ki', '1.5B', '8Mi' -> tokens. K, M, B, T are powers of ten; Ki, Mi, Gi of 1024.

    Raises:
        ValueError: not such a number, or not a whole number of tokens.
    """
    match = re.fullmatch(r"([0-9_]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2] not in UNITS:
        raise ValueError(f"{text!r} is no token count: write a number with an optional unit of "
                         f"{', '.join(u for u in UNITS if u)}, like 800B or 8Mi")
    tokens = float(match[1].replace("_", "")) * UNITS[match[2]]
    if match[2] == "" and match[1].replace("_", "").isdigit():
        return int(match[1].replace("_", ""))
    if not isfinite(tokens) or tokens != int(tokens):
        raise ValueError(f"{text!r} is {tokens} tokens: must be a whole number")
    return int(tokens)
