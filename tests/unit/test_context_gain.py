"""pretrain/evaluation/context_gain.py: which targets are scored with which context, and what
their losses say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.batch import IGNORE
from data.excerpts import lay_out
from data.sources import Corpus
from data.stream import DocumentStream
from parallel.layout import single_process_layout
from pretrain.config.load import load_config
from pretrain.evaluation import evaluate
from pretrain.evaluation.context_gain import (
    choose_documents,
    cut_probe,
    full_probe,
    measure,
    summarize,
    target_blocks,
)
from pretrain.evaluation.evaluate import Evaluator
from pretrain.evaluation.lengths import length_warnings
from pretrain.evaluation.probe import ProbeShape
from pretrain.schedule.resolve import resolve_phases
from pretrain.step import Scores
from tests.documents import Documents


def blend(*sources) -> list:
    return [(weight, DocumentStream(Documents(lengths), None, 1)) for weight, lengths in sources]


@pytest.mark.parametrize("cut", [1, 2, 7, 8, 16, 100, 1024])
def test_blocks_lie_apart_behind_the_cut_and_their_windows_fit(cut):
    for length in (2 * cut, 2 * cut + 1, 3 * cut, 5 * cut + 3, 37 * cut + 11):
        blocks = target_blocks(length, cut)
        assert len(blocks) >= 1 and (np.diff(blocks) == max(1, cut // 8)).all()
        assert (
            cut <= blocks[0, 0]
            and blocks[-1, 1] <= length
            and (blocks[1:, 0] >= blocks[:-1, 1]).all()
        )
        assert len(blocks) * (cut + max(1, cut // 8)) <= length, (
            "the windows fit into one microbatch"
        )
        gaps = np.diff(blocks[:, 0])
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1, "spread evenly"


@pytest.mark.parametrize("length, total", [(40, 40), (33, 40), (90, 100)])
def test_both_passes_score_the_same_targets_each_with_enough_context(length, total):
    """Token = document * 1000 + place, so a label says where it stands; its context is its segment
    before it."""
    cut = 16
    number = 2
    documents = choose_documents(blend((1.0, [5, 31, 95, 20])), cut, 99, 9)
    assert [(document.number, document.length) for document in documents] == [(number, 95)]
    found = []
    for probe in (full_probe, cut_probe):
        batch = lay_out(
            probe(documents[0], length, cut), total, [(0, total)], padding=0, vocab_size=9999
        )
        scored = batch.labels != IGNORE
        places = batch.labels[scored] - 1000 * number
        context = batch.positions[scored] + 1
        assert (places >= cut).all() and (places < length).all()
        starts = batch.tokens[(scored.nonzero()[:, 0] - batch.positions[scored])]
        assert (starts // 1000 == number).all(), "the context begins in the same document"
        assert (starts - 1000 * number + context == places).all(), (
            "and holds every token up to the target"
        )
        if probe is full_probe:
            assert (context == places).all()
        else:
            assert context.min() == cut and context.max() == cut + cut // 8 - 1
        found.append(places.tolist())
    assert found[0] == found[1] and len(found[0]) == batch.num_targets == (length // 18) * 2


def test_documents_come_in_the_order_of_the_streams_and_their_shares():
    sources = blend((3.0, [50, 10, 60, 70, 80, 90, 99]), (1.0, [40] * 8), (1.0, [3, 4]))
    chosen = choose_documents(sources, 16, 40, 8)
    of_first = [document.number for document in chosen if document.reader is sources[0][1].reader]
    assert (
        len(chosen) == 8 and len(of_first) == 6 and of_first == sources[0][1].first_documents(6, 32)
    )
    assert choose_documents(blend((1.0, [31, 5])), 16, 40, 8) == []


def test_documents_that_fill_the_length_come_before_shorter_ones():
    sources = blend((1.0, [40] * 50 + [900, 64, 500]), (9.0, [40] * 50 + [300]))

    def lengths(seq_length, count):
        return sorted(
            document.length for document in choose_documents(sources, 16, seq_length, count)
        )

    assert lengths(200, 3) == [300, 500, 900] and lengths(200, 4) == [64, 300, 500, 900]
    assert lengths(32, 4) != [64, 300, 500, 900], "where all fill it, the streams' order decides"
    assert len(lengths(200, 999)) == 104


class KnownModel:
    """Scores as a model that finds a target for 0.5 nats with `far` tokens of context or more, and
    2 nats with less."""

    layout = single_process_layout(torch.device("cpu"))

    def __init__(self, far: int):
        self.far = far

    def score(self, batches) -> Scores:
        sums = [
            float(np.where(batch.positions[batch.labels != IGNORE] + 1 >= self.far, 0.5, 2.0).sum())
            for batch in batches
        ]
        targets = np.array([batch.num_targets for batch in batches])
        return Scores(np.array(sums), targets, np.zeros_like(targets))


def test_a_planted_gain_is_found():
    """Only targets behind `far` gain, 1.5 nats each: how many those are is counted from the
    blocks."""
    cut = 16
    far = 64
    length = 200
    shape = ProbeShape(token_multiple=8, padding=0, vocab_size=9999)
    documents = choose_documents(blend((1.0, [100, 40, 300, 90])), cut, length, 9)
    places = np.concatenate(
        [
            np.concatenate(
                [np.arange(*block) for block in target_blocks(min(d.length, length), cut)]
            )
            for d in documents
        ]
    )
    share = float((places >= far).mean())
    found = measure(KnownModel(far), documents, length, cut, 1, shape)
    assert (
        0.3 < share < 0.9
        and found.loss_cut == 2.0
        and found.gain == pytest.approx(1.5 * share, abs=1e-12)
    )
    assert (
        found.documents == 4
        and found.num_targets == len(places)
        and found.gain_low < found.gain < found.gain_high
    )
    none = measure(KnownModel(10**6), documents, length, cut, 1, shape)
    assert (none.gain, none.gain_low, none.gain_high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("documents", [2, 4, 16])
def test_the_interval_covers_the_true_gain(documents):
    """Gains scatter around 0.3: about 95 of 100 intervals hold it, however few documents there
    are."""
    generator = np.random.default_rng(5)
    covered = 0
    widths = []
    targets = generator.integers(150, 200, size=documents)
    for trial in range(200):
        full = (
            generator.normal(3.0, 1.0, documents) * targets
        )  # documents differ far more than their gains
        cut = full + generator.normal(0.3, 0.1, documents) * targets
        found = summarize(full, cut, targets, trial)
        covered += found.gain_low <= 0.3 <= found.gain_high
        widths.append(found.gain_high - found.gain_low)
    assert 0.89 <= covered / 200 <= 0.995
    if documents == 16:
        assert (
            0.08 < np.mean(widths) < 0.13
        )  # 2 x 2.13 x 0.1 / 4: not that of the documents' losses


@pytest.mark.parametrize(
    "seq_length, lengths, flags, said",
    [
        (
            64,
            (90,),
            "",
            [
                "context gain is not measured in phase main: its seq_length 64 is below 2 x "
                "context_gain_cut = 2,048"
            ],
        ),
        (64, (90, 31), "--context-gain-cut 16", []),
        (
            64,
            (31, 31),
            "--context-gain-cut 16",
            [
                "context gain of valid is not measured: no document of it has 2 x "
                "context_gain_cut = 32 tokens"
            ],
        ),
        (64, (31,), "--no-eval-context-gain", []),
        (64, (31,), "--eval-iters 0", []),
    ],
)
def test_it_says_why_nothing_is_measured(seq_length, lengths, flags, said):
    config = load_config(
        f"--seq-length {seq_length} --global-batch-size 2 --train-iters 1 --mock-data "
        f"--vocab-size 99 {flags}".split()
    )
    feed = SimpleNamespace(corpus=Corpus({}, {"valid": blend((1.0, lengths))}))
    assert Evaluator(config, feed, None).unmeasured(resolve_phases(config)[0]) == said


def test_lengths_far_beyond_the_phase_are_warned_of():
    config = load_config(
        "--seq-length 64 --global-batch-size 2 --train-iters 1 --mock-data --vocab-size 99 "
        "--eval-seq-lengths 16 256 512".split()
    )
    (said,) = length_warnings(config.logging, resolve_phases(config))
    assert said == (
        "phase 'main': eval_seq_lengths = 512: a microbatch has 8 times the tokens of the "
        "phase's own on each rank and may not fit into memory"
    )
    config.logging.eval_iters = 0
    assert length_warnings(config.logging, resolve_phases(config)) == []


def test_one_document_has_no_interval():
    found = summarize(np.array([10.0]), np.array([14.0]), np.array([8]), 1)
    assert (found.gain, found.gain_low, found.gain_high, found.documents) == (0.5, None, None, 1)


def test_samples_without_a_target_are_said_and_give_no_loss(monkeypatch, capsys):
    config = load_config(
        "--seq-length 64 --global-batch-size 2 --train-iters 1 --mock-data --vocab-size 99 "
        "--eval-iters 1".split()
    )
    (phase,) = resolve_phases(config)
    corpus = Corpus({}, {"valid": blend((1.0, (90, 40)))})
    feed = SimpleNamespace(
        corpus=corpus,
        layout=single_process_layout(torch.device("cpu")),
        eod=0,
        vocab_size=99,
        validation=lambda *_: {"valid": (None, SimpleNamespace(num_samples=3))},
    )
    monkeypatch.setattr(evaluate, "validation_loss", lambda *_: (0.0, 0))
    monkeypatch.setattr(evaluate, "reshard", lambda _: None)
    stepper = SimpleNamespace(stop=None, stages=[])
    assert list(Evaluator(config, feed, None).run(stepper, phase)) == []
    assert capsys.readouterr().err == (
        "warning: validation set valid: the 2 samples of an evaluation hold no target, so that "
        "it has no loss\n"
    )


@pytest.mark.parametrize(
    "eval_iters, said",
    [
        (1, []),  # 128 tokens of a set of 130
        (
            2,
            [
                "validation set valid has 130 tokens, and eval_iters x the batch are 256: each "
                "of its tokens is counted once"
            ],
        ),
        (0, []),
    ],
)
def test_it_says_which_sets_are_measured_whole(eval_iters, said):
    config = load_config(
        "--seq-length 64 --global-batch-size 2 --train-iters 1 --mock-data --vocab-size 99 "
        f"--eval-iters {eval_iters}".split()
    )
    feed = SimpleNamespace(corpus=Corpus({}, {"valid": blend((1.0, (90, 40)))}))
    assert Evaluator(config, feed, None).taken_whole(resolve_phases(config)[0]) == said
