"""What the tool says a batch holds is what the trainer reads."""

import re

import numpy as np
import pytest
import yaml

from data.segments import ClosedSegment
from data.tokenizers.tokenizer import NullTokenizer
from data.writers.indexed_writer import IndexedWriter
from pretrain.batches import Feed, ledger_at
from pretrain.config.flags import spell
from pretrain.config.load import load_config
from pretrain.guards.rewinds import Rewind
from pretrain.plan import make_plan
from pretrain.planner.model_size import document_cost_of
from tools.inspect_data import main

VOCABULARY = 97


@pytest.fixture
def corpora(tmp_path):
    prefixes = []
    for number, name in enumerate(("web", "code")):
        generator = np.random.default_rng(number)
        prefixes.append(str(tmp_path / name))
        with IndexedWriter(prefixes[-1], np.uint16) as writer:
            for _ in range(150):
                writer.add_document(generator.integers(0, 90, generator.integers(0, 200)))
            writer.finish(NullTokenizer(VOCABULARY).describe())
    return prefixes


@pytest.fixture
def config(corpora, tmp_path):
    web, code = corpora
    settings = {
        "model": "tiny",
        "num_layers": 1,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "data_path": [2, web, 1, code],
        "tokenizer_type": "NullTokenizer",
        "vocab_size": VOCABULARY,
        "split": "1",
        "save": str(tmp_path / "save"),
        "skip_data": ["300:600"],
        "phases": [
            {"name": "short", "seq_length": 64, "train_tokens": 1024, "global_batch_tokens": 512},
            {
                "name": "long",
                "seq_length": 128,
                "train_tokens": 2048,
                "global_batch_tokens": 512,
                "packing": "best_fit",
                "data_path": [web],
                "context_parallel_size": 4,
                "cp_comm_type": "a2a+allgather",
                "hierarchical_context_parallel_sizes": [2, 2],
            },
        ],
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_a_corpus(corpora, tmp_path, capsys):
    plot = tmp_path / "lengths.png"
    assert main(["--data-path", *corpora, "--samples", "2", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "web: 150 documents (" in out and "tokenizer NullTokenizer, 97 ids, " in out
    assert (
        out.count("  document ") == 4 and "length: least 0" in out and plot.stat().st_size > 10_000
    )
    assert (
        main(
            [
                "--data-path",
                corpora[0],
                "--samples",
                "1",
                "--tokenizer-type",
                "HuggingFaceTokenizer",
                "--tokenizer-model",
                "nowhere",
            ]
        )
        == 2
    )


def test_the_plan(config, capsys):
    assert main(["--config", config, "--world-size", "8"]) == 0
    out = capsys.readouterr().out
    assert "66.67%" in out and re.search(r"long +100.00% +2,048", out) and "cp 4" in out


def test_a_batch_is_the_one_that_is_trained(config, capsys):
    """Tokens of step 1 of the second phase, past a window that is passed over, against the
    trainer's own reading."""
    assert main(["--config", config, "--world-size", "8", "--phase", "long", "--batch", "1"]) == 0
    out = capsys.readouterr().out
    plan = make_plan(load_config(spell(["--config", config])), 8)

    class Place:
        rank = 0
        size = 1

    class Layout:
        dp = cp = cp_a2a = cp_gather = Place

    feed = Feed(
        plan.config.data,
        plan.corpus,
        plan.ledger,
        Layout,
        eod=None,
        vocab_size=VOCABULARY,
        cost=document_cost_of(plan.config.model, VOCABULARY),
    )
    read = []
    steps = {}
    for phase in plan.phases:
        feed.enter(phase, phase.start)
        for clock in range(phase.start, phase.end, phase.global_batch_tokens):
            read = [batch.tokens for batch in feed.read(clock)]
            steps[phase.name, clock] = read
    expected = steps["long", 1024 + 512]
    assert "clock 1,536" in out and out.count("  dp ") == 2 * 4 * 2
    begins = re.findall(
        r"cp 0 microbatch \d: samples (\d), tokens \[0:32\] of.*\n    '([\d ]+) ?' ...", out
    )
    assert len(begins) == 4
    assert sorted(number for number, _ in begins) == ["0", "1", "2", "3"]
    for number, text in begins:
        assert text.split() == [str(token) for token in expected[int(number)][:12].tolist()]
    ledger = ledger_at(
        plan.config.data, plan.corpus, plan.ledger, 3072, plan.phases, 0, cost=feed.cost
    )
    assert ledger.open.start == 0


def test_windows_are_passed_over_in_the_order_of_their_steps(config):
    """That of --skip-data, 300:600, is listed before those of rewinds."""
    plan = make_plan(load_config(spell(["--config", config])), 8)
    rewind = Rewind(number=1, start=0, end=64, step=1, reason="spike")
    ledger = ledger_at(
        plan.config.data,
        plan.corpus,
        plan.ledger,
        0,
        plan.phases,
        1024,
        rewinds=[rewind],
        cost=document_cost_of(plan.config.model, plan.vocab_size),
    )
    passed = [
        (segment.start, segment.rewind)
        for segment in ledger.segments
        if isinstance(segment, ClosedSegment) and segment.skipped_until is not None
    ]
    (skipped,) = ledger.skip_starts
    assert passed == [(0, 1), (skipped, None)] and skipped >= 300, passed


def test_a_batch_without_a_target_is_said(config, tmp_path, capsys):
    for name in ("web", "code"):
        with IndexedWriter(str(tmp_path / name), np.uint16) as writer:
            for number in range(3000):
                writer.add_document([number % 90])
            writer.add_document([1, 2])  # a corpus without any target is refused by the plan
            writer.finish(NullTokenizer(VOCABULARY).describe())
    arguments = ["--config", config, "--world-size", "8", "--phase", "short", "--batch", "0"]
    warning = "warning: no token of this batch has a target"
    assert main(arguments) == 0
    assert warning in capsys.readouterr().out
    assert main([*arguments, "--", "--no-document-masking"]) == 0
    assert warning not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "data_path, config, load: none given. Fix"),
        (["--load", "nowhere"], "no checkpoint is published there. Fix"),
        (["--data-path", "nowhere"], "nowhere.idx: no such file"),
        (
            ["--config", "CONFIG", "--world-size", "8", "--phase", "x"],
            "phase = x: the run has short, long. Fix",
        ),
        (
            ["--config", "CONFIG", "--world-size", "8", "--phase", "short", "--batch", "2"],
            "has steps 0 to 1. Fix",
        ),
    ],
)
def test_bad_input(config, capsys, flags, message):
    assert main([config if flag == "CONFIG" else flag for flag in flags]) == 2
    assert message in capsys.readouterr().err
