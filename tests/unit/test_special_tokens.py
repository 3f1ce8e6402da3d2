"""Special tokens in documents are text, tokens or an error; the running check stops a run."""

import gzip
import json

import pytest

from data.idx_format import read_side_file
from data.indexed import IndexedReader
from data.tokenizers import fast as tokenizer_fast
from data.tokenizers.fast import FastEncoder
from tests.unit.test_tokenizer_doors import SPECIAL, byte_level, sentencepiece_model
from tools.preprocess_data import Arguments, preprocess
from tools.preprocessing import tasks
from tools.preprocessing.choose_encoder import sample_texts

TEXTS = ["one plain text", f"a{SPECIAL}b {SPECIAL}", "another", f"{SPECIAL}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("special") / "t"
    byte_level(path)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL,
        "bos_token": "<|begin|>",
    }
    parts = json.loads((path / "tokenizer.json").read_text())
    begin = {
        "id": 900,
        "content": "<|begin|>",
        "special": True,
        "normalized": False,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
    }
    parts["added_tokens"].append(
        begin | {"id": max(token["id"] for token in parts["added_tokens"]) + 1}
    )
    (path / "tokenizer.json").write_text(json.dumps(parts))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def run(tmp_path, model, texts=TEXTS, kind="HuggingFaceTokenizer", **settings):
    """Preprocess the texts -> (ids of each document, summary)."""
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prefix = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    summary = preprocess(
        Arguments(
            input=[str(path)],
            output_prefix=str(prefix),
            tokenizer_model=model and str(model),
            tokenizer_type=kind,
            **settings,
        )
    )
    reader = IndexedReader(str(prefix))
    return [
        reader.read(i, 0, int(n)).tolist() for i, n in enumerate(reader.document_lengths)
    ], summary


def library_ids(folder, *, as_text):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = as_text
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS], tokenizer


@pytest.mark.parametrize("fast", ["on", "off"])
@pytest.mark.parametrize("setting", ["as-text", "keep"])
def test_special_tokens_in_text_are_what_was_asked(tmp_path, folder, setting, fast):
    expected, library = library_ids(folder, as_text=setting == "as-text")
    documents, summary = run(tmp_path, folder, special_tokens_in_text=setting, fast_tokenizer=fast)
    assert documents == expected
    there = any(library.token_to_id(SPECIAL) in ids for ids in documents)
    assert there == (setting == "keep")
    assert (summary.text.special_documents, summary.text.special_tokens) == (2, 3)
    assert "written 3 times in 2 documents" in summary.special_tokens


def test_as_text_is_the_default(tmp_path, folder):
    assert run(tmp_path, folder)[0] == library_ids(folder, as_text=True)[0]


def test_special_tokens_in_text_are_refused_by_line(tmp_path, folder):
    with pytest.raises(
        ValueError, match=r"c.jsonl:2: the special token '<\|end\|>' is written in the text. Fix"
    ):
        run(tmp_path, folder, special_tokens_in_text="refuse")
    _, summary = run(tmp_path, folder, TEXTS[:1], special_tokens_in_text="refuse")
    assert summary.special_tokens == ""


def test_sentencepiece_cannot_keep_them(tmp_path):
    _, model = sentencepiece_model(tmp_path / "m", model_type="bpe")
    with pytest.raises(
        ValueError, match="special_tokens_in_text = keep: SentencePiece takes what is written.*Fix"
    ):
        run(tmp_path, model, kind="SentencePieceTokenizer", special_tokens_in_text="keep")
    _, summary = run(tmp_path, model, ["a </s> b"], kind="SentencePieceTokenizer")
    assert "written 1 time in 1 document," in summary.special_tokens


@pytest.mark.parametrize("setting", ["keep", "refuse"])
def test_integers_have_no_special_tokens(tmp_path, setting):
    message = f"special_tokens_in_text = {setting}: has no effect on integers. Fix: remove it"
    with pytest.raises(ValueError, match=message):
        run(
            tmp_path,
            None,
            ["1 2"],
            kind="NullTokenizer",
            vocab_size=9,
            special_tokens_in_text=setting,
        )


def test_a_vocabulary_that_holds_them_as_words_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({SPECIAL: 0, "a": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([SPECIAL])
    (tmp_path / "t").mkdir()
    tokenizer.save(str(tmp_path / "t" / "tokenizer.json"))
    (tmp_path / "t" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(
        ValueError, match="as-text: the tokenizer has '<.end.>' in the vocabulary of its words.*Fix"
    ):
        run(tmp_path, tmp_path / "t")
    assert run(tmp_path, tmp_path / "t", [f"a {SPECIAL}"], special_tokens_in_text="keep")[0] == [
        [1, 0]
    ]


def test_documents_begin_with_bos_where_asked(tmp_path, folder):
    plain, library = library_ids(folder, as_text=True)
    begin = library.token_to_id("<|begin|>")
    end = library.token_to_id(SPECIAL)
    documents, _ = run(tmp_path, folder, prepend_bos=True, append_eod=True)
    assert documents == [[begin, *ids, end] for ids in plain]
    documents, _ = run(tmp_path, folder, prepend_bos=True)
    assert documents == [[begin, *ids] for ids in plain]


def test_bos_without_one_is_refused(tmp_path):
    byte_level(tmp_path / "t")
    with pytest.raises(
        ValueError,
        match="prepend_bos = True: the tokenizer has no beginning-of-sequence token. Fix",
    ):
        run(tmp_path, tmp_path / "t", prepend_bos=True)


def test_the_settings_stand_beside_the_corpus(tmp_path, folder):
    run(tmp_path, folder, prepend_bos=True, special_tokens_in_text="keep")
    side = read_side_file(str(next(tmp_path.glob("*.idx")).with_suffix("")))
    assert side["text"] == {
        "append_eod": False,
        "prepend_bos": True,
        "special_tokens_in_text": "keep",
    }


# ---------------------------------------------------------------- the running check


class Wrong(FastEncoder):
    """Reads a word wrong that no sample holds."""

    def encode_batch(self, texts):
        return super().encode_batch([text.replace("strawberry", "cherry") for text in texts])


def write_deep(path, count=12_000, line=11_500):
    """A corpus with the word far from its beginning, compressed or as Parquet."""
    texts = [f"document {i} of plain text, about nothing at all {'x' * 400}" for i in range(count)]
    texts[line - 1] = "a strawberry"
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), path)
        return
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data, 1))


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.parquet"])
def test_the_running_check_stops_at_a_difference(tmp_path, folder, monkeypatch, name):
    from tokenizers import Tokenizer

    monkeypatch.setattr(tokenizer_fast, "FastEncoder", Wrong)
    write_deep(tmp_path / name)
    arguments = dict(
        input=[str(tmp_path / name)],
        output_prefix=str(tmp_path / "o"),
        tokenizer_model=str(folder),
        tokenizer_type="HuggingFaceTokenizer",
    )
    monkeypatch.setattr(tokenizer_fast, "CHECK_EVERY", 1)
    message = rf"{name}:11500: gigatoken .* other ids .* Fix: --fast-tokenizer off"
    with pytest.raises(ValueError, match=message) as error:
        preprocess(Arguments(**arguments))
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a strawberry").ids
    assert str(theirs[:4])[1:-1].split(", ")[0] in str(error.value)


def test_the_check_does_not_depend_on_the_workers(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(tokenizer_fast, "CHECK_EVERY", 8)
    monkeypatch.setattr(tasks, "TASK_BYTES", 500)
    texts = [f"text number {i}" for i in range(200)]
    counts = [run(tmp_path, folder, texts, workers=workers)[1].text for workers in (1, 3)]
    assert counts[0] == counts[1]
    assert 5 < counts[0].checked < 60


def test_the_sample_of_a_compressed_file_is_no_repetition(tmp_path):
    write_deep(tmp_path / "c.jsonl.gz")
    texts = [text for *_, text in sample_texts([tmp_path / "c.jsonl.gz"], "text")]
    assert len(texts) == len(set(texts)) > 3000


def test_a_document_that_begins_with_a_user_defined_symbol_keeps_its_prefix(tmp_path):
    import sentencepiece

    _, model = sentencepiece_model(
        tmp_path / "m",
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<sep>", "foo"],
    )
    texts = [
        "plain first",
        "foo is the first word",
        "<sep> begins this one",
        "it is in the <sep> middle",
    ]
    library = sentencepiece.SentencePieceProcessor(model_file=model)
    documents, summary = run(
        tmp_path, model, texts, kind="SentencePieceTokenizer", fast_tokenizer="on"
    )
    assert documents == [library.encode(text) for text in texts]
    assert summary.text.slow == 3
