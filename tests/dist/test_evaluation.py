"""Evaluations give on any layout what one process gives, in fp64: scores per microbatch, context
gain, passkey."""

import dataclasses
import json
from unittest.mock import patch

import numpy as np
import pytest
import torch

from data.config import DataConfig
from data.dealing import deal
from data.sources import Corpus
from data.stream import DocumentStream
from parallel.layout import Axis
from parallel.tensor import vocab_parallel_argmax
from pretrain.planner.model_size import document_cost_of
from pretrain.batches import Feed
from pretrain.checkpointing.folders import LATEST
from pretrain.config.load import load_config
from pretrain.evaluation.evaluate import Evaluator
from pretrain.processes.agreement import Refused
from pretrain.schedule.resolve import resolve_phases
from tests.dist.parity import TOLERANCE, VOCABULARY, Case
from tests.dist.training import base_arguments, losses, train, write_corpus
from tests.documents import Documents, Letters
from tests.marks import cases

UNTIED = dict(untie_embeddings_and_output_weights=True)
LAYOUTS = {
    "tp2 dp2": Case(tp=2, dp=2),
    "pp2 cp2": Case(pp=2, cp=2),
    "pp2 ZBV": Case(pp=2, schedule="ZBV", model=dict(num_layers=5)),
    "pp2 ZBV dp2": Case(pp=2, dp=2, schedule="ZBV", model=dict(num_layers=5) | UNTIED),
    "pp2 interleaved": Case(pp=2, schedule="interleaved", model=dict(num_layers=5)),
    "pp2 zero-bubble": Case(pp=2, schedule="zero-bubble"),
    "cp4 two levels": Case(cp=4, context_levels=(2, 2)),
    "tp2 sequence parallel zero3": Case(
        tp=2, dp=2, sequence_parallel=True, strategy="optim_grads_params"
    ),
}


def score(world, case: Case) -> dict:
    """The scores of the first global batch, the loss that training would see, and in one process a
    count by hand."""
    layout, stages, _, stepper, loader = case.build(world)
    batches = loader.read(0)
    scores = stepper.score(batches)
    result = {
        "scores": (scores.loss_sums, scores.num_targets, scores.num_correct),
        "run": stepper.run(batches, train=False),
    }
    if world.size == 1:
        with torch.no_grad():
            logits = [
                stages[0].logits(stages[0].hidden(torch.empty(0), batch)) for batch in batches
            ]
        result["by_hand"] = [
            int((row.argmax(dim=1) == batch.labels).sum())
            for row, batch in zip(logits, batches, strict=True)
        ]
    return result


@pytest.mark.parametrize(
    "name", cases(LAYOUTS, lambda name: name in ("tp2 dp2", "pp2 ZBV", "pp2 interleaved"))
)
def test_scores_equal_one_process(pool, name):
    # An untrained model is right about once in 101 targets
    case = dataclasses.replace(LAYOUTS[name], samples=16)
    (expected,) = pool.run(score, 1, case.single())
    sums, targets, hits = expected["scores"]
    assert (
        len(sums) == case.samples
        and hits.tolist() == expected["by_hand"]
        and 0 < hits.sum() < targets.sum()
    )
    assert abs(sums.sum() / targets.sum() - expected["run"][0]) < TOLERANCE * expected["run"][0]
    for result in pool.run(score, case.world_size, case):
        assert np.abs(result["scores"][0] - sums).max() < TOLERANCE * sums.max()
        assert np.array_equal(result["scores"][1], targets) and np.array_equal(
            result["scores"][2], hits
        )


def argmax_over_tp(world, logits: np.ndarray) -> list[int]:
    tp = Axis("tp", world.rank, world.size, tuple(range(world.size)), torch.distributed.group.WORLD)
    part = torch.from_numpy(logits).chunk(world.size, dim=1)[world.rank].to(torch.bfloat16)
    return vocab_parallel_argmax(part, tp).tolist()


def test_of_equal_logits_the_first_id_wins_and_padding_never(pool):
    low = float("-inf")
    logits = np.array(
        [
            [0, 1, 1, 0, 1, 0, low, low],
            [3, 0, 0, 0, 0, 0, low, low],
            [-9, -9, -9, -9, -9, -8, low, low],
            [-5, -5, -5, -5, -5, -5, low, low],
        ]
    )
    assert pool.run(argmax_over_tp, 4, logits) == [[1, 0, 5, 0]] * 4


class FoldedLetters(Letters):
    """Letters as ids of the parity cases' vocabulary."""

    def encode(self, text):
        return [ord(letter) % VOCABULARY for letter in text]


def validation_stream() -> DocumentStream:
    generator = np.random.default_rng(3)
    lengths = (40, 3, 90, 33, 64, 200, 5, 31, 70, 500, 2, 333)
    return DocumentStream(
        Documents(lengths, lambda _, n: generator.integers(0, VOCABULARY, size=n)), None, 5
    )


def evaluate(world, case: Case) -> list[dict]:
    """Every record of one evaluation: three lengths, context gain, passkey."""
    layout, _, _, stepper, _ = case.build(world)
    config = load_config(
        "--seq-length 64 --global-batch-tokens 512 --train-iters 1 --mock-data --vocab-size 101 "
        "--eval-iters 3 --eval-seq-lengths 16 64 256 --context-gain-cut 16 "
        "--context-gain-documents 5 --eval-passkey-lengths 256 --eval-passkey-depths 0.2 "
        "0.8".split()
    )
    phase = dataclasses.replace(
        resolve_phases(config)[0],
        layout=case.layout_config(),
        micro_batch_size=case.micro_batch_size,
        document_masking=case.document_masking,
    )
    feed = Feed(
        DataConfig(),
        Corpus({}, {"valid": [(1.0, validation_stream())]}),
        None,
        layout,
        eod=None,
        vocab_size=VOCABULARY,
        cost=document_cost_of(case.model_config(), VOCABULARY),
    )
    return list(Evaluator(config, feed, FoldedLetters()).run(stepper, phase))


EVALUATED = {
    "tp2 dp2 micro2": Case(tp=2, dp=2, micro_batch_size=2),
    "pp2 cp2": Case(pp=2, cp=2),
    "pp2 ZBV dp2": Case(pp=2, dp=2, schedule="ZBV", model=dict(num_layers=5)),
    "pp2 interleaved": Case(pp=2, schedule="interleaved", model=dict(num_layers=5)),
    "cp4 two levels no masking": Case(cp=4, context_levels=(2, 2), document_masking=False),
    "dp3": Case(dp=3, strategy="optim_grads_params", samples=9),
}


@pytest.mark.parametrize(
    "name", cases(EVALUATED, lambda name: name in ("pp2 interleaved", "pp2 cp2"))
)
def test_evaluations_equal_one_process(pool, name):
    case = EVALUATED[name]
    (expected,) = pool.run(evaluate, 1, case.single())
    assert [(record["kind"], record["seq_length"]) for record in expected] == [
        ("loss", 16),
        ("loss", 64),
        ("loss", 256),
        ("context_gain", 64),
        ("passkey", 256),
        ("passkey", 256),
    ]
    gain = expected[3]
    assert gain["documents"] == 5 and gain["gain_low"] < gain["gain"] < gain["gain_high"]
    # Each token of the set is counted once, but for the documents' last ones
    if case.document_masking:
        assert [record["num_targets"] for record in expected[:3]] == [1371 - 12] * 3
    for found in pool.run(evaluate, case.world_size, case):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                close = (
                    abs(ours[key] - value) <= TOLERANCE * max(1, abs(value))
                    if isinstance(value, float)
                    else (ours[key] == value)
                )
                assert close, f"{key} of {theirs}: {ours[key]}"


def evaluate_dealt_otherwise(world, case: Case, place: str, differs: bool) -> str:
    """What an evaluation says where the last rank's samples or probes are dealt otherwise."""

    def deal_otherwise(costs, shape):
        slots = deal(costs, shape)
        return np.roll(slots, 1) if differs and world.rank == world.size - 1 else slots

    with patch(f"{place}.deal", deal_otherwise):
        try:
            evaluate(world, case)
        except Refused as refused:
            return str(refused)
    return ""


@pytest.mark.parametrize("place", ["data.loader", "pretrain.evaluation.probe"])
def test_ranks_that_deal_an_evaluation_otherwise_end_the_run(pool, place):
    assert pool.run(evaluate_dealt_otherwise, 2, Case(dp=2), place, False) == ["", ""]
    for text in pool.run(evaluate_dealt_otherwise, 2, Case(dp=2), place, True):
        assert text.startswith("balance = deal: ranks gave the samples of an evaluation"), text
        assert "Fix: the same data files" in text


def test_a_restart_writes_no_record_twice(pool, tmp_path):
    """A kill after step 5 with the last checkpoint at step 3: everything of steps 4 to 6 is written
    again, once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    corpus = write_corpus(tmp_path / "corpus")
    save = tmp_path / "save"
    shown = str(tmp_path / "shown")
    argv = base_arguments(
        corpus,
        save=str(save),
        save_interval=3,
        eval_interval=3,
        tensorboard_dir=shown,
        context_gain_cut=16,
    ) + ["--eval-seq-lengths", "32", "64"]
    pool.run(train, 1, argv)
    lines = (save / "validation.jsonl").read_text()
    records = [json.loads(line) for line in lines.splitlines()]
    assert [(r["step"], r["kind"], r["seq_length"]) for r in records] == [
        (step, kind, length)
        for step in (0, 3, 6)
        for kind, length in (("loss", 32), ("loss", 64), ("context_gain", 64))
    ]
    cut_short = [
        *argv,
        "--save",
        str(tmp_path / "cut"),
        "--exit-interval",
        "3",
        "--tensorboard-dir",
        str(tmp_path / "other"),
    ]
    assert [pool.run(train, 1, cut_short) for _ in range(2)] == [["stopped"], ["done"]]
    assert (tmp_path / "cut" / "validation.jsonl").read_text() == lines, (
        "none is left out at a stop that was planned"
    )
    (save / LATEST).write_text("3")
    assert pool.run(train, 1, argv) == ["done"]
    assert (save / "validation.jsonl").read_text() == lines
    events = [json.loads(line) for line in (save / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [
        ("start", 0),
        ("phase", 0),
        ("save", 3),
        ("save", 6),
        ("done", 6),
        ("restart", 3),
        ("save", 6),
        ("done", 6),
    ]
    assert all(event["tokens"] == 256 * event["step"] and event["text"] for event in events)
    assert events == sorted(events, key=lambda event: event["time"])
    board = EventAccumulator(shown).Reload()
    steps = losses(save)
    assert [e.step for e in board.Scalars("loss")] == list(steps) == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in board.Scalars("loss")] == pytest.approx(list(steps.values()), rel=1e-6)
    assert [e.step for e in board.Scalars("valid_loss/32")] == [0, 3, 6]
    assert [e.step for e in board.Scalars("context_gain/gain")] == [0, 3, 6]
