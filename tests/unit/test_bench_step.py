"""The step and memory benchmarks at toy size: what they compare, count and judge."""

import types

import pytest
import torch
from torch.nn import functional as F

from data.batch import IGNORE
from model.attention_backends.choice import choose_attention
from model.attention_backends.documents import pack_documents
from model.products import linear
from tools.bench import contenders, memory, peers, step_report, step_work
from tools.bench.contenders import (
    ALST,
    CHECKPOINTED,
    OURS,
    THEIRS,
    VOCABULARY,
    make_sample,
    preset,
)
from tools.bench.fresh import RETURN_MEMORY, run_fresh
from tools.bench.peers import PeerOptions, Transformers, check_losses
from tools.bench.products import Replay, TimedAttend, kind_of, product_flops, record

LAYERS = {"num_layers": 1}


def test_contenders_agree_and_are_timed():
    """ours, transformers, with checkpointing and with ALST's parts: the same losses, or time_steps
    raises."""
    pytest.importorskip("transformers")
    names = {OURS: LAYERS, THEIRS: LAYERS, CHECKPOINTED: LAYERS}
    if _has_deepspeed():
        names[ALST] = LAYERS
    found = run_fresh(
        step_work.time_steps,
        1,
        settings=names,
        lengths=[40, 24],
        dtype="float32",
        repeats=2,
        seed=1,
    )
    assert set(found["seconds"]) == set(names)
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    assert set(found["own"]) == {OURS} and min(found["own"][OURS]["attention"]) > 0
    assert 8 < found["loss"] < 10  # ln(8192) = 9.01


def _has_deepspeed() -> bool:
    import importlib.util

    return importlib.util.find_spec("deepspeed") is not None


def test_peaks_follow_the_length():
    common = {
        "name": OURS,
        "changes": LAYERS | {"recompute_granularity": "full"},
        "dtype": "float32",
        "seed": 1,
        "documents": 1,
    }
    short, long = (
        run_fresh(memory.peak_of_backward, 1, environment=RETURN_MEMORY, tokens=tokens, **common)
        for tokens in (512, 2048)
    )
    logits = 1024 * VOCABULARY * 4  # of 1,536: the shorter sample's peak is elsewhere
    assert long["above_bytes"] - short["above_bytes"] > logits
    assert short["loss"] != long["loss"]


class Fixed:
    """A contender with given losses."""

    def __init__(self, *losses: float):
        self.losses = list(losses)

    def step(self, sample):
        return self.losses.pop(0)


@pytest.mark.parametrize(
    "losses, wrong",
    [
        ((9.0, 8.5), None),
        ((9.008, 8.53), None),
        ((9.01, 8.5), "step 1"),
        ((9.0, 8.55), "step 2"),
        ((float("nan"), 8.5), "step 1"),
    ],
)
def test_losses_that_differ_are_refused(losses, wrong):
    contenders = {"one": Fixed(9.0, 8.5), "other": Fixed(*losses)}
    if wrong is None:
        assert check_losses(contenders, None)["other"] == list(losses)
    else:
        with pytest.raises(ValueError, match=wrong):
            check_losses(contenders, None)


def test_samples_keep_documents_apart():
    sample = make_sample([3, 2], 100, 1)
    assert sample.positions.tolist() == [0, 1, 2, 0, 1]
    assert sample.cu_seqlens.tolist() == [0, 3, 5]
    assert sample.labels.tolist() == [
        *sample.tokens[1:3].tolist(),
        IGNORE,
        int(sample.tokens[4]),
        IGNORE,
    ]
    assert sample.num_targets == 3


def test_products_and_attention_are_counted_as_called():
    x = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)

    def run():
        F.linear(x, weight).square().sum().backward()

    calls = record(run)
    # Forward, and a gradient each of x and of the weight.
    assert product_flops(calls) == 3 * 2 * 6 * 4 * 5
    with torch.no_grad():
        assert product_flops(record(lambda: linear(x, weight))) == 2 * 6 * 4 * 5
        assert product_flops(record(lambda: linear(x, weight, torch.ones(5)))) == 2 * 6 * 4 * 5
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    calls = record(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward())
    kinds = [kind_of(func) for (func, *_), count in calls.items() for _ in range(count)]
    assert kinds == ["attention", "attention"]
    assert all(
        torch.isfinite(x).all()
        for func, args, kwargs, _ in Replay(calls).calls
        for x in func(*args, **kwargs)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    )


def test_attention_is_timed_forward_and_backward(monkeypatch):
    """A clock that moves by 1 with each look: a call takes 1, so forward and backward of two calls
    take 4."""
    ticks = iter(range(100))
    monkeypatch.setattr("tools.bench.products.time.perf_counter", lambda: next(ticks))
    attend, _ = choose_attention("sdpa", torch.device("cpu"), torch.float32)
    timer = TimedAttend(attend, torch.device("cpu"))
    q = torch.randn(8, 2, 4, requires_grad=True)
    k = torch.randn(8, 2, 4, requires_grad=True)
    (segments,) = pack_documents(torch.tensor([0, 8], dtype=torch.int32), [(0, 8)], q.device)
    with timer.counting() as found:
        out = timer(timer(q, k, k, segments), k, k, segments)
        out.sum().backward()
    assert found == [4.0]
    expected = torch.autograd.grad(attend(attend(q, k, k, segments), k, k, segments).sum(), (q, k))
    assert torch.equal(q.grad, expected[0]) and torch.allclose(k.grad, expected[1])


def row(peaks: dict[str, int], seconds: dict[str, float], lengths=(8192,)) -> step_report.Row:
    own = {name: {"products": 0.5, "attention": 0.25} for name in seconds if name.startswith(OURS)}
    return step_report.Row(step_report.Shape(lengths), seconds, own, peaks, 100.0, 9.0)


def test_only_modes_that_take_no_more_memory_count_against_checkpointing():
    seconds = {OURS: 0.9, "ours, lean": 1.0, THEIRS: 1.2, CHECKPOINTED: 1.5}
    lines = step_report.bars_of(
        row({OURS: 400, "ours, lean": 300, THEIRS: 500, CHECKPOINTED: 300}, seconds)
    )
    assert lines[0].endswith("step / (products + attention): 1.200, bar 1.25: reached")
    assert "transformers' tokens/s: 1.333, bar at least 1.0: reached" in lines[1]
    assert "(ours, lean): 1.500, bar at least 1.3: reached" in lines[2]
    lines = step_report.bars_of(
        row({OURS: 400, "ours, lean": 301, THEIRS: 500, CHECKPOINTED: 300}, seconds)
    )
    assert lines[2].endswith("NOT reached")
    assert len(step_report.bars_of(row({}, seconds, lengths=(2048,)))) == 2
    assert step_report.bars_of(row({}, seconds | {OURS: 1.0}, lengths=(2048,)))[1].endswith(
        "bar at least 1.3: NOT reached"
    )


def test_documents_are_judged_by_the_sum_of_squares():
    share = step_report.Share(
        step_report.Shape((512,) * 16),
        step_report.Shape((8192,)),
        packed_seconds=0.07,
        whole_seconds=1.0,
    )
    assert share.predicted == 1 / 16
    assert share.measured / share.predicted == pytest.approx(1.12)


def test_each_rung_keeps_those_below():
    steps = memory.ladder(preset("tiny"), 65536)
    assert list(steps) == [rung.name for rung in memory.LADDER]
    assert steps["baseline"] == {"loss_chunk_tokens": memory.NOT_CHUNKED}
    assert steps["+ full recompute"] == {
        "loss_chunk_tokens": 2048,
        "mlp_tiles": 128,
        "recompute_granularity": "full",
    }
    assert steps["+ attention kept"] == {
        "loss_chunk_tokens": 2048,
        "mlp_tiles": 128,
        "attention_head_chunks": 4,
        "recompute_granularity": "attention_kept",
    }


def test_head_chunks_are_as_many_as_a_rank_s_heads_allow():
    qwen = preset("qwen3-8b")
    tiny = preset("tiny")
    found = [
        contenders.lean(config, 64, cp_size=ranks)["attention_head_chunks"]
        for config, ranks in ((qwen, 1), (qwen, 8), (qwen, 16), (tiny, 8), (tiny, 3))
    ]
    assert found == [4, 4, 2, 1, 1]


def test_the_best_rung_is_judged_and_what_did_not_run_is_said():
    def cell(peak: int, loss: float = 9.0) -> dict[int, memory.Cell]:
        return {65536: memory.Cell(peak, 1.0, 1, loss)}

    cells = {
        "baseline": cell(900),
        "+ chunked loss": cell(200),
        CHECKPOINTED: cell(1000),
        ALST: {65536: memory.Cell(note="killed")},
        "+ offload": {65536: memory.Cell(note=memory.NOT_ON_CPU)},
    }
    lines = memory.bars_at(cells, 65536)
    assert lines == [
        f"- 65,536 tokens, peak of + chunked loss / of {CHECKPOINTED}: 0.200, bar 0.25: reached",
        f"- 65,536 tokens, + chunked loss / {ALST}: not run (killed)",
    ]
    assert memory.disagreements(cells) == []
    assert memory.disagreements(cells | {THEIRS: cell(1, loss=9.02)}) == [
        f"65536 tokens: loss 9.020000 of {THEIRS}, 9.000000 of baseline"
    ]


def test_a_compiled_peer_attends_without_a_mask():
    """With a mask sdpa could not take its flash kernel, and the comparison would say nothing."""
    way = PeerOptions(compiled=True, batched=True)
    contender = Transformers(preset("tiny", num_layers=2), 512, "float32", way, "cpu", seed=1)
    masks = []

    def compiled(layer):
        def call(*arguments, **named):
            masks.append(named["attention_mask"])
            return layer._call_impl(*arguments, **named)

        return call

    for layer in contender.model.model.layers:
        assert layer._compiled_call_impl is not None
        layer._compiled_call_impl = compiled(layer)
    contender.forward_backward(make_sample([16, 16], 512, seed=1))
    assert masks == [None, None]


def test_tiles_of_a_peer_hold_as_many_tokens_as_the_model_is_wide(monkeypatch):
    counts = []
    parts = types.SimpleNamespace(
        TiledMLP=types.SimpleNamespace(
            apply=lambda run, mlp, x, tiles, weights: counts.append(tiles) or run(mlp, x)
        )
    )
    monkeypatch.setattr(peers, "_deepspeed", lambda: parts)
    contender = Transformers(
        preset("tiny", num_layers=1),
        512,
        "float32",
        PeerOptions(tiled=True, batched=True),
        "cpu",
        seed=1,
    )
    mlp = contender.model.model.layers[0].mlp
    for shape in ((1, 1024), (4, 1024)):
        mlp(torch.zeros(*shape, preset("tiny").hidden_size))
    assert counts == [4, 16]
