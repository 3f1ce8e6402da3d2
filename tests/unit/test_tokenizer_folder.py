"""Two definitions of one tokenizer are refused until one is chosen, and told apart by their ids."""

import json
import shutil

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from data.tokenizers.identity import same_tokenizer
from data.tokenizers.tokenizer import build_tokenizer
from tests.huggingface.chat_folders import write_tokenizer
from tests.unit.test_tokenizer_doors import LLAMA3, byte_level, sentencepiece_model

TEXT = "def f(self) e\u0301"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tokenizer.json: alone, and under a class and a model_type that replace its steps."""
    root = tmp_path_factory.mktemp("folders")
    byte_level(root / "plain", pattern=LLAMA3, ignore_merges=True, added=())
    for name in ("gpt2class", "with_config"):
        shutil.copytree(root / "plain", root / name)
    (root / "gpt2class" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>"})
    )
    (root / "with_config" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return root


def build(folder, ids_from=None):
    return build_tokenizer("HuggingFaceTokenizer", str(folder), None, ids_from=ids_from)


def ids_of_tokenizer_json(folder):
    from tokenizers import Tokenizer

    return (
        Tokenizer.from_file(str(folder / "tokenizer.json"))
        .encode(TEXT, add_special_tokens=False)
        .ids
    )


def ids_of_transformers(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).encode(TEXT, add_special_tokens=False)


def test_one_definition_needs_no_choice(folders):
    tokenizer = build(folders / "plain")
    assert (
        tokenizer.encode(TEXT)
        == ids_of_tokenizer_json(folders / "plain")
        == ids_of_transformers(folders / "plain")
    )


@pytest.mark.parametrize("name", ["gpt2class", "with_config"])
def test_two_definitions_are_refused_until_one_is_chosen(folders, name):
    folder = folders / name
    assert ids_of_tokenizer_json(folder) != ids_of_transformers(folder), "the case shows nothing"
    with pytest.raises(
        ValueError, match="define other ids .*pre_tokenizer.*Fix: --tokenizer-ids-from"
    ) as error:
        build(folder)
    assert "\n" not in str(error.value)
    assert build(folder, "tokenizer.json").encode(TEXT) == ids_of_tokenizer_json(folder)
    assert build(folder, "AutoTokenizer").encode(TEXT) == ids_of_transformers(folder)


def test_the_description_covers_what_decides_the_ids(folders):
    plain = build(folders / "plain").describe()
    declared = build(folders / "with_config", "tokenizer.json").describe()
    made = build(folders / "with_config", "AutoTokenizer").describe()
    assert plain["fingerprint"] == made["fingerprint"], "the files are the same"
    assert same_tokenizer(plain, declared)
    assert not same_tokenizer(plain, made)
    assert "transformers" in made


def test_another_end_of_document_is_another_tokenizer(folders, tmp_path):
    """A model and its chat variant have one tokenizer.json, and end with tokens of their own."""
    shutil.copytree(folders / "plain", tmp_path / "chat")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}
    (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(settings))
    plain = build(folders / "plain", "tokenizer.json").describe()
    chat = build(tmp_path / "chat", "tokenizer.json").describe()
    assert plain["ids"] == chat["ids"], "the case shows nothing"
    assert not same_tokenizer(plain, chat), (plain, chat)
    del plain["eod"]  # as stored before it was noted
    assert same_tokenizer(plain, chat), (plain, chat)


def test_a_description_of_before_is_compared_by_the_files(folders):
    now = build(folders / "plain").describe()
    before = {name: now[name] for name in ("type", "vocab_size", "fingerprint")}
    assert same_tokenizer(before, now)
    assert not same_tokenizer(before | {"fingerprint": "other"}, now)
    assert not same_tokenizer(None, now)


def test_the_files_of_a_checkpoint_give_the_same_ids(folders, tmp_path):
    """The model_type is not in the tokenizer's own files, but AutoTokenizer looks at it."""
    tokenizer = build(folders / "with_config", "AutoTokenizer")
    for file in tokenizer.files:
        shutil.copy(file, tmp_path)
    assert same_tokenizer(build(tmp_path, "AutoTokenizer").describe(), tokenizer.describe())


def test_the_files_of_a_checkpoint_are_enough_where_config_json_names_the_class(folders, tmp_path):
    parts = json.loads((folders / "plain" / "tokenizer.json").read_text())["model"]
    merges = [" ".join(merge) for merge in parts["merges"]]
    source = tmp_path / "source"
    source.mkdir()
    (source / "vocab.json").write_text(json.dumps(parts["vocab"]))
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (source / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer = build(source)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tokenizer.files:
        shutil.copy(file, copy)
    assert build(copy).encode(TEXT) == tokenizer.encode(TEXT) == ids_of_transformers(source)
    assert same_tokenizer(build(copy).describe(), tokenizer.describe())


def test_an_export_gives_the_chosen_ids_in_transformers(folders, tmp_path, capsys):
    build(folders / "gpt2class", "tokenizer.json").save_huggingface(str(tmp_path))
    assert ids_of_transformers(tmp_path) == ids_of_tokenizer_json(folders / "gpt2class")
    assert (
        "tokenizer_class was GPT2Tokenizer, now PreTrainedTokenizerFast" in capsys.readouterr().err
    )


def test_an_export_with_other_flags_of_an_added_token_is_refused(tmp_path):
    """tokenizer_config.json changes a flag that no text at hand shows."""
    byte_level(tmp_path / "t", added=("<sep>",))
    parts = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    token = next(token for token in parts["added_tokens"] if token["content"] == "<sep>")
    number = str(token.pop("id"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "added_tokens_decoder": {number: token | {"lstrip": True}},
    }
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = build(tmp_path / "t", "tokenizer.json")
    assert tokenizer.encode("a <sep>") != build(tmp_path / "t", "AutoTokenizer").encode("a <sep>")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="other ids .* on some texts, since their added_tokens"):
        tokenizer.save_huggingface(str(tmp_path / "out"))


def test_a_folder_with_tokenizer_model_alone_is_read_by_sentencepiece(tmp_path):
    import sentencepiece

    _, model = sentencepiece_model(tmp_path / "m", model_type="unigram")
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = build(folder)
    for text in (TEXT, "  two  spaces ", "<s>é</s>"):
        assert tokenizer.encode(text) == sentencepiece.SentencePieceProcessor(
            model_file=model
        ).encode(text), text
    roles = {"eos_token": {"content": "</s>"}, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    assert build(folder).eod == sentencepiece.SentencePieceProcessor(model_file=model).eos_id()
    (folder / "tokenizer_config.json").write_text(json.dumps(roles | {"eos_token": "<s>"}))
    with pytest.raises(
        ValueError, match="has eos_token = '<s>', which is not that of its tok.*Fix"
    ):
        build(folder)
    for content, problem in (("{", "is not JSON"), ("[]", "holds no JSON object")):
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=f"tokenizer_config.json: {problem}.*Fix: download"):
            build(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 100_000}))
    with pytest.raises(
        ValueError, match="adds 1 tokens, as '<extra>'.*Fix: write its tokenizer.json"
    ):
        build(folder)


@pytest.mark.parametrize("ids_from", [None, "tokenizer.json", "AutoTokenizer"])
def test_an_end_of_document_in_a_text_is_text(tmp_path, ids_from):
    """Also where tokenizer_config.json alone says that it is a special token."""
    byte_level(tmp_path / "t", added=("<eos>",))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = build(tmp_path / "t", ids_from)
    assert tokenizer.eod not in tokenizer.encode("a<eos>b"), tokenizer.eod
    assert "<eos>" in tokenizer.special_texts()
    kept = build_tokenizer(
        "HuggingFaceTokenizer", str(tmp_path / "t"), None, ids_from=ids_from, keep_special=True
    )
    assert kept.eod in kept.encode("a<eos>b"), kept.eod


def test_a_choice_without_effect_is_refused(tmp_path):
    from data.config import DataConfig

    problems = DataConfig(
        data_path=["c"],
        tokenizer_type="NullTokenizer",
        vocab_size=9,
        tokenizer_ids_from="AutoTokenizer",
    ).validate()
    assert problems == [
        "tokenizer_ids_from = AutoTokenizer: has no effect with tokenizer_type = NullTokenizer. "
        "Fix: remove it."
    ]
    byte_level(tmp_path / "t", added=())
    (tmp_path / "t" / "tokenizer.json").rename(tmp_path / "t" / "vocab.json")
    with pytest.raises(ValueError, match="tokenizer"):
        build(tmp_path / "t", "tokenizer.json")


@pytest.mark.parametrize("template, prefix", [("{0} $A", 2), ("$A {0}", None), ("{0} $A {0}", 2)])
def test_only_an_id_before_a_text_is_its_prefix(tmp_path, template, prefix):
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    text = backend.id_to_token(2)
    backend.post_processor = TemplateProcessing(
        single=template.format(text), special_tokens=[(text, 2)]
    )
    backend.save(str(path))
    assert build(tmp_path).prefix_id == prefix
