"""tools.generate continues texts as transformers would, and follows the folder's settings."""

import io
import json
import shutil
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from parallel.layout import single_process_layout
from tests.huggingface import chat_folders as folders
from tests.huggingface.imports import run as run_import
from tests.huggingface.model_folders import change_weights
from tools import generate
from tools.inference.decoding import Continuation
from tools.inference.open_model import open_model


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


@pytest.fixture
def chat_copy(chat_model, tmp_path):
    return shutil.copytree(chat_model, tmp_path / "copy")


def greedy_of_transformers(folder, ids, count):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count)
    return out[0].tolist()


def answer(capsys, *words) -> tuple[int, str, str]:
    capsys.readouterr()
    code = generate.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def continued(capsys, folder, *words) -> str:
    """What is printed, without its line end."""
    code, out, err = answer(capsys, "--load", folder, *words)
    assert code == 0, err
    return out.removesuffix("\n")


GREEDY = ("--temperature", "0")


def test_greedy_is_transformers_own(chat_model, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    lengths = set()
    for prompt in ("the quick", "def f(x):", "12 34", "<|im_start|>dog", "lazy fox", "o"):
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        expected = greedy_of_transformers(chat_model, ids, 40)
        found = continued(capsys, chat_model, "--prompt", prompt, "--max-new-tokens", 40, *GREEDY)
        assert found == tokenizer.decode(expected), prompt
        lengths.add(len(expected) - len(ids))
    assert max(lengths) == 40, lengths


def put_before_texts(folder, token: str) -> None:
    """Let the folder's tokenizer put a token before every text, as Gemma's does."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    number = next(each["id"] for each in content["added_tokens"] if each["content"] == token)
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    path.write_text(json.dumps(content))


def test_a_text_begins_as_the_folders_tokenizer_has_it(chat_copy, capsys):
    from transformers import AutoTokenizer

    put_before_texts(chat_copy, "<|im_start|>")
    tokenizer = AutoTokenizer.from_pretrained(chat_copy)
    ids = tokenizer.encode("the quick")
    assert tokenizer.decode(ids[:1]) == "<|im_start|>"
    begun = tokenizer.decode(greedy_of_transformers(chat_copy, ids, 12)[1:])
    plain = tokenizer.decode(greedy_of_transformers(chat_copy, ids[1:], 12))
    assert begun != plain
    words = ("--prompt", "the quick", "--max-new-tokens", 12, *GREEDY)
    assert continued(capsys, chat_copy, *words) == begun
    assert continued(capsys, chat_copy, *words, "--no-prepend-bos") == plain
    # No second one where the prompt has it.
    written = ("--prompt", "<|im_start|>the quick", "--max-new-tokens", 12, *GREEDY)
    assert continued(capsys, chat_copy, *written) == begun
    # An import goes on to be that model.
    code, save = run_import(chat_copy, "--no-verify")
    assert code == 0 and continued(capsys, save, *words) == begun
    code, _, err = answer(capsys, "--load", chat_copy, *words)
    assert code == 0 and "texts begin with id 1 (--no-prepend-bos: they do not)" in err


def test_each_id_of_a_list_stops(chat_copy, capsys):
    """The first token that greedy generation gives is made a stop id, alone and in a list."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_copy)
    ids = tokenizer.encode("the quick", add_special_tokens=False)
    first = greedy_of_transformers(chat_copy, ids, 1)[-1]
    for stops in (first, [319, first], [first, 319]):
        folders.write_generation(chat_copy, eos_token_id=stops)
        expected = greedy_of_transformers(chat_copy, ids, 80)
        assert len(expected) == len(ids) + 1, stops
        # A stop id ends the text, and is none of it.
        found = continued(capsys, chat_copy, "--prompt", "the quick", *GREEDY)
        assert found == tokenizer.decode(ids)
        record = json.loads(
            continued(capsys, chat_copy, "--prompt", "the quick", "--json", *GREEDY)
        )
        assert (record["ids"], record["continuation"]) == ([first], "")
        assert record["ended"] == "stop id"
    words = ("--prompt", "the quick", "--max-new-tokens", 5, "--ignore-eos", "--json")
    record = json.loads(continued(capsys, chat_copy, *words, *GREEDY))
    assert len(record["ids"]) == 5 and record["ids"][0] == first
    assert record["ended"] == "length"


def test_ids_in_and_out_without_a_tokenizer(bare_model, capsys):
    expected = greedy_of_transformers(bare_model, [5, 17, 3], 6)
    words = ("--prompt", "5 17 3", "--max-new-tokens", 6)
    code, out, err = answer(capsys, "--load", bare_model, *words, *GREEDY)
    assert code == 0
    assert [int(word) for word in out.split()] == expected
    assert "has no tokenizer" in err


def test_sampling_is_seeded(bare_model, capsys):
    def sample(seed, temperature=1.0):
        words = ("--prompt", "5 17", "--max-new-tokens", 12)
        return continued(capsys, bare_model, *words, "--seed", seed, "--temperature", temperature)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    # The least temperature that is allowed gives the likeliest tokens, and no overflow.
    assert sample(1, generate.LEAST_TEMPERATURE) == sample(1, 0.0)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_no_new_tokens_give_the_prompt(chat_model, capsys, temperature):
    words = ("--prompt", "the quick", "--max-new-tokens", 0, "--temperature", temperature)
    assert continued(capsys, chat_model, *words) == "the quick"


def test_an_empty_prompt_begins_after_the_end_of_a_document(chat_model, capsys):
    from transformers import AutoTokenizer

    expected = greedy_of_transformers(chat_model, [2], 5)
    found = continued(capsys, chat_model, "--max-new-tokens", 5, *GREEDY)
    assert found == AutoTokenizer.from_pretrained(chat_model).decode(expected)


def test_an_imported_checkpoint_gives_what_its_folder_gives(chat_copy, capsys):
    code, save = run_import(chat_copy, "--no-verify")
    assert code == 0
    for words in (GREEDY, ("--temperature", "1", "--top-p", "0.9", "--top-k", "40")):
        expected = continued(capsys, chat_copy, "--prompt", "the quick", *words)
        assert len(expected) > len("the quick")
        assert continued(capsys, save, "--prompt", "the quick", *words) == expected
        assert (
            continued(capsys, save, "--ckpt-step", 0, "--prompt", "the quick", *words) == expected
        )


# ---- several prompts


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


SAMPLED = ("--temperature", "1", "--max-new-tokens", "9", "--batch-size")


def test_prompts_of_a_file_give_the_same_in_any_batch(bare_model, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    given = [[5, 17, 3], [1], [9, 9, 9, 9, 2], [4, 4]]
    file.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in given))
    alone, two, all_four = (
        records(continued(capsys, bare_model, "--prompts", file, *SAMPLED, size))
        for size in (1, 2, 8)
    )
    assert [record["prompt"] for record in alone] == [" ".join(map(str, ids)) for ids in given]
    assert alone == two == all_four
    assert len({tuple(record["ids"]) for record in alone}) == len(given)


def test_lines_of_a_file_of_arguments_and_of_stdin_are_prompts(
    chat_model, tmp_path, capsys, monkeypatch
):
    file = tmp_path / "prompts.txt"
    file.write_text('the quick\n\n{"a": b\n')
    lines = continued(capsys, chat_model, "--prompts", file, *GREEDY)
    assert [record["prompt"] for record in records(lines)] == ["the quick", '{"a": b']
    arguments = ("--prompt", "the quick", '{"a": b')
    assert continued(capsys, chat_model, *arguments, *GREEDY) == lines
    content = b'the quick\n{"prompt": "{\\"a\\": b"}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert continued(capsys, chat_model, "--prompts", "-", *GREEDY) == lines


def test_the_weights_of_a_layers_q_k_and_v_are_rows_of_one_tensor(bare_model):
    stage = open_model(str(bare_model), single_process_layout(torch.device("cpu"))).stage
    for layer in stage.layers.values():
        parts = (layer.attention.q, layer.attention.k, layer.attention.v)
        for one, other in pairwise(part.weight for part in parts):
            assert one.data_ptr() + one.nbytes == other.data_ptr()


def test_a_prompt_that_ends_within_a_character_is_not_said_again():
    class Bytes:
        def decode(self, ids) -> str:
            return bytes(ids).decode(errors="replace")

    model = SimpleNamespace(tokenizer=Bytes(), first_ids=())
    cafe = "café!".encode()
    record = generate._record(model, Continuation(0, list(cafe[:4]), 2, list(cafe[4:])))
    assert (record["prompt"], record["continuation"]) == ("caf\ufffd", "é!")
    record = generate._record(model, Continuation(0, list(cafe[:3]), 3, list(cafe[3:])))
    assert (record["prompt"], record["continuation"]) == ("caf", "é!")


def test_a_stop_id_ends_one_prompt_of_a_batch(bare_model, tmp_path, capsys):
    words = ("--prompt", "5 17 3", "1", "9 9 9 9 2", "--max-new-tokens", 12, *GREEDY)
    free = records(continued(capsys, bare_model, *words))
    # The token that one prompt alone gets in the middle ends that prompt.
    others = set(free[1]["ids"]) | set(free[2]["ids"])
    place, stop = next((i, t) for i, t in enumerate(free[0]["ids"]) if t not in others)
    copy = shutil.copytree(bare_model, tmp_path / "copy")
    folders.edit_json(copy / "config.json", eos_token_id=stop)
    found = records(continued(capsys, copy, *words))
    assert found[0]["ids"] == free[0]["ids"][: place + 1]
    assert found[0]["ended"] == "stop id"
    assert found[1:] == free[1:]


# ---- settings of the source


def test_the_folders_sampling_is_the_default(chat_copy, capsys):
    folders.write_generation(chat_copy, temperature=1.3, top_k=17, repetition_penalty=1.0)
    _, _, err = answer(capsys, "--load", chat_copy, "--prompt", "the", "--max-new-tokens", 1)
    assert "tokens: drawn with temperature 1.3, top-k 17, top-p 0.8, seed 1234" in err
    folders.write_generation(chat_copy, do_sample=False, repetition_penalty=1.0)
    _, _, err = answer(capsys, "--load", chat_copy, "--prompt", "the", "--max-new-tokens", 1)
    assert "tokens: the likeliest token each time\n" in err


def test_settings_that_are_not_followed_are_named(chat_copy, capsys):
    folders.write_generation(chat_copy, num_beams=2, min_p=0.1, typical_p=1.0)
    words = ("--prompt", "the", "--max-new-tokens", 3, *GREEDY)
    code, out, err = answer(capsys, "--load", chat_copy, *words)
    assert code == 0
    assert out.startswith("the"), out
    assert "generation_config.json: not followed: num_beams = 2, min_p = 0.1\n" in err


# ---- bad input


def only_error(err: str) -> str:
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "Fix: " in errors[0]
    return errors[0]


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
        (("--top-p", "0"), "top_p = 0.0: must be above 0 and at most 1"),
        (("--top-p", "1.5"), "top_p = 1.5: must be above 0 and at most 1"),
        (("--top-k", "-1"), "top_k = -1: must be at least 0"),
        (("--repetition-penalty", "0"), "repetition_penalty = 0.0: must be a finite number"),
        (("--batch-size", "0"), "batch_size = 0: must be at least 1"),
        (("--max-new-tokens", "-1"), "max_new_tokens = -1: must be at least 0"),
        (("--prompt", "\udcff"), "is not valid UTF-8"),
        (("--seed", "-1"), "seed = -1: must be in [0, 2**63)"),
        (("--prompts", "x"), "prompts = x: cannot be combined with --prompt"),
        (("--ckpt-step", "3"), "ckpt_step = 3:"),
        (("--prompt", ""), "is empty, and"),
        (("--prompt", "the quick"), "must be whitespace-separated integers"),
        (("--prompt", "320"), "token id 320: must be in [0, vocab_size = 320)"),
        (("--prompt", "7 " * 64), "prompt: 64 tokens, and the model's context is 64"),
        (("--prompt", "7", "7 " * 64), "prompt 2: 64 tokens, and the model's context is 64"),
        (("--tensor-model-parallel-size", "0"), "tensor_model_parallel_size = 0: must be at"),
        (
            ("--pipeline-model-parallel-size", "2"),
            "pipeline_model_parallel_size = 2: a token passes through all layers",
        ),
    ],
)
def test_bad_input_is_one_line(bare_model, capsys, words, message):
    defaults = [] if "--prompt" in words else ["--prompt", "5"]
    code, out, err = answer(capsys, "--load", bare_model, *defaults, *words)
    assert code == 2, err
    assert message in only_error(err)
    assert out == ""


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"prompt": 3}\n', "must hold a text or a list of token ids"),
        ("[1, 2.5]\n", "must hold a text or a list of token ids"),
        ('{"ids": [320]}\n', "prompts.jsonl:1: token id 320: must be in [0, vocab_size = 320)"),
        ('"5"\n{"pro\n', "prompts.jsonl:2: is not valid JSON"),
        ("\n", "holds no prompt"),
    ],
)
def test_bad_files_of_prompts_are_one_line(bare_model, tmp_path, capsys, content, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    code, out, err = answer(capsys, "--load", bare_model, "--prompts", file)
    assert (code, out) == (2, "")
    assert message in only_error(err)


def test_a_file_of_prompts_is_read_before_the_model(tmp_path, capsys):
    code, out, err = answer(capsys, "--load", tmp_path / "x", "--prompts", tmp_path / "none.txt")
    assert (code, out) == (2, "")
    assert "none.txt: cannot be read (No such file or directory)" in only_error(err)


def test_new_tokens_end_with_the_context(bare_model, capsys):
    code, out, err = answer(capsys, "--load", bare_model, "--prompt", "7 " * 60)
    assert code == 0
    assert len(out.split()) == 64
    assert "max_new_tokens = 80: 4 fit into the model's context of 64 after prompt" in err


def test_keys_that_do_not_fit_are_refused_before_anything_is_computed(
    bare_model, capsys, monkeypatch
):
    monkeypatch.setattr("tools.inference.decoding.free_memory", lambda _: 1000)
    code, out, err = answer(capsys, "--load", bare_model, "--prompt", "7", "--max-new-tokens", 20)
    assert (code, out) == (2, "")
    # Two layers, keys and values, 20 tokens, one head of 8 numbers of 4 bytes.
    assert "keys and values take 2,560 bytes per process, and 1,000 are free" in only_error(err)


def test_folders_that_cannot_be_read_are_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    wrong = {
        tmp_path: "model_type = None: not built here",
        tmp_path / "empty": "nothing to open",
        tmp_path / "x": "no such folder",
    }
    for folder, message in wrong.items():
        code, _, err = answer(capsys, "--load", folder)
        assert code == 2
        assert message in only_error(err)


@pytest.mark.parametrize(
    "settings, words, message",
    [
        (dict(eos_token_id="x"), ("--prompt", "the"), "eos_token_id = x: must be token ids"),
        (dict(top_p=7), ("--prompt", "the"), "top_p = 7: must be a number above 0, up to 1"),
        (dict(temperature="1"), ("--prompt", "the"), "temperature = 1: must be a number from 0"),
        (dict(eos_token_id=-1, bos_token_id=-1), (), "is empty, and"),
        (dict(eos_token_id=[999]), (), "is empty, and"),
    ],
)
def test_settings_of_a_folder_that_cannot_be_followed_are_one_line(
    chat_copy, capsys, settings, words, message
):
    folders.write_generation(chat_copy, **settings)
    code, out, err = answer(capsys, "--load", chat_copy, *words)
    assert (code, out) == (2, "")
    assert message in only_error(err)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_model_of_nan_generates_nothing(chat_copy, capsys, temperature):
    def spoil(tensors):
        tensors["model.norm.weight"][:] = 3e38

    change_weights(chat_copy, spoil)
    words = ("--prompt", "the", "--max-new-tokens", 3, "--temperature", temperature)
    code, out, err = answer(capsys, "--load", chat_copy, *words)
    assert code == 2
    assert out in ("", "the")
    assert "its logits are NaN" in only_error(err)


def test_infinite_logits_choose_no_token(bare_model, capsys, monkeypatch):
    logits_bV = torch.ones(1, 320)
    logits_bV[0, 5] = float("inf")
    monkeypatch.setattr("tools.inference.decoding.all_logits", lambda *_: logits_bV)
    code, _, err = answer(capsys, "--load", bare_model, "--prompt", "7", "--temperature", 1)
    assert code == 2
    assert "its logits are NaN or infinite" in only_error(err)


def test_nobody_is_asked_about_the_folders_own_code(chat_copy, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    code = {"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}
    folders.edit_json(chat_copy / "config.json", model_type="strange", auto_map=code)
    code, out, err = answer(capsys, "--load", chat_copy, "--prompt", "the")
    assert (code, out) == (2, "")
    assert "model_type = strange: not built here" in only_error(err)
