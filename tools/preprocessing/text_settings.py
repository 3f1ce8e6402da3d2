"""How a tool that tokenizes text treats special tokens in it and around it."""

from data.tokenizers.folder import IdsFrom, SpecialTokensInText
from data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from tools.preprocessing.encoders import TextCounts
from tools.shared.message_text import count_of


def build_text_tokenizer(
    tokenizer_type: str,
    model: str | None,
    vocab_size: int | None,
    *,
    ids_from: IdsFrom | None,
    special_tokens_in_text: SpecialTokensInText,
) -> Tokenizer:
    """Build the tokenizer of a `--tokenizer-type`, which takes special tokens in text as asked.

    Raises:
        ValueError: as build_tokenizer does; a setting has no effect; or special tokens cannot be
            text.
    """
    # Settings without effect are errors: they were meant to do something.
    if ids_from is not None and tokenizer_type != "HuggingFaceTokenizer":
        raise ValueError(
            f"tokenizer_ids_from = {ids_from}: has no effect with tokenizer_type = "
            f"{tokenizer_type}. Fix: remove it."
        )
    if special_tokens_in_text != "as-text" and tokenizer_type == "NullTokenizer":
        raise ValueError(
            f"special_tokens_in_text = {special_tokens_in_text}: has no effect on integers. Fix: "
            "remove it."
        )
    keep = special_tokens_in_text == "keep"
    tokenizer = build_tokenizer(
        tokenizer_type, model, vocab_size, ids_from=ids_from, keep_special=keep
    )
    # Some vocabularies hold a special token among their words: it cannot be kept from them.
    left = tokenizer.special_tokens_left() if special_tokens_in_text == "as-text" else []
    if left:
        raise ValueError(
            f"special_tokens_in_text = as-text: the tokenizer has {left[0]!r} in the vocabulary of "
            "its words, and gives its id wherever it is written. Fix: --special-tokens-in-text "
            "refuse, or keep."
        )
    return tokenizer


def find_bos(tokenizer: Tokenizer, *, wanted: bool) -> int | None:
    """Return the id to put before documents, None for nothing; ValueError if there is none."""
    if not wanted:
        return None
    if tokenizer.bos is None:
        raise ValueError(
            "prepend_bos = True: the tokenizer has no beginning-of-sequence token. Fix: remove it."
        )
    return tokenizer.bos


def describe_special_tokens(counts: TextCounts, setting: SpecialTokensInText) -> str:
    """Write the sentence about special tokens in documents; empty where there were none."""
    # Under "refuse" there are none: the first would have stopped the run.
    if not counts.special_documents:
        return ""
    became = (
        "were kept as those tokens"
        if setting == "keep"
        else "became text (--special-tokens-in-text keep or refuse for another way)"
    )
    return (
        f"special tokens: written {count_of(counts.special_tokens, 'time')} in "
        f"{count_of(counts.special_documents, 'document')}, they {became}"
    )
