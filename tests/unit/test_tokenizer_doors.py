"""Text to ids equals the reference tokenizer for any Unicode, over eight families of tokenizers.

The references are the tokenizers library and SentencePiece themselves, called directly; the
tokenizers are trained here, and small.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data.tokenizers.fast import CheckedEncoder, encode_one_by_one
from data.tokenizers.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [path.read_text() for path in sorted((ROOT / "data").glob("*.py"))[:8]] + [
    "người Việt không biết hiểu được tiếng Việt " * 4,
    "한국어 텍스트 " * 4,
    "日本語のテキスト " * 4,
    "Straße façade " * 4,
]
SPECIAL = "<|end|>"
ADDED = ("không", "<sep>", "\n\n", "Café")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
MARK = "\u2581"

# ---------------------------------------------------------------- the families


def save(folder, tokenizer, *, added=ADDED, normalized=False):
    """Write the folder of a trained tokenizer, with added tokens that are not special."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(word, normalized=normalized) for word in added])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL})
    )
    return "HuggingFaceTokenizer", str(folder)


def byte_level(folder, *, pattern=None, normalizer=None, ignore_merges=False, **options):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=[SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return save(folder, tokenizer, **options)


def gpt2(folder):
    return byte_level(folder)


def llama3(folder):
    return byte_level(folder, pattern=LLAMA3, ignore_merges=True, added=())


def qwen2(folder):
    from tokenizers import normalizers

    return byte_level(folder, pattern=QWEN2, normalizer=normalizers.NFC(), normalized=True)


def sentencepiece_model(folder, **options):
    import sentencepiece

    folder.mkdir()
    lines = "\n".join(TEXTS).splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "m"),
        vocab_size=600,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **options,
    )
    return "SentencePieceTokenizer", str(folder / "m.model")


def unigram(folder):
    return sentencepiece_model(folder, model_type="unigram")


def sentencepiece_bpe(folder):
    return sentencepiece_model(
        folder,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<sep>", "foo", MARK + MARK],
    )


def sentencepiece_bpe_nfkc(folder):
    return sentencepiece_model(folder, model_type="bpe")


def fallback_bpe(folder, normalizer, pre_tokenizer, **options):
    """A tokenizer.json with the vocabulary and merges of a SentencePiece model."""
    from tokenizers import Tokenizer

    from data.tokenizers.convert import convert_sentencepiece

    _, model = sentencepiece_model(
        folder.with_name(folder.name + "-pieces"),
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    parts = json.loads(convert_sentencepiece(model)[0].to_str())
    end = {
        "id": 2,
        "content": "</s>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    parts |= {"added_tokens": [end], "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    return save(folder, Tokenizer.from_str(json.dumps(parts)), **options)


TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}


def llama2(folder):
    steps = [{"type": "Prepend", "prepend": MARK}, TO_MARK]
    return fallback_bpe(folder, {"type": "Sequence", "normalizers": steps}, None, added=("<sep>",))


def gemma(folder):
    split = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    return fallback_bpe(folder, TO_MARK, split)


def metaspace(folder):
    step = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "first", "split": True}
    return fallback_bpe(folder, None, step)


def wordpiece(folder):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.WordPieceTrainer(
            vocab_size=700, special_tokens=["[UNK]", SPECIAL], show_progress=False
        ),
    )
    return save(folder, tokenizer)


FAMILIES = {
    make.__name__: make
    for make in (
        gpt2,
        llama3,
        qwen2,
        unigram,
        sentencepiece_bpe,
        sentencepiece_bpe_nfkc,
        llama2,
        gemma,
        metaspace,
        wordpiece,
    )
}
FAST = (
    "gpt2",
    "llama3",
    "qwen2",
    "sentencepiece_bpe",
    "sentencepiece_bpe_nfkc",
    "llama2",
    "gemma",
    "metaspace",
)
"""Those that gigatoken reads: plain English must go through it."""
ENGLISH = "The quick brown fox jumps over the lazy dog; 12 times.\nAnd again, it's said."


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, our tokenizer, the fast encoder or None, the reference)."""
    folder = tmp_path_factory.mktemp("families") / request.param
    kind, model = FAMILIES[request.param](folder)
    ids_from = "tokenizer.json" if kind == "HuggingFaceTokenizer" else None
    tokenizer = build_tokenizer(kind, model, None, ids_from=ids_from)
    try:
        fast = CheckedEncoder(tokenizer, tokenizer.fast_rules())
    except ValueError:
        fast = None
    return request.param, tokenizer, fast, reference(kind, model)


def reference(kind, model):
    """Text -> ids, by the library itself."""
    if kind == "SentencePieceTokenizer":
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=model).encode
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


# ---------------------------------------------------------------- the property

PIECES = st.sampled_from(
    [
        SPECIAL,
        SPECIAL[:4],
        "|>",
        "</s>",
        "<s>",
        "<unk>",
        "<0x0A>",
        "<sep>",
        "foo",
        "không",
        "Café",
        "Cafe\u0301",
        "kho\u0302ng",
        "\n\n",
        "\r\n",
        " ",
        "  ",
        " " * 40,
        "\t",
        MARK,
        "\x00",
        "\x1f",
        "\x85",
        "\u3000",
        "\u00a0",
        "\u200b",
        "\ufeff",
        "\u0301",
        "\u1100\u1161\u11a8",
        "각",
        "ﬁ",
        "½",
        "१२३",
        "ſ",
        "ʕ",
        "😀",
        "\U000113c2\U000113c2",
        "\U0001611e\U0001611e",
        "\U00016d67\U00016d67",
        "\U000113c2",
        "\u0c5c",
        "\ua7ce",
        "I'm we'LL",
        "def f(x):",
        "12345",
        "the",
        "Việt",
    ]
)
TEXT = st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=8).map("".join)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(texts=st.lists(TEXT, min_size=1, max_size=12))
@example(
    texts=[
        "foo is the first word",
        "<sep> begins",
        "Cafe\u0301 Café",
        "a\U000113c2\U000113c2b",
        "",
        "  x  ",
        f"< {MARK}a",
        f"x{MARK} a",
    ]
)
def test_any_text_has_the_ids_of_the_reference(family, texts):
    name, tokenizer, fast, expected = family
    assert [tokenizer.encode(text) for text in texts] == [expected(text) for text in texts], name
    if fast is None:
        return
    encoded = fast.encode_batch(texts)
    rows = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])
    for text, row in zip(texts, rows, strict=True):
        assert row.tolist() == expected(text), (name, text)


SYMBOLS = {"user_defined_symbols": ["<sep>", "foo", "\n\n", f"{MARK}foo"]}
IDENTITY = {"normalization_rule_name": "identity"}
CONVERSIONS = {
    "spaces kept": (
        IDENTITY | {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
        None,
    ),
    "dummy prefix": (IDENTITY | {"remove_extra_whitespaces": False}, None),
    "spaces removed": (IDENTITY, None),
    "symbols": (
        IDENTITY | SYMBOLS | {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
        None,
    ),
    "symbols and prefix": (
        IDENTITY | SYMBOLS | {"remove_extra_whitespaces": False},
        "user-defined symbols",
    ),
    "symbols, spaces removed": (
        IDENTITY | SYMBOLS | {"add_dummy_prefix": False},
        "spaces beside its user-defined",
    ),
    "symbols with spaces": (
        IDENTITY
        | {"user_defined_symbols": ["qq zz"]}
        | {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
        "symbol 'qq zz', which holds a space",
    ),
    "nmt_nfkc": ({}, "letters that its normalization .nmt_nfkc. changes"),
}
"""SentencePiece settings -> (options, why their export is refused, if it is)."""

REFUSED_CONVERSIONS = [name for name, (_, refusal) in CONVERSIONS.items() if refusal]


@pytest.mark.parametrize("name", REFUSED_CONVERSIONS)
def test_a_tokenizer_that_cannot_be_exported_whole_is_refused(tmp_path, name):
    options, refusal = CONVERSIONS[name]
    kind, model = sentencepiece_model(tmp_path / "m", model_type="bpe", **options)
    tokenizer = build_tokenizer(kind, model, None)
    with pytest.raises(ValueError, match=f"no tokenizer.json gives the ids .*{refusal}.*Fix"):
        tokenizer.save_huggingface(str(tmp_path))


@pytest.fixture(
    scope="module", params=[name for name in CONVERSIONS if name not in REFUSED_CONVERSIONS]
)
def conversion(request, tmp_path_factory):
    """(the reference, the exported tokenizer in transformers)."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("conversion")
    options, _ = CONVERSIONS[request.param]
    kind, model = sentencepiece_model(folder / "m", model_type="bpe", **options)
    build_tokenizer(kind, model, None).save_huggingface(str(folder))
    return reference(kind, model), AutoTokenizer.from_pretrained(folder)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(texts=st.lists(TEXT, min_size=1, max_size=12))
@example(
    texts=["foo is", " foo ", "a  foo\n\n", "\n", "\t x \u3000", MARK, f"a{MARK}{MARK}b", "", "  "]
)
def test_an_exported_tokenizer_has_the_ids_of_sentencepiece(conversion, texts):
    expected, exported = conversion
    for text in texts:
        ids = exported.encode(text, add_special_tokens=False, verbose=False)
        assert ids == expected(text), text


def test_plain_english_is_encoded_fast(family):
    name, tokenizer, fast, _ = family
    assert (fast is not None) == (name in FAST), name
    if fast is not None:
        assert fast.rules.slow([ENGLISH]) == [], name
        assert (
            fast.encode_batch([ENGLISH]).ids.tolist()
            == encode_one_by_one(tokenizer, [ENGLISH])[0].tolist()
        )
