"""Tokenizers: lossless on source code, the same ids in transformers, settings refused with a
fix."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.tokenizers.identity import same_tokenizer
from data.tokenizers.tokenizer import SAMPLE_TEXT, SentencePiece, build_tokenizer
from tools.train_tokenizer import Arguments, main, sample_texts, train_tokenizer

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for folder in ("data", "tools", "tests/unit") for path in (ROOT / folder).glob("*.py")
)
TEXTS = [
    SAMPLE_TEXT,
    "",
    " ",
    "\n",
    "\t",
    "   \n\n\n\t\t  x  ",
    "a" * 300 + " " * 300,
    "é😀\u200d\u0000\ufeff",
    "1234567890",
    "</s><s><unk><0x0A>",
] + [path.read_text() for path in SOURCES]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("tokenizer") / "small"
    return train_tokenizer(
        Arguments(
            input=[str(ROOT / "data"), str(ROOT / "tools")],
            output_prefix=str(prefix),
            vocab_size=1024,
        )
    )


def test_encoding_is_lossless(model):
    tokenizer = build_tokenizer("SentencePieceTokenizer", model, None)
    assert tokenizer.vocab_size == 1024 and tokenizer.eod == 2 and tokenizer.files == [model]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(3 <= i < 1024 for i in ids)
    assert len(tokenizer.encode(" " * 8)) < 4 and len(tokenizer.encode("2026")) == 4


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3"])
def test_same_ids_in_transformers(model, tmp_path, model_type):
    """With the config.json of an exported model beside it: transformers picks the class by both."""
    transformers = pytest.importorskip("transformers")
    tokenizer = SentencePiece(model)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer.save_huggingface(str(tmp_path))
    assert {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"} <= {
        path.name for path in tmp_path.iterdir()
    }
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.eod and len(theirs) == tokenizer.vocab_size
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text
    ours = build_tokenizer("HuggingFaceTokenizer", str(tmp_path), None)
    assert (ours.vocab_size, ours.eod) == (1024, 2) and ours.encode(
        SAMPLE_TEXT
    ) == tokenizer.encode(SAMPLE_TEXT)
    assert ours.decode(ours.encode(SAMPLE_TEXT)) == SAMPLE_TEXT
    again = tmp_path / "again"
    again.mkdir()
    ours.save_huggingface(str(again))
    assert build_tokenizer("HuggingFaceTokenizer", str(again), None).describe() == ours.describe()
    # A run on the .model file and one on the folder are of one tokenizer.
    assert same_tokenizer(ours.describe(), tokenizer.describe())
    assert same_tokenizer(tokenizer.describe(), ours.describe())


def test_a_folder_is_a_model_only_where_its_ids_are_proven_to_be(model, tmp_path):
    pytest.importorskip("transformers")
    tokenizer = SentencePiece(model)
    tokenizer.save_huggingface(str(tmp_path))
    definition = tmp_path / "tokenizer.json"
    parts = json.loads(definition.read_text())

    def is_model():
        # Read as AutoTokenizer reads it, where a changed file leaves a choice.
        folder = build_tokenizer(
            "HuggingFaceTokenizer", str(tmp_path), None, ids_from="tokenizer.json"
        )
        return same_tokenizer(folder.describe(), tokenizer.describe())

    assert is_model()
    # Two merges in the other order; two pieces with each other's ids.
    merges = parts["model"]["merges"]
    other = parts | {"model": parts["model"] | {"merges": merges[1::-1] + merges[2:]}}
    definition.write_text(json.dumps(other))
    assert not is_model()
    pieces = list(parts["model"]["vocab"].items())
    (first, low), (second, high) = pieces[-2:]
    vocabulary = dict(pieces[:-2]) | {first: high, second: low}
    definition.write_text(json.dumps(parts | {"model": parts["model"] | {"vocab": vocabulary}}))
    assert not is_model()
    # The same pieces, and another one that ends documents.
    definition.write_text(json.dumps(parts))
    settings = tmp_path / "tokenizer_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps(json.loads(before) | {"eos_token": "<s>"}))
    assert not is_model()
    settings.write_text(before)
    # Another model's file beside it, or none.
    (tmp_path / "tokenizer.model").write_bytes(b"another tokenizer's format")
    assert not is_model()
    (tmp_path / "tokenizer.model").unlink()
    assert not is_model()


def test_other_ids_in_transformers_are_refused(model, tmp_path):
    """transformers 5 gives qwen2 folders its own tokenizer class, whatever the files say."""
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ValueError, match="gives other ids than the tokenizer trained with.*Fix"):
        SentencePiece(model).save_huggingface(str(tmp_path))


def test_models_of_other_makers_convert(tmp_path):
    """With a dummy prefix, as Llama 2 has it, and with user-defined symbols; Unigram is refused."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("transformers")

    def make(kind, **options):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(path.read_text() for path in SOURCES).splitlines()),
            model_prefix=str(tmp_path / kind),
            vocab_size=600,
            byte_fallback=True,
            minloglevel=2,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            **options,
        )
        return SentencePiece(str(tmp_path / f"{kind}.model"))

    make("llama2", model_type="bpe").save_huggingface(str(tmp_path))
    make(
        "newlines", model_type="bpe", add_dummy_prefix=False, user_defined_symbols=["\n", "\n\n"]
    ).save_huggingface(str(tmp_path))
    with pytest.raises(ValueError, match="a UNIGRAM model; only BPE converts to Hugging Face. Fix"):
        make("unigram", model_type="unigram").save_huggingface(str(tmp_path))


def test_description_follows_the_bytes(model, tmp_path):
    copy = tmp_path / "renamed.model"
    copy.write_bytes(Path(model).read_bytes())
    assert SentencePiece(model).describe() == SentencePiece(str(copy)).describe()
    assert set(SentencePiece(model).describe()) == {"type", "vocab_size", "fingerprint"}
    assert (
        build_tokenizer("Llama2Tokenizer", model, None).describe()
        == SentencePiece(model).describe()
    )


def test_null_tokenizer():
    tokenizer = build_tokenizer("NullTokenizer", None, 100)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.files) == (100, 99, [])
    assert tokenizer.encode(" 1 2\n99 ") == [1, 2, 99] and tokenizer.decode([1, 2]) == "1 2"
    for text, message in (
        ("1 100", r"token id 100: must be in \[0, vocab_size = 100\). Fix"),
        ("-1", "token id -1"),
        ("1 x", "must be whitespace-separated integers.*Fix"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match="there is no tokenizer to write.*Fix"):
        tokenizer.save_huggingface("folder")


def test_refuses(tmp_path):
    (tmp_path / "bad.model").write_text("no model")
    for kind, model, size, message in (
        ("NullTokenizer", None, None, "NullTokenizer needs at least 2. Fix"),
        ("GPT2BPETokenizer", "m", None, "unknown. Fix: one of SentencePieceTokenizer"),
        ("SentencePieceTokenizer", None, None, "must be given for SentencePieceTokenizer. Fix"),
        ("SentencePieceTokenizer", "missing.model", None, "no such file. Fix"),
        (
            "SentencePieceTokenizer",
            str(tmp_path / "bad.model"),
            None,
            "not a SentencePiece model.*Fix",
        ),
        ("HuggingFaceTokenizer", "meta-llama/none", None, "must be a local folder.*Fix"),
    ):
        with pytest.raises(ValueError, match=message):
            build_tokenizer(kind, model, size)
    pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="transformers cannot read it.*Fix"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path), None)


def test_training_sample_is_bounded_seeded_and_even(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(f"{name} line\n" * 100_000)
    files = sorted(tmp_path.glob("*.txt"))
    texts = list(sample_texts(files, 400_000, 1, "text"))
    assert 400_000 <= sum(map(len, texts)) + 8 * len(texts) < 400_000 + 2 * (64 << 10)
    assert (
        texts
        == list(sample_texts(files, 400_000, 1, "text"))
        != list(sample_texts(files, 400_000, 2, "text"))
    )
    assert len({text[0] for text in texts}) >= 3
    assert {line for text in texts for line in text.splitlines()} <= {
        f"{name} line" for name in "abcd"
    }
    assert sum(map(len, sample_texts(files, 10**9, 1, "text"))) > 0.99 * 4 * 700_000
    (tmp_path / "e.jsonl").write_text('{"text": "one\\ntwo"}\nbad\n{"text": "three"}\n')
    assert list(sample_texts([tmp_path / "e.jsonl"], 100, 1, "text")) == ["one\ntwo", "three"]


def train_on(tmp_path, name, content, **settings):
    (tmp_path / name).write_text(content)
    inputs = [str(tmp_path / name)]
    arguments = Arguments(
        input=inputs, output_prefix=str(tmp_path / "t"), vocab_size=400, **settings
    )
    return train_tokenizer(arguments)


def test_lines_without_text_are_counted(tmp_path, capsys):
    source = (ROOT / "data" / "indexed.py").read_text()
    content = json.dumps({"text": source}) + "\n" + '{"text": 5}\n' + '{"body": "x"}\n'
    train_on(tmp_path, "x.jsonl", content)
    message = (
        "left out: 2 lines or rows without text under 'text' (bash launch/ithaca.sh preprocess"
    )
    assert message in capsys.readouterr().out


def test_inputs_without_text_are_refused(tmp_path):
    content = '{"text": "a"}\n' * 3
    with pytest.raises(ValueError, match=r"holds no text \(3 lines .*'body'\). Fix: --json-keys"):
        train_on(tmp_path, "x.jsonl", content, json_keys=["body"])
    with pytest.raises(ValueError, match="x.ids: token ids, not text. Fix: remove it."):
        train_on(tmp_path, "x.ids", "1 2 3\n")


def test_command_line(tmp_path, capfd):
    """The command trains a model, and what it refuses is one line of stderr and exit 2."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.train_tokenizer", "--input", str(ROOT / "data")]
        + ["--vocab-size", "512", "--output_prefix", str(tmp_path / "new" / "t")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "wrote" in done.stdout and done.stderr == ""
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.model"]
    (tmp_path / "tiny.txt").write_text("abc\n")
    tiny = ["--input", str(tmp_path / "tiny.txt")]
    for options, message in (
        (["--input", str(tmp_path / "none")], "no such file or folder. Fix"),
        (tiny, "SentencePiece refuses it for this text"),
        ([*tiny, "--max-bytes", "0"], "max_bytes = 0: must be at least"),
        ([*tiny, "--json-keys", "a", "b"], "must be one key"),
    ):
        assert main([*options, "--output-prefix", str(tmp_path / "x")]) == 2
        said = capfd.readouterr().err
        assert message in said and "Traceback" not in said
        assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.glob("x*"))


def test_an_existing_model_is_kept_unless_told_otherwise(model, tmp_path):
    prefix = tmp_path / "small"
    (tmp_path / "small.model").write_bytes(Path(model).read_bytes())
    arguments = Arguments(input=[str(ROOT / "data")], output_prefix=str(prefix), vocab_size=512)
    with pytest.raises(
        ValueError, match="small.model exists already.*Fix: give another prefix, or"
    ):
        train_tokenizer(arguments)
    assert (tmp_path / "small.model").read_bytes() == Path(model).read_bytes()
    arguments.overwrite = True
    assert SentencePiece(train_tokenizer(arguments)).vocab_size == 512
    (tmp_path / "small.model").write_text("no tokenizer")
    with pytest.raises(ValueError, match="exists, and was not made by SentencePiece"):
        train_tokenizer(arguments)
    assert (tmp_path / "small.model").read_text() == "no tokenizer"
    assert [path.name for path in tmp_path.iterdir()] == ["small.model"]
