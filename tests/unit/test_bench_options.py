"""Options of the benchmarks: what cannot be measured is refused in one line at the start."""

import importlib.util

import pytest

from tools.bench.__main__ import load, main, run
from tools.bench.option_checks import find_too_small
from tools.bench.restart import AtScale

BAD = [
    ("attention", dict(processes=()), "--processes: has no value. Fix: give at least one."),
    ("attention", dict(processes=(1,)), "--processes 1: must be at least 2"),
    ("attention", dict(warm_ups=-1), "--warm-ups -1: must be at least 0"),
    ("checkpoint", dict(rounds=0), "--rounds 0: must be at least 1"),
    ("checkpoint", dict(file_rounds=0), "--file-rounds 0: must be at least 1"),
    ("checkpoint", dict(hidden=1000), "--hidden 1000: must be a multiple of 16"),
    ("data", dict(text_bytes=0), "--text-bytes 0: must be at least 1. Fix: give 1 or more.\n"),
    ("data", dict(read_tokens=1), "--read-tokens 1: too few for --samples"),
    ("disturbed", dict(kills=0), "--kills 0: must be at least 1"),
    ("disturbed", dict(kinds=[]), "--kinds: has no value. Fix: leave it out"),
    ("disturbed", dict(output="/tmp"), "--output /tmp: exists already. Fix: a new folder."),
    ("disturbed", dict(flags="--no-such-flag 1"), "no-such-flag"),
    ("disturbed", dict(flags="--lr '1"), "--flags --lr '1: No closing quotation. Fix: close"),
    ("generate", dict(batch_sizes=()), "--batch-sizes: has no value. Fix: give at least one."),
    ("generate", dict(batch_sizes=(8, 0)), "--batch-sizes 8 0: must be at least 1"),
    ("generate", dict(threads=0), "--threads 0: must be at least 1"),
    ("generate", dict(hidden_size=100), "--hidden-size 100: must be a multiple of two for each"),
    ("generate", dict(kv_heads=5), "--kv-heads 5: must divide --heads 12"),
    ("memory", dict(lengths=()), "--lengths: has no value. Fix: give at least one."),
    ("memory", dict(num_layers=0), "--num-layers 0: must be at least 1"),
    ("memory", dict(documents=3), "--documents 3: must divide the lengths"),
    ("optimizers", dict(quickstart="q", seeds=()), "--seeds: has no value"),
    ("optimizers", dict(quickstart="q", train_tokens="x"), "--train-tokens: 'x' is no token count"),
    ("optimizers", dict(quickstart="q", train_tokens="0"), "--train-tokens 0: a run trains on at"),
    ("optimizers", dict(tokens=0), "--tokens 0: nothing is measured without --quickstart"),
    ("predictions", dict(configurations=0), "--configurations 0: must be at least 1"),
    ("predictions", dict(first=20), "--first 20: must be below --configurations 20"),
    ("recompute", dict(layers=0), "--layers 0: must be at least 1"),
    ("recompute", dict(documents=0), "--documents 0: must be at least 1"),
    ("recompute", dict(documents=3), "--documents 3: must divide --tokens 1024"),
    ("recompute", dict(hidden=100), "--hidden 100: must be a multiple of 16"),
    ("restart", dict(kills=0), "--kills 0: must be at least 1"),
    ("restart", dict(processes=1), "--processes 1: must be at least 2"),
    (
        "restart",
        dict(at_scale=AtScale(save_minutes=0)),
        "--at-scale.save-minutes 0: must be above 0",
    ),
    ("step", dict(lengths=()), "--lengths: has no value. Fix: give at least one."),
    ("step", dict(num_layers=0), "--num-layers 0: must be at least 1"),
    ("traffic", dict(device="cpu", scale="toy", num_layers=0), "--num-layers 0: must be at least"),
    ("windows", dict(lengths=()), "--lengths: has no value. Fix: give at least one."),
    ("windows", dict(windows=()), "--windows: has no value. Fix: give at least one."),
    ("windows", dict(windows=(16384,)), "--windows 16384: the first must be below the longest"),
    ("windows", dict(repeats=0), "--repeats 0: must be at least 1"),
    ("windows", dict(kv_heads=3), "--kv-heads 3: must divide --heads 8"),
]
NEEDED = {"disturbed": dict(config="", output="/none")}
"""Options without a default."""


@pytest.mark.parametrize("name, changes, expected", BAD)
def test_what_cannot_be_measured_is_refused_in_one_line(
    name, changes, expected, monkeypatch, capsys
):
    module = load(name)
    # As if deepspeed were installed.
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)
    assert module.run(module.Arguments(**(NEEDED.get(name, {}) | changes))) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and expected in text and text.count("\n") == 1, text


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--repeat", "3"], "--repeat: no such flag. Fix: did you mean --repeats?"),
        (["--nope", "3"], "--nope: no such flag. Fix: see "),
        (["--repeats", "x"], "Error parsing --repeats"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
    ],
)
def test_bad_words_are_one_line_too(options, expected, capsys):
    assert run("step", options) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: {expected}") and text.count("\n") == 1, text


def test_flags_of_a_group_are_known(capsys):
    assert run("restart", ["--kills", "0", "--at-scale.save-minutes", "5"]) == 2
    assert capsys.readouterr().err.startswith("error: --kills 0: ")
    assert run("restart", ["--at-scale.save-minute", "5"]) == 2
    assert "did you mean --at-scale.save-minutes?" in capsys.readouterr().err


def run_and_raise(message: str, monkeypatch, capsys) -> str:
    """Let a benchmark raise a ValueError -> what is printed."""

    def fail(arguments):
        raise ValueError(message)

    monkeypatch.setattr(load("step"), "run", fail)
    assert run("step", []) == 2
    return capsys.readouterr().err


def test_bad_input_that_a_benchmark_finds_late_is_one_line(monkeypatch, capsys):
    said = run_and_raise("tokens = 3: must be even. Fix: 4.", monkeypatch, capsys)
    assert said == "error: tokens = 3: must be even. Fix: 4.\n"


def test_a_fault_of_a_benchmark_shows_where_it_stands(monkeypatch, capsys):
    said = run_and_raise("zip() argument 2 is longer than argument 1", monkeypatch, capsys)
    assert said.startswith("Traceback") and "in fail" in said
    assert said.endswith("error: zip() argument 2 is longer than argument 1\n")


@pytest.mark.parametrize("word", ["steps", "--repeats"])
def test_an_unknown_benchmark_is_refused_in_one_line(word, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", word, "3"])
    assert main() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {word}: no such benchmark. Fix: one of attention, ")
    assert said.count("\n") == 1


def test_an_option_that_was_not_given_is_not_checked():
    arguments = load("step").Arguments(num_layers=None, lengths=(2, 3))
    assert find_too_small(arguments, num_layers=1, lengths=2, repeats=5) is None


@pytest.mark.parametrize(
    "name", sorted({name for name, *_ in BAD} - {"data", "disturbed", "traffic"})
)
def test_the_defaults_can_be_measured(name, monkeypatch):
    module = load(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)
    assert module.find_problem(module.Arguments()) is None
