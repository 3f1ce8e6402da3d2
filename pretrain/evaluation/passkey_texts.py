"""The texts of passkey retrieval as token ids: a sentence with a number, and a question for it."""

from typing import NamedTuple

import numpy as np

from data.tokenizers.tokenizer import Tokenizer

SENTENCE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
LOWEST_KEY = 10_000
HIGHEST_KEY = 99_999


class PasskeyTexts(NamedTuple):
    """The ids that a trial puts into its filler."""

    sentence: np.ndarray
    """int64, the sentence that is hidden."""
    question: np.ndarray
    """int64, the question with its answer."""
    answer_tokens: int
    """How many of the question's last tokens are the answer."""


def write_texts(tokenizer: Tokenizer, key: int) -> PasskeyTexts:
    """Write the sentence and the question for `key`.

    The answer begins where the ids with and without it part, since a tokenizer may join letters
    over its beginning.

    Raises:
        ValueError: the tokenizer has no ids for the text.
    """
    sentence = np.array(tokenizer.encode(SENTENCE.format(key=key)), dtype=np.int64)
    question = np.array(tokenizer.encode(QUESTION), dtype=np.int64)
    answered = np.array(tokenizer.encode(f"{QUESTION} {key}"), dtype=np.int64)
    # At least one token is the answer, even where the ids part after the question.
    most_shared = min(len(question), len(answered) - 1)
    differing = np.flatnonzero(question[:most_shared] != answered[:most_shared])
    shared = int(differing[0]) if len(differing) else most_shared
    return PasskeyTexts(sentence, answered, len(answered) - shared)


def check_passkey_lengths(tokenizer: Tokenizer, lengths: list[int]) -> list[str]:
    """Name the lengths that leave too little filler, as `name = value: rule. Fix: ...`.

    A tokenizer that cannot write the texts has one line for all lengths.
    """
    try:
        texts = write_texts(tokenizer, HIGHEST_KEY)
    except ValueError as error:
        return [
            f"eval_passkey_lengths = {' '.join(map(str, lengths))}: the tokenizer cannot write the "
            f"question ({error}). Fix: leave it out, or another tokenizer."
        ]
    texts_tokens = len(texts.sentence) + len(texts.question)
    least = 2 * texts_tokens
    return [
        f"eval_passkey_lengths = {length}: half of it must hold the hidden sentence and the "
        f"question, {texts_tokens} tokens. Fix: at least {least}."
        for length in lengths
        if length < least
    ]
