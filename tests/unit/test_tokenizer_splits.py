"""gigatoken splits texts as the tokenizers library does, by each pattern that it is trusted with.

The vocabulary merges pairs of bytes, a third of all, so that the ids show where a text was split.
"""

import functools
import json
import random
import unicodedata

import pytest

from data.tokenizers.identity import byte_letters
from data.tokenizers.rules import rules_of_tokenizer_json
from data.tokenizers.splits import SPLITS
from tests.marks import cases

WORDS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\r",
    "\t",
    "'",
    "'s",
    "'LL",
    "'ſ",
    "\u3000",
    "\u00a0",
    "\u0085",
    "\u2028",
    "1",
    "12",
    "1234",
    "a",
    "Ab",
    "ABc",
    "!",
    "/",
    "//\n",
    "é",
    "e\u0301",
    "日",
    "の",
    "१",
    "½",
    "😀",
    "ǅ",
    "ʰ",
    "ª",
    "\u0903",
    "\u200d",
    "ʕ",
    "\u0c5c",
]
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s+"
)


@functools.cache
def model():
    letters = byte_letters()
    merges = [[one, other] for one in letters for other in letters]
    random.Random(0).shuffle(merges)
    merges = merges[:20_000]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    vocabulary |= {one + other: 256 + number for number, (one, other) in enumerate(merges)}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def definition(patterns, normalizer=None):
    last = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": not patterns,
    }
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": normalizer,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, last]}
            if splits
            else last,
            "post_processor": None,
            "decoder": None,
            "model": model(),
        }
    )


def first_other_text(text_definition, texts):
    """The first of the fast texts to which gigatoken gives other ids than the library."""
    import gigatoken
    from tokenizers import Tokenizer

    rules = rules_of_tokenizer_json(text_definition, keep_special=False)
    slow = set(rules.slow(texts))
    fast = [text for index, text in enumerate(texts) if index not in slow]
    assert len(fast) > len(texts) // 4, "the rules let hardly a text through"
    encoded = Tokenizer.from_str(text_definition).encode_batch_fast(fast, add_special_tokens=False)
    rows = (
        gigatoken.Tokenizer.from_json(rules.definition).encode_batch(fast, parallel=False).to_list()
    )
    pairs = zip(fast, encoded, rows, strict=True)
    return next((text for text, theirs, ours in pairs if theirs.ids != list(map(int, ours))), None)


def random_texts(count, seed):
    draw = random.Random(seed)
    ascii_letters = [chr(code) for code in range(128)]
    return [
        "".join(
            draw.choice(WORDS if draw.random() < 0.7 else ascii_letters)
            for _ in range(draw.randint(1, 16))
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", [None, *SPLITS])
def test_random_texts_are_split_alike(name):
    patterns = SPLITS[name] if name else ()
    assert first_other_text(definition(patterns), random_texts(1500, seed=1)) is None


@pytest.mark.parametrize("name", cases([*SPLITS], lambda name: True))
def test_every_letter_is_split_alike(name):
    letters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = [
        f"a{c}b 1{c}2 {c}b !{c}? \n{c} '{c}A{c}a  {c}"
        for c in letters
        if unicodedata.category(c) != "Cn"
    ]
    for begin in range(0, len(texts), 50_000):
        other = first_other_text(definition(SPLITS[name]), texts[begin : begin + 50_000])
        assert other is None, ascii(other)


def test_a_pattern_that_is_split_otherwise_is_refused():
    """It reads as cl100k's, and gigatoken takes it for that."""
    with pytest.raises(ValueError, match="gigatoken is not known to split by"):
        rules_of_tokenizer_json(definition([CL100K]), keep_special=False)


@pytest.mark.parametrize("count", [3000, pytest.param(200_000, marks=pytest.mark.long)])
def test_normalized_texts_are_the_same_in_any_unicode(count):
    """Pairs of letters that compose, and marks in any order: what NFC leaves alone is fast."""
    draw = random.Random(2)
    marks = [chr(code) for code in range(0x110000) if unicodedata.combining(chr(code))]
    whole = [
        chr(code)
        for code in range(0x110000)
        if unicodedata.decomposition(chr(code))[:1] not in ("", "<")
    ]
    parts = [unicodedata.normalize("NFD", letter) for letter in whole] + [
        "\U000113c2",
        "\U0001611e",
        "\U00016d67",
    ]
    texts = [
        draw.choice(parts)[0] + draw.choice([draw.choice(marks), draw.choice(parts)[-1]])
        for _ in range(count)
    ]
    texts += ["a" + draw.choice(marks) + draw.choice(marks) for _ in range(count)]
    assert first_other_text(definition(SPLITS["qwen2"], {"type": "NFC"}), texts) is None
