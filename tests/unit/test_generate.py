"""tools.generate follows the folder's own settings, as transformers does, or says why not."""

import json
import shutil
import sys

import pytest
import torch

from tests.huggingface import chat_folders as folders
from tests.huggingface.model_folders import change_weights
from tools import generate
from tools.generate import Arguments


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A folder whose eos_token_id is a list, with a repetition penalty."""
    folder = tmp_path_factory.mktemp("chat") / "hf"
    folders.write_model(folder, eos_token_id=[2, 0], bos_token_id=1, pad_token_id=3)
    folders.write_tokenizer(folder)
    return folders.write_generation(folder)


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory):
    """A folder without tokenizer and without any token of a role."""
    folder = tmp_path_factory.mktemp("bare") / "hf"
    folders.write_model(folder, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    (folder / "generation_config.json").unlink()
    content = json.loads((folder / "config.json").read_text())
    # Named as null: for a missing key transformers has a default.
    content |= dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"))
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def greedy_of_transformers(folder, ids, count):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count)
    return out[0].tolist()


def answer(capsys, monkeypatch, *words) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, words)])
    code = generate.main()
    said = capsys.readouterr()
    return code, said.out, said.err


def test_greedy_is_transformers_own(chat_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    lengths = set()
    for prompt in ("the quick", "def f(x):", "12 34", "<|im_start|>dog", "lazy fox", "o"):
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        expected = greedy_of_transformers(chat_model, ids, 40)
        found = generate.generate(
            Arguments(load=str(chat_model), prompt=prompt, max_new_tokens=40, temperature=0)
        )
        assert found == tokenizer.decode(expected), prompt
        lengths.add(len(expected) - len(ids))
    assert max(lengths) == 40, lengths


def test_each_id_of_a_list_stops(chat_model, tmp_path):
    """The first token that greedy generation gives is made a stop id, alone and in a list."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(chat_model).encode("the quick", add_special_tokens=False)
    first = greedy_of_transformers(chat_model, ids, 1)[-1]
    arguments = Arguments(load=str(chat_model), prompt="the quick", temperature=0)
    path = chat_model / "generation_config.json"
    original = path.read_text()
    try:
        for stops in (first, [319, first], [first, 319]):
            folders.write_generation(chat_model, eos_token_id=stops)
            assert generate.generate(arguments).startswith("the quick")
            expected = greedy_of_transformers(chat_model, ids, 80)
            assert len(expected) == len(ids) + 1, stops
            tokenizer = AutoTokenizer.from_pretrained(chat_model)
            assert generate.generate(arguments) == tokenizer.decode(expected)
    finally:
        path.write_text(original)


def test_ids_in_and_out_without_a_tokenizer(bare_model, capsys, monkeypatch):
    expected = greedy_of_transformers(bare_model, [5, 17, 3], 6)
    code, out, err = answer(
        capsys,
        monkeypatch,
        "--load",
        bare_model,
        "--prompt",
        "5 17 3",
        "--max-new-tokens",
        6,
        "--temperature",
        0,
    )
    assert code == 0
    assert [int(word) for word in out.split()] == expected
    assert err.count("\n") == 1
    assert "has no tokenizer" in err


def test_sampling_is_seeded(bare_model):
    def sample(seed, temperature=1.0):
        return generate.generate(
            Arguments(
                load=str(bare_model),
                prompt="5 17",
                max_new_tokens=12,
                seed=seed,
                temperature=temperature,
            )
        )

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    # The least temperature that is allowed gives the likeliest tokens, and no overflow.
    assert sample(1, generate.LEAST_TEMPERATURE) == sample(1, 0.0)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_no_new_tokens_give_the_prompt(chat_model, capsys, monkeypatch, temperature):
    found = answer(
        capsys,
        monkeypatch,
        "--load",
        chat_model,
        "--prompt",
        "the quick",
        "--max-new-tokens",
        0,
        "--temperature",
        temperature,
    )
    assert found == (0, "the quick\n", "")


def test_an_empty_prompt_begins_after_the_end_of_a_document(chat_model):
    from transformers import AutoTokenizer

    expected = greedy_of_transformers(chat_model, [2], 5)
    found = generate.generate(Arguments(load=str(chat_model), max_new_tokens=5, temperature=0))
    assert found == AutoTokenizer.from_pretrained(chat_model).decode(expected)


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ("--temperature", "-0.5"),
            "temperature = -0.5: must be 0 (always the likeliest token) or",
        ),
        (("--temperature", "nan"), "temperature = nan: must be 0"),
        (("--temperature", "inf"), "temperature = inf: must be 0"),
        (("--temperature", "1e-30"), "temperature = 1e-30: must be 0"),
        (("--max-new-tokens", "-1"), "max_new_tokens = -1: must be at least 0"),
        (("--prompt", "\udcff"), "is not valid UTF-8"),
        (("--seed", "-1"), "seed = -1: must be in [0, 2**63)"),
        (("--prompt", ""), "is empty, and"),
        (("--prompt", "the quick"), "must be whitespace-separated integers"),
        (("--prompt", "320"), "token id 320: must be in [0, vocab_size = 320)"),
        (("--prompt", "7 " * 64), "prompt: 64 tokens, and the model's context is 64"),
    ],
)
def test_bad_input_is_one_line(bare_model, capsys, monkeypatch, words, message):
    defaults = [] if "--prompt" in words else ["--prompt", "5"]
    code, out, err = answer(capsys, monkeypatch, "--load", bare_model, *defaults, *words)
    assert code == 2, err
    errors = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1, err
    assert message in errors[0]
    assert "Fix: " in errors[0]
    assert out == ""


def test_new_tokens_end_with_the_context(bare_model, capsys, monkeypatch):
    code, out, err = answer(capsys, monkeypatch, "--load", bare_model, "--prompt", "7 " * 60)
    assert code == 0
    assert len(out.split()) == 64
    assert "max_new_tokens = 80: 4 fit into the model's context of 64" in err


def test_folders_that_cannot_be_read_are_one_line(bare_model, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    wrong = {tmp_path: "transformers cannot read it", tmp_path / "x": "no config.json"}
    for folder, message in wrong.items():
        code, _, err = answer(capsys, monkeypatch, "--load", folder)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1


@pytest.fixture
def chat_copy(chat_model, tmp_path):
    return shutil.copytree(chat_model, tmp_path / "copy")


@pytest.mark.parametrize(
    "settings, words, message",
    [
        (dict(eos_token_id="x"), ("--prompt", "the"), "transformers cannot generate with it ("),
        (dict(num_beams=0), ("--prompt", "the"), "transformers cannot generate with it ("),
        (dict(eos_token_id=-1, bos_token_id=None), (), "is empty, and"),
        (dict(eos_token_id=[999]), (), "the tokenizer gives id 999, and the model has 320"),
    ],
)
def test_settings_of_a_folder_that_cannot_be_followed_are_one_line(
    chat_copy, capsys, monkeypatch, settings, words, message
):
    folders.write_generation(chat_copy, **settings)
    code, out, err = answer(capsys, monkeypatch, "--load", chat_copy, *words)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1], err
    assert err.count("error: ") == 1, err


def test_one_continuation_is_given_whatever_the_folder_asks_for(chat_copy, capsys, monkeypatch):
    folders.write_generation(chat_copy, num_beams=2, num_return_sequences=2)
    words = ("--prompt", "the", "--max-new-tokens", 3, "--temperature", 0)
    code, out, _ = answer(capsys, monkeypatch, "--load", chat_copy, *words)
    assert code == 0
    assert out.startswith("the"), out


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_model_of_nan_generates_nothing(chat_copy, capsys, monkeypatch, temperature):
    def spoil(tensors):
        tensors["model.norm.weight"][3] = float("nan")

    change_weights(chat_copy, spoil)
    words = ("--prompt", "the", "--max-new-tokens", 3, "--temperature", temperature)
    code, out, err = answer(capsys, monkeypatch, "--load", chat_copy, *words)
    assert (code, out) == (2, "")
    assert "its logits are NaN" in err


def test_nobody_is_asked_about_the_folders_own_code(chat_copy, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    code = {"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}
    folders.edit_json(chat_copy / "config.json", model_type="strange", auto_map=code)
    code, out, err = answer(capsys, monkeypatch, "--load", chat_copy, "--prompt", "the")
    assert (code, out) == (2, "")
    assert "transformers cannot read it" in err
