"""Patterns of byte-level tokenizers that gigatoken splits texts by identically.

gigatoken knows more of them, but takes cl100k's for one thing in two spellings, neither of which it
splits by as the tokenizers library does: `{1,3}+` is no possessive quantifier there. A pattern is
listed here once tests/unit/test_tokenizer_splits.py passes for it.
"""

# Parts that several patterns have.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _plain(*, digits: str) -> str:
    """Write the pattern that takes letters whatever their case."""
    return rf"{_CONTRACTION}|{_BEFORE}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"


def _by_case(*, contraction: str, digits: str) -> str:
    """Write the pattern that splits words before a capital letter."""
    words = rf"{_BEFORE}{_UPPER}*{_LOWER}+{contraction}|{_BEFORE}{_UPPER}+{_LOWER}*{contraction}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"


SPLITS: dict[str, tuple[str, ...]] = {
    "gpt2": (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",),
    "qwen2": (_plain(digits=r"\p{N}"),),
    "llama3": (_plain(digits=r"\p{N}{1,3}"),),
    "qwen3.5": (
        rf"{_CONTRACTION}|{_BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}|"
        rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}",
    ),
    "o200k": (_by_case(contraction=f"{_CONTRACTION}?", digits=r"\p{N}{1,3}"),),
    "nemotron": (_by_case(contraction="", digits=r"\p{N}"),),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|"
        "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
        " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ),
}
"""Name -> the patterns of the splits, one after another."""
