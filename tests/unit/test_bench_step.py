"""The step and memory benchmarks at toy size: what they compare, count and judge."""

import types
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

from data.batch import IGNORE
from model.attention_backends.choice import choose_attention
from model.attention_backends.documents import pack_documents
from model.products import linear
from tools.bench import contenders, memory, peers, step, step_report
from tools.bench.contenders import (
    ALST,
    CHECKPOINTED,
    OURS,
    THEIRS,
    VOCABULARY,
    make_sample,
    preset,
)
from tools.bench.fresh import KEEP_MEMORY, RETURN_MEMORY, run_fresh
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
    found = time_steps_of(names)
    assert set(found["seconds"]) == set(names)
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    assert set(found["own"]) == {OURS}
    assert all(len(times) == 2 and min(times) > 0 for times in found["own"][OURS].values())
    assert len(found["plain_gflops"]) == 2
    assert 8 < found["loss"] < 10  # ln(8192) = 9.01


def test_contenders_that_differ_are_not_timed():
    with pytest.raises(RuntimeError, match="loss of step 1: .* with ours, .* with ours, wider"):
        time_steps_of({OURS: LAYERS, "ours, wider": LAYERS | {"init_method_std": 0.2}})


def test_a_contender_that_fails_is_named(capfd):
    with pytest.raises(RuntimeError, match="^ours, broken: its process ended with code 1$"):
        time_steps_of({OURS: LAYERS, "ours, broken": {"no_such_setting": 1}})
    assert "no_such_setting" in capfd.readouterr().err


def test_a_failure_ends_the_benchmark_with_code_1_and_one_line(monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("transformers: its process ended with code 1")

    monkeypatch.setattr(step, "time_steps", fail)
    assert step.run(step.Arguments(lengths=(256,), packed=0)) == 1
    said = capsys.readouterr().err
    assert said == "256 ...\nerror: transformers: its process ended with code 1\n"


def time_steps_of(settings: dict[str, dict]) -> dict:
    """Time two rounds of a tiny sample on one core."""
    return step.time_steps(settings, lengths=[40, 24], dtype="float32", repeats=2, seed=1, cores=1)


def test_each_contender_has_a_process_and_they_step_one_at_a_time(monkeypatch):
    """Workers that only note who is asked: the order of the rounds, and no heap in common."""
    started = []
    asked = []

    @contextmanager
    def start(function, *, title, **options):
        started.append((function.__name__, title))

        def ask(call, *arguments):
            asked.append((title, call, *arguments))
            answers = {"losses": [9.0, 8.5], "replay": {"products": 2.0, "attention": 3.0}}
            return answers.get(call, 1.0)

        yield types.SimpleNamespace(ask=ask)
        started.append("end")

    monkeypatch.setattr(step, "start_fresh", start)
    found = time_steps_of({OURS: {}, THEIRS: {}})
    alone = "what is timed alone"
    assert started == [
        ("serve_contender", OURS),
        ("serve_contender", THEIRS),
        ("serve_alone", alone),
        *["end"] * 3,
    ]
    before = [(OURS, "losses"), (THEIRS, "losses"), (alone, "plain_gflops")]
    turns = [
        (OURS, "seconds"),
        (THEIRS, "seconds"),
        (alone, "replay", OURS),
        (alone, "plain_gflops"),
    ]
    assert asked == [*before, *turns, *turns[::-1]]
    assert found == {
        "seconds": {OURS: [1.0, 1.0], THEIRS: [1.0, 1.0]},
        "own": {OURS: {"products": [2.0, 2.0], "attention": [3.0, 3.0]}},
        "plain_gflops": [1.0, 1.0],
        "loss": 9.0,
    }


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
    found = {"one": [9.0, 8.5], "other": list(losses)}
    if wrong is None:
        check_losses(found)
    else:
        with pytest.raises(RuntimeError, match=wrong):
            check_losses(found)


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
    assert step_report.bars_of(row({}, seconds | {OURS: 1.3}, lengths=(2048,)))[1].endswith(
        "bar at least 1.0: NOT reached"
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


@pytest.mark.parametrize(
    "given, expected",
    [({}, None), ({"freed_memory": "glibc"}, None), ({"freed_memory": "kept"}, KEEP_MEMORY)],
)
def test_what_is_timed_keeps_freed_memory_where_it_is_asked_to(given, expected, monkeypatch):
    environments = []

    def times(*_, environment, **__):
        environments.append(environment)
        raise RuntimeError("seen")

    monkeypatch.setattr(step, "time_steps", times)
    arguments = step.Arguments(lengths=(8,), packed=0, dtype="float32", **given)
    assert step.run(arguments) == 1
    assert environments == [expected]
