"""The fast encoder: the reference's ids on hard texts, and refused where they differ."""

import json

import numpy as np
import pytest

from data.indexed import IndexedReader
from data.tokenizers import fast as tokenizer_fast
from data.tokenizers.fast import (
    CheckedEncoder,
    FastEncoder,
    TextError,
    encode_one_by_one,
    first_difference,
    probe_texts,
)
from data.tokenizers.tokenizer import build_tokenizer
from data.writers.indexed_writer import IndexedWriter
from tests.unit.test_tokenizer import ROOT, TEXTS, model  # noqa: F401 (a fixture)
from tools.bench import tokenizing
from tools.preprocess_data import Arguments, preprocess
from tools.preprocessing import choose_encoder, tasks
from tools.preprocessing.choose_encoder import sample_texts

HARD = [
    *TEXTS,
    "<|end|>",
    "a<|end|><|end|> b <|plain|>c",
    " <|end|>\n<|plain|>",
    "x" * 100_000,
    "\n" * 5000 + "é",
    "I'm we'LL 'S don't",
    "१२३ ٣٤ ½",
    "한국어 텍스트",
    "\r\n\r\r\n \t\u00a0\u3000x",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_huggingface(tmp_path_factory.mktemp("huggingface"))


def make_huggingface(path, **settings):
    """A folder with a byte-level BPE tokenizer, with a special and an ordinary added token."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(["<|plain|>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", **settings
    ).save_pretrained(path)
    return str(path)


def fast_encoder(tokenizer):
    return CheckedEncoder(tokenizer, tokenizer.fast_rules())


def check_same(tokenizer, texts):
    fast = fast_encoder(tokenizer)
    encoded = fast.encode_batch(texts)
    expected, counts = encode_one_by_one(tokenizer, texts)
    assert encoded.lengths.tolist() == counts.tolist()
    assert encoded.ids.tolist() == expected.tolist()
    assert first_difference(tokenizer, fast, texts) is None


def test_same_ids_as_huggingface(folder):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder, None)
    assert tokenizer.special_texts() == ["<|end|>"]
    check_same(tokenizer, HARD + probe_texts(tokenizer))
    check_same(tokenizer, [])
    check_same(tokenizer, ["", ""])


def test_begins_anew_before_its_memory_grows(folder, monkeypatch):
    """Not for little text, and not while the process is small."""
    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder, None)
    fast = fast_encoder(tokenizer).fast
    first = fast._tokenizer
    text = "some words " * 10
    monkeypatch.setattr(tokenizer_fast, "CACHE_LETTERS", 3 * len(text))
    fast.encode_batch([text] * 4)
    assert fast._tokenizer is first
    monkeypatch.setattr(tokenizer_fast, "CACHE_BYTES", -(1 << 40))
    for renewed in (True, False, False, True):
        before = fast._tokenizer
        assert fast.encode_batch([text])[0].tolist() == tokenizer.encode(text)
        assert (fast._tokenizer is not before) == renewed
    assert tokenizer_fast.resident_bytes() > 1 << 20


def test_special_tokens_as_text(tmp_path):
    """tokenizer_config.json says so, tokenizer.json cannot."""
    tokenizer = build_tokenizer(
        "HuggingFaceTokenizer", make_huggingface(tmp_path, split_special_tokens=True), None
    )
    assert tokenizer.eod not in tokenizer.encode("a<|end|>b")
    check_same(tokenizer, HARD + probe_texts(tokenizer))


def test_same_ids_as_sentencepiece(model):  # noqa: F811
    tokenizer = build_tokenizer("SentencePieceTokenizer", model, None)
    assert {"<s>", "</s>", "<unk>"} <= set(tokenizer.special_texts())
    check_same(tokenizer, HARD + probe_texts(tokenizer))


def write_corpus(tmp_path):
    texts = [text for text in HARD * 3 if text]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, texts


def run(tmp_path, folder, path, **settings):
    prefix = str(tmp_path / "out")
    summary = preprocess(
        Arguments(
            input=[str(path)],
            output_prefix=prefix,
            tokenizer_model=folder,
            tokenizer_type="HuggingFaceTokenizer",
            overwrite=True,
            **settings,
        )
    )
    return summary, [(tmp_path / f"out.{end}").read_bytes() for end in ("bin", "idx", "json")]


def test_preprocess_gives_the_same_files(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(tasks, "TASK_BYTES", 50_000)  # many tasks
    path, texts = write_corpus(tmp_path)
    summary, expected = run(tmp_path, folder, path, fast_tokenizer="off", append_eod=True)
    assert "as asked" in summary.encoder
    for settings in ({"workers": 1}, {"workers": 3}, {"fast_tokenizer": "on"}):
        summary, files = run(tmp_path, folder, path, append_eod=True, **settings)
        assert (
            files == expected and "gigatoken" in summary.encoder and summary.documents == len(texts)
        )
    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder, None)
    reader = IndexedReader(str(tmp_path / "out"))
    assert reader.read(3, 0, int(reader.document_lengths[3])).tolist() == tokenizer.encode(
        texts[3]
    ) + [tokenizer.eod]


def test_other_ids_are_refused(tmp_path, folder, monkeypatch, capsys):
    path = tmp_path / "c.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "strawberry", "four"))
    )
    _, expected = run(tmp_path, folder, path, fast_tokenizer="off")

    class Wrong(FastEncoder):
        def encode_batch(self, texts):
            return super().encode_batch([text.replace("strawberry", "cherry") for text in texts])

    monkeypatch.setattr(tokenizer_fast, "FastEncoder", Wrong)
    summary, files = run(tmp_path, folder, path)
    assert files == expected and "c.jsonl:3, which begins 'strawberry'" in summary.encoder
    assert "warning: one text at a time: gigatoken" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"fast_tokenizer = on: .* other ids .*c.jsonl:3.* Fix: "):
        run(tmp_path, folder, path, fast_tokenizer="on")


def test_a_tokenizer_that_it_does_not_read(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "1 2"}\n')
    arguments = dict(
        input=[str(path)],
        output_prefix=str(tmp_path / "o"),
        tokenizer_type="NullTokenizer",
        vocab_size=9,
        overwrite=True,
    )
    assert "its text is integers" in preprocess(Arguments(**arguments)).encoder
    with pytest.raises(ValueError, match="fast_tokenizer = on: its text is integers. Fix"):
        preprocess(Arguments(**arguments, fast_tokenizer="on"))
    with pytest.raises(ValueError, match="does not read this tokenizer"):
        FastEncoder('{"model": {"type": "WordLevel"}}', 9)
    tokenizer = build_tokenizer("NullTokenizer", None, 9)
    with pytest.raises(TextError, match="must be in") as error:
        encode_one_by_one(tokenizer, ["1", "99"])
    assert error.value.index == 1


def test_the_sample_is_spread_over_all_files(tmp_path, monkeypatch):
    monkeypatch.setattr(choose_encoder, "SAMPLE_BYTES", 100)
    big = tmp_path / "a.jsonl"
    small = tmp_path / "b.txt"
    big.write_text(
        "".join(json.dumps({"text": f"document {i} " + "x" * 50}) + "\n" for i in range(2000))
        + "bad\n"
    )
    small.write_text("é" * 20_000)
    (tmp_path / "empty.txt").write_text("")
    sample = list(sample_texts([big, tmp_path / "empty.txt", small], "text"))
    places = [int(text.split()[1]) for piece, _, text in sample if piece.is_json]
    assert (
        len(places) > 60 and places == sorted(set(places)) and places[0] == 0 and places[-1] > 1900
    )
    assert any(text == "é" * 50 for piece, _, text in sample if not piece.is_json)
    assert list(sample_texts([tmp_path / "empty.txt"], "text")) == []


def test_add_documents_equals_one_by_one(tmp_path):
    rows = [[1, 2, 3], [], [65000], [4]]
    with (
        IndexedWriter(str(tmp_path / "a"), np.uint16) as one,
        IndexedWriter(str(tmp_path / "b"), np.uint16) as many,
    ):
        for row in rows:
            one.add_document(row)
        many.add_documents(np.array([1, 2, 3, 65000], dtype=np.uint32), np.array([3, 0, 1]))
        many.add_documents(np.array([4]), np.array([1]))
        many.add_documents(np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.int64))
        with pytest.raises(
            ValueError, match=r"token id 65536: must be in \[0, 65535\] for uint16 \(document 6\)"
        ):
            many.add_documents(np.array([5, 6, 65536]), np.array([1, 1, 1]))
        one.finish(), many.finish()
    for end in ("bin", "idx", "json"):
        assert (tmp_path / f"a.{end}").read_bytes() == (tmp_path / f"b.{end}").read_bytes()


def test_json_that_only_one_parser_takes(tmp_path):
    """orjson is the fast way, never the judge: NaN in another key, repeated keys, surrogates."""
    from tools.preprocessing.text_files import cut_into_pieces, read_documents

    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'{"n": NaN, "text": "1"}\n{"text": "0", "text": "2"}\n{"o": "\\ud800", "text": "3"}\n'
        b'{"text": "\\ud83d\\ude00"}\n  {"text": "4"} \r\n'
    )
    assert read_documents(cut_into_pieces(path, 10**6)[0], "text", skip_bad=False).texts == [
        "1",
        "2",
        "3",
        "😀",
        "4",
    ]


def test_the_benchmark_compares_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "TRAINING_BYTES", 300_000)
    rows = tokenizing.measure(
        400_000, 60_000, vocab_size=400, workers=2, folder=str(tmp_path), repeats=1
    )
    assert [row.identical for row in rows] == [True] * 4 and all(
        row.seconds > 0 < row.cpu_seconds for row in rows
    )
    assert all(len(row.cells()) == len(tokenizing.HEADER) for row in rows)
    texts = list(tokenizing.read_texts(tmp_path / "corpus-400000.jsonl", 60_000))
    assert 5 < len(texts) < 200 and rows[0].text_bytes > 300_000
    assert not tokenizing.starts_with(str(tmp_path / "tokens"), [[1, 2, 3]])
