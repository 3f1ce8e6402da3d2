"""Rare words are found in any texts, and words that overlap are found among thousands."""

import random

import pytest

from data.tokenizers.added_tokens import _overlapping
from data.tokenizers.text_search import MOST_PREFIXES, TextSearch

UNUSED = [f"<unused{number}>" for number in range(6300)]
LETTERS = [chr(0x4E00 + number) for number in range(3 * MOST_PREFIXES)]


def random_words(draw, letters, most):
    return [
        "".join(draw.choice(letters) for _ in range(draw.randint(1, 5)))
        for _ in range(draw.randint(0, most))
    ]


def count_words(words, text):
    """The longest word at each place from left to right, one letter after another."""
    number = 0
    at = 0
    while at < len(text):
        longest = max((len(word) for word in words if text.startswith(word, at)), default=0)
        number += longest > 0
        at += max(1, longest)
    return number


@pytest.mark.parametrize("seed", range(20))
def test_each_text_has_as_many_words_as_it_holds(seed):
    draw = random.Random(seed)
    words = random_words(draw, "abc<", 6)
    texts = ["".join(random_words(draw, "abc< ", 8)) for _ in range(50)]
    counts = {number: count_words(words, text) for number, text in enumerate(texts)}
    expected = {number: count for number, count in counts.items() if count}
    assert TextSearch(words).count(texts) == expected, words


@pytest.mark.parametrize("words", [UNUSED, LETTERS], ids=["one beginning", "many beginnings"])
def test_thousands_of_words_are_found(words):
    search = TextSearch(words)
    texts = [f"a{words[70]}b{words[-1]}", "plain", words[0], "<unused"]
    assert search.count(texts) == {0: 2, 2: 1}
    assert search.first(texts[0]) == words[70]


def test_a_search_for_nothing_finds_nothing():
    assert TextSearch([""]).count(["", "a"]) == {}


def overlap(one, other):
    """Whether a text may hold both so that they share a letter, by trying all places."""
    for shift in range(-len(other) + 1, len(one)):
        pairs = [
            (one[place], other[place - shift])
            for place in range(max(0, shift), min(len(one), shift + len(other)))
        ]
        if all(first == second for first, second in pairs):
            return True
    return False


@pytest.mark.parametrize("seed", range(100))
def test_words_that_may_cover_each_other_are_found(seed):
    draw = random.Random(seed)
    some = random_words(draw, "abc", 4)
    others = random_words(draw, "cde", 4) + random_words(draw, "abc", 1)
    expected = {
        word for one in some for other in others if overlap(one, other) for word in (one, other)
    }
    assert _overlapping(some, others) == expected, (some, others)


def test_words_among_thousands_that_may_cover_each_other_are_found():
    others = ["d7><x", "plain", "<unused5"]
    expected = {word for word in UNUSED if word.startswith("<unused5")}
    assert _overlapping(UNUSED, others) == expected | {"<unused7>", "d7><x", "<unused5"}
