"""The command `evaluate`: a checkpoint and the folder it came from have the same results, and every
layout those of one process."""

import json
import math
from pathlib import Path

import pytest
import torch

from parallel.config import LayoutConfig
from parallel.layout import World, build_layout, single_process_layout
from tests.huggingface.chat_folders import FOX, write_model, write_tokenizer
from tools import evaluate, import_hf
from tools.evaluation.opened import OpenedModel
from tools.evaluation.probe_data import encode_blend
from tools.evaluation.probes import Probes, ProbeSettings
from tools.evaluation.ruler_run import RulerRun
from tools.evaluation.task_names import choose_tasks
from tools.inference.open_model import OpenModel, open_model
from tools.inference.scores import score_texts

CONTEXT = 768
SETTINGS = ProbeSettings(
    loss_tokens=2000,
    context_gain_cut=64,
    context_gain_documents=2,
    eval_passkey_depths=[0.2, 0.7],
    eval_passkey_trials=2,
    seed=3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model of transformers with a tokenizer, and two texts beside it."""
    place = tmp_path_factory.mktemp("evaluated")
    write_tokenizer(
        write_model(place / "hf", max_position_embeddings=CONTEXT, num_key_value_heads=2)
    )
    (place / "fox.txt").write_text(f"{FOX}. " * 60)
    (place / "digits.txt").write_text("12 34 56. " * 200)
    return place


def evaluated(folder: Path, load: Path, *flags: str) -> dict:
    """The JSON file of the command."""
    output = folder / "results.json"
    texts = [str(folder / "fox.txt"), str(folder / "digits.txt")]
    words = ["--load", str(load), "--output", str(output), "--dtype", "fp64"]
    words += ["--eval-passkey-depths", "0.2", "0.7"]
    words += ["--text-file", *texts, "--context-gain-cut", "64", "--samples", "2", *flags]
    assert evaluate.main(words) == 0
    return json.loads(output.read_text())


def test_a_checkpoint_and_its_hugging_face_folder_have_the_same_results(folder, capsys):
    save = folder / "checkpoint"
    assert import_hf.main(["--hf", str(folder / "hf"), "--save", str(save), "--no-verify"]) == 0
    flags = ["--lengths", "640", "768", "--tasks", "probes", "niah_single_2"]
    of_folder = evaluated(folder, folder / "hf", *flags)
    capsys.readouterr()
    of_checkpoint = evaluated(folder, save, *flags)
    assert of_checkpoint["results"] == of_folder["results"]
    assert (of_folder["context_length"], of_folder["dtype"]) == (CONTEXT, "float64")
    records = of_folder["results"]
    kinds = [(record["task"], record["length"]) for record in records]
    assert kinds[:2] == [("loss", 640), ("context_gain", 640)]
    assert kinds.count(("passkey", 768)) == 2
    assert kinds[-2:] == [("niah_single_2", 640), ("niah_single_2", 768)]
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert table[0].split() == ["task", "640", "768"]
    losses = [record["loss"] for record in records if record["task"] == "loss"]
    assert table[1].split() == ["loss", *(f"{loss:.4f}" for loss in losses)]


def test_the_loss_is_that_of_the_scored_tokens(folder):
    """One document is one sample, whose tokens are scored by other means."""
    model = opened(str(folder / "hf"), single_process_layout(torch.device("cpu")))
    blend = encode_blend([folder / "fox.txt"], 1, model.tokenizer)
    ids = model.tokenizer.encode((folder / "fox.txt").read_text())
    (record,) = Probes(model, blend, SETTINGS).run(["loss"], [len(ids)], pytest.fail)
    (scores,) = score_texts(model, [ids])
    assert record["num_targets"] == len(ids) - 1
    assert math.isclose(record["loss"], -float(scores.log_probabilities.mean()), rel_tol=1e-12)


def opened(load: str, layout) -> OpenModel:
    return open_model(load, layout, precision="fp64")


def results_of(model: OpenModel, texts: list[str]) -> list[dict]:
    blend = encode_blend([Path(text) for text in texts], 3, model.tokenizer)
    probes = Probes(model, blend, SETTINGS)
    records = list(probes.run(["loss", "context_gain", "passkey"], [640, 768], pytest.fail))
    ruler = RulerRun(OpenedModel(model, 4096), seed=3, samples=2, text=None)
    return records + [ruler.run("niah_single_1", 640)]


def results_on_ranks(world: World, load: str, sizes: dict, texts: list[str]) -> list[dict]:
    return results_of(opened(load, build_layout(LayoutConfig(**sizes), world)), texts)


def test_every_layout_has_the_results_of_one_process(pool, folder):
    texts = [str(folder / "fox.txt"), str(folder / "digits.txt")]
    load = str(folder / "hf")
    expected = results_of(opened(load, single_process_layout(torch.device("cpu"))), texts)
    sizes = dict(tensor_model_parallel_size=1, context_parallel_size=2)
    for found in pool.run(results_on_ranks, 2, load, sizes, texts):
        assert len(found) == len(expected) == 2 * (1 + 1 + 2) + 1
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                if isinstance(value, float):
                    assert math.isclose(ours[name], value, rel_tol=1e-10, abs_tol=1e-12), name
                else:
                    assert ours[name] == value, name


# ---------------------------------------------------------------- bad input

REFUSED = {
    "unknown task": (["--tasks", "niah_singel_1"], "tasks = niah_singel_1: no such task. Fix: did"),
    "beyond": (["--lengths", "4Ki"], "lengths = 4096: the model's context is 768 tokens"),
    "too short": (
        ["--lengths", "200", "--tasks", "vt"],
        "lengths = 200: vt takes ",
    ),
    "passkey": (
        ["--lengths", "64", "--tasks", "passkey", "--text-file", "fox.txt"],
        "lengths = 64: half of it must hold the hidden sentence",
    ),
    "documents": (["--tasks", "loss"], "tasks = loss: need documents. Fix: give --data-path"),
    "file": (["--text-file", "none.txt"], "text_file = none.txt: no such file."),
    "two sources": (
        ["--text-file", "fox.txt", "--data-path", "x"],
        "text_file = fox.txt: cannot be combined with data_path",
    ),
    "count": (["--samples", "0"], "samples = 0: must be at least 1"),
    "length": (["--lengths", "0"], "lengths = 0: must be at least 1"),
    "depth": (["--eval-passkey-depths", "1.5"], "eval_passkey_depths = 1.5: must be numbers from"),
    "seed": (["--seed", "-1"], "seed = -1: must be in"),
    "limit alone": (["--lm-eval-limit", "3"], "lm_eval_limit = 3: is for --lm-eval-tasks"),
    "output": (["--output", "fox.txt"], "output = fox.txt: exists, and was not made by"),
    "load": (["--load", "fox.txt"], "load = fox.txt: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_line(folder, monkeypatch, capsys, name):
    flags, message = REFUSED[name]
    monkeypatch.chdir(folder)
    load = [] if "--load" in flags else ["--load", "hf"]
    assert evaluate.main([*load, *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: {message}"), lines


def test_settings_that_nothing_reads_are_named():
    def said(**settings) -> list[str]:
        arguments = evaluate.Arguments(load="x", **settings)
        names = choose_tasks(
            arguments.tasks, has_documents=False, has_others=bool(arguments.lm_eval_tasks)
        )
        return [line.split(":")[0] for line in evaluate.without_effect(arguments, names)]

    assert said() == []
    given = dict(data_path=["a"], loss_tokens=5, samples=3, lengths=[64])
    assert said(tasks=["vt"], **given) == ["data_path = a", "loss_tokens = 5"]
    assert said(tasks=["loss"], **given) == ["samples = 3"]
    of_harness = said(lm_eval_tasks=["x"], lm_eval_model="hf", ckpt_step=2, **given)
    assert of_harness[0] == "lengths = 64"
    assert of_harness[-1] == "ckpt_step = 2"
    assert len(of_harness) == 5
    asked = dict(prepend_bos=False, batch_tokens=64)
    assert said(tasks=["loss"], **asked) == ["batch_tokens = 64"]
    assert said(lm_eval_tasks=["x"], **asked) == []
    of_harness = said(lm_eval_tasks=["x"], lm_eval_model="hf", **asked)
    assert of_harness == ["prepend_bos = False", "batch_tokens = 64"]


def test_without_a_tokenizer_the_tasks_that_need_one_are_refused(folder, capsys):
    bare = write_model(folder / "bare", max_position_embeddings=CONTEXT)
    assert evaluate.main(["--load", str(bare), "--tasks", "vt"]) == 2
    assert "error: tasks = vt: needs a tokenizer, and " in capsys.readouterr().err


def test_a_harness_that_is_not_installed_is_named_with_its_release(folder, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = ["--load", str(folder / "hf"), "--lm-eval-tasks", "local_text"]
    assert evaluate.main(flags) == 2
    error = capsys.readouterr().err
    assert "lm_eval is not installed. Fix: pip install lm_eval==0.4.13" in error
