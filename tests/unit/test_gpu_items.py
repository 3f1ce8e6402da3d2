"""The items of a lease at toy size, and what they compute: a rank's bytes, the longest sample,
scaled layers."""

import pytest
import torch

from model.activation_memory.offload import Host
from model.attention_backends.backend import Backend
from model.attention_backends.kernel_calls import NEVER, split_documents
from pretrain.step import global_grad_norm as step_norm
from tools.bench.contenders import ALST, CHECKPOINTED, Ours, lean, preset
from tools.bench.fresh import ROOT, run_fresh
from tools.bench.gpu import attention as gpu_attention
from tools.bench.gpu import frontier as gpu_frontier
from tools.bench.gpu import parts as gpu_parts
from tools.bench.gpu.checks import COMPILED_FILES
from tools.bench.gpu.frontier import Try, longest_that_fits, most_on_host
from tools.bench.gpu.items import ITEMS, LADDER_NAMES, LEASE, PROBE
from tools.bench.gpu.lines import Report, read_lines
from tools.bench.gpu.long import (
    Cost,
    measure_layers,
    offloaded_bytes,
    one_b,
    predicted_bytes,
    scale_to,
    slice_of,
)
from tools.bench.gpu.parts import ATTENTION_BACKENDS, Card, Scale, missing_backend
from tools.bench.standin import one_rank_of

QUICK = (
    "product",
    "norm",
    "attention",
    "1b-8k",
    "3b-8k",
    "qwen3-8b-rank",
    "1b-512k",
    "documents",
    "frontier",
)
SLOW = tuple(name for name in ITEMS if name not in QUICK)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def of_a_rank() -> dict:
    """What one rank of several does, in two worlds of a process that makes worlds for nobody
    else."""
    return run_fresh(steps_of_ranks, 1)


def steps_of_ranks() -> dict:
    return {
        "step": step_of_a_rank(ranks=4, tokens=32),
        "blocks": blocks_of_a_rank(ranks=2, tokens=64),
    }


def test_a_rank_of_many_sends_what_real_ranks_would(of_a_rank):
    """FSDP2's gathers and Ulysses' exchanges go through the stand-ins, and their bytes are
    counted."""
    found = of_a_rank["step"]
    config = preset("tiny", num_layers=1)
    heads = config.num_attention_heads
    kv = config.num_kv_heads
    size = config.head_size
    forward = 32 * size * (2 * heads + 2 * kv) * 4 * 3 // 4  # fp32; three quarters go to others
    assert found["sent"]["all_to_all"] == 2 * forward
    assert found["sent"]["all_gather"] > 0 and found["sent"]["reduce_scatter"] > 0
    assert found["norm"] > 0 and found["loss"] > 0


def step_of_a_rank(ranks: int, tokens: int) -> dict:
    device = torch.device("cpu")
    with one_rank_of(ranks, device) as (layout, sent):
        ours = Ours(preset("tiny", num_layers=1), 512, "float32", layout, seed=1)
        sample = slice_of(ranks * tokens, ranks, 512, device)
        loss = ours.forward_backward(sample)
        norm = float(step_norm(ours.stages, layout))
    return {"sent": sent, "loss": loss, "norm": norm}


def test_a_rank_keeps_the_blocks_that_are_pinned_ahead(of_a_rank):
    found = of_a_rank["blocks"]
    config = preset("tiny", num_layers=2, attention_head_chunks=2)
    assert sorted(found["sent"]) == sorted(offloaded_bytes(config, 64, 2, 4))


def blocks_of_a_rank(ranks: int, tokens: int) -> dict:
    sizes = []
    send = Host.send

    def counted(self, tensors, *rest):
        sizes.extend(tensor.nbytes for tensor in tensors)
        return send(self, tensors, *rest)

    Host.send = counted
    config = preset(
        "tiny",
        num_layers=2,
        attention_head_chunks=2,
        recompute_granularity="attention_kept",
        cpu_offloading_num_layers=2,
    )
    with one_rank_of(ranks, torch.device("cpu")) as (layout, _):
        ours = Ours(config, 512, "float32", layout, seed=1)
        ours.forward_backward(slice_of(tokens, ranks, 512, layout.device))
    smallest = tokens // ranks * config.num_attention_heads * 4  # a log-sum-exp
    return {"sent": [size for size in sizes if size > smallest]}


@pytest.mark.parametrize(
    "plateau, kept, tried, longest",
    [
        (60, 5, [1, 2, 4, 8, 16, 32, 19], 19),
        (0, 3, [1, 2, 4, 8, 16, 32, 64], 32),
        (0, 30, [1, 2, 4, 3], 3),
        (0, 60, [1, 2], 1),
        (0, 200, [1], None),
        (0, 0, [1, 2, 4, 8, 16, 32, 64, 128], 128),
    ],
)
def test_the_longest_sample_is_found_past_the_plateau_of_the_gradients(
    plateau, kept, tried, longest
):
    """Peak GiB = max(plateau, 34 + kept a document), of which 139 fit."""
    counts = []

    def measure(count):
        counts.append(count)
        peak = max(plateau, 34 + kept * count)
        return Try(count, peak << 30, 1.0) if peak < 139 else None

    fits = longest_that_fits(measure, 139 << 30, 128)
    assert counts == tried
    assert [found.documents for found in fits][-1:] == ([longest] if longest else [])


def fitting_below(limit: int):
    """A measurement of samples of one GiB a document, of which fewer than `limit` documents fit."""
    return lambda count: Try(count, count << 30, 1.0) if count < limit else None


def test_a_sample_that_the_line_promised_and_that_does_not_fit_is_halved():
    fits = longest_that_fits(fitting_below(20), 40 << 30, 128)
    assert [found.documents for found in fits] == [1, 2, 4, 8, 16]
    fits = longest_that_fits(fitting_below(28), 40 << 30, 128)
    assert [found.documents for found in fits] == [1, 2, 4, 8, 16, 23]


def test_offload_is_bounded_by_the_host():
    assert (
        most_on_host(preset("llama3-8b", attention_head_chunks=4), 8192) == 16
    )  # 4 GiB a document


def run_items(names: list[str], folder: str) -> dict:
    """Run items at toy size in this process; item -> its lines as [case, figure, value, kind,
    note]."""
    import importlib
    from pathlib import Path

    found = {}
    for name in names:
        item = ITEMS[name]
        path = Path(folder) / f"{name}.jsonl"
        module, _, function = item.function.partition(":")
        report = Report(path, name, "toy", date="now")
        getattr(importlib.import_module(module), function)(
            Card(CPU), Scale(toy=True), report, **item.options
        )
        found[name] = [
            [line.case, line.figure, line.value, line.kind, line.note] for line in read_lines(path)
        ]
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The lines of the quick items, which share the seconds of the imports."""
    return run_fresh(run_items, 1, names=list(QUICK), folder=str(tmp_path_factory.mktemp("lines")))


def test_the_items_end_within_nine_minutes():
    assert sum(item.seconds for item in (PROBE, *LEASE)) <= 530
    assert all(item.seconds <= item.deadline for item in ITEMS.values())


def test_the_files_that_compile_are_there():
    folder = ROOT / "tests" / "gpu"
    missing = [name for name in COMPILED_FILES if not (folder / name).exists()]
    assert not missing


def figures(lines: list) -> dict:
    """(case, figure) -> value of what was found."""
    return {
        (case, figure): value
        for case, figure, value, kind, _ in lines
        if kind not in ("failed", "skipped")
    }


@pytest.mark.parametrize(
    "name, expected",
    [
        ("product", [("", "rate")]),
        (
            "norm",
            [
                ("ours, 32,768 tokens of 2,048", "bandwidth"),
                ("F.rms_norm, 32 heads of 128", "seconds"),
            ],
        ),
        (
            "attention",
            [
                ("sdpa", "forward rate"),
                ("sdpa", "backward rate"),
                ("sdpa", "model rate"),
                ("flash of sdpa", "backward seconds"),
            ],
        ),
        ("1b-8k", [("ours, sdpa, loss by 2,048", "share"), ("ours, sdpa, loss by 8,192", "peak")]),
        ("3b-8k", [("ours, auto, loss by 2,048", "tokens"), ("ours, auto, loss by 8,192", "peak")]),
        (
            "qwen3-8b-rank",
            [
                ("3 layers", "seconds"),
                ("5 layers", "attention model rate"),
                ("5 layers", "all_to_all sent"),
            ],
        ),
        ("1b-512k", [("2 layers", "peak"), ("4 layers", "rate")]),
        ("documents", [("1 document", "seconds"), ("", "ratio")]),
        ("frontier", [("512 tokens", "seconds")]),
    ],
)
def test_an_item_leaves_its_figures(quick, name, expected):
    found = figures(quick[name])
    for key in expected:
        # A toy step may find room in memory that the process has already: no peak above it.
        assert found[key] >= 0 if key[1] == "peak" else found[key] > 0, (key, found)


def test_both_long_items_are_scaled_to_all_layers_and_say_so(quick):
    for name, few, more in (("qwen3-8b-rank", 3, 5), ("1b-512k", 2, 4)):
        kinds = {(case, figure): kind for case, figure, _, kind, _ in quick[name]}
        found = figures(quick[name])
        assert (
            kinds["1 layers", "seconds"] == kinds["1 layers", "peak"] == "scaled"
        )  # toy models have 1
        first = found[f"{few} layers", "seconds"]
        of_layer = (found[f"{more} layers", "seconds"] - first) / 2
        assert found["1 layers", "seconds"] == pytest.approx(first - (few - 1) * of_layer)


def test_a_kernel_that_is_not_there_is_one_line(quick):
    skipped = {case: note for case, _, _, kind, note in quick["attention"] if kind == "skipped"}
    assert "needs a GPU" in skipped["varlen"]
    failed = {case: note for case, _, _, kind, note in quick["attention"] if kind == "failed"}
    assert set(failed) == {"cuDNN of sdpa"}, failed


def test_the_loss_is_the_same_whatever_the_chunk(quick):
    found = figures(quick["1b-8k"])
    losses = {value for (_, figure), value in found.items() if figure == "loss"}
    assert len(losses) == 1, losses


@pytest.mark.long
@pytest.mark.parametrize("name", SLOW)
def test_a_slow_item_leaves_figures(tmp_path, name):
    if name == "8b-alst":
        pytest.importorskip("deepspeed")
    found = run_fresh(run_items, 2, names=[name], folder=str(tmp_path))[name]
    failed = [line for line in found if line[3] == "failed"]
    assert figures(found) and not failed, found


def test_the_ladder_of_the_lease_is_that_of_memory():
    from tools.bench.memory import LADDER

    rungs = [rung.name for rung in LADDER if rung.name != "baseline"]
    assert list(LADDER_NAMES.values()) == [*rungs, CHECKPOINTED, ALST]


def test_layers_are_scaled_by_their_difference():
    found = scale_to({4: Cost(14.0, 300), 2: Cost(8.0, 200)}, 36)
    assert found == Cost(110.0, 1900)


def test_the_full_model_is_left_out_where_the_memory_model_says_so(tmp_path, monkeypatch):
    from tools.bench.gpu import long as gpu_long

    path = tmp_path / "lines.jsonl"
    monkeypatch.setattr(Card, "capacity", lambda self: 80 << 30)
    monkeypatch.setattr(gpu_long, "step_of_one_b", lambda *_: pytest.fail("it was run"))
    one_b(
        Card(CPU),
        Scale(toy=False),
        Report(path, "1b-512k-full", "full", date="now"),
        tokens=1 << 19,
        layers=None,
    )
    (line,) = read_lines(path)
    assert line.kind == "skipped" and line.case == "16 layers"
    assert line.note.endswith("and the card has 80.0 GiB"), line.note


def test_the_memory_model_knows_what_1b_at_512k_needs():
    config = preset("1b", **lean(preset("1b"), 1 << 19))
    needed = predicted_bytes(config, 128256, 1 << 19) / 2**30
    assert 80 < needed < 139, needed  # the allocator's peak is 94.7 GiB


def test_a_frontier_try_is_a_process_of_its_own(tmp_path, monkeypatch):
    calls = []

    def fresh(function, cores, *, on_gpu, **options):
        if function is gpu_frontier.capacity_of:
            return {"bytes": 1 << 29}
        calls.append((function, options["documents"]))
        return {
            "fits": options["documents"] < 4,
            "peak": options["documents"] << 28,
            "seconds": 1.0,
        }

    monkeypatch.setattr(gpu_frontier, "run_fresh", fresh)
    # A context of this process's own would take memory from those that try.
    monkeypatch.setattr(Card, "capacity", lambda self: pytest.fail("asked in this process"))
    path = tmp_path / "lines.jsonl"
    gpu_frontier.search(
        Card(CPU), Scale(toy=True), Report(path, "8b", "toy", date="now"), rung="+ full recompute"
    )
    assert {function for function, _ in calls} == {gpu_frontier.try_length}
    assert [count for _, count in calls][:3] == [1, 2, 4]
    longest = [line for line in read_lines(path) if line.figure == "longest sample"]
    assert [line.value for line in longest] == [2 * 64]


def test_one_layer_warms_up_before_the_runs_that_are_scaled(tmp_path):
    """The first run of a shape compiles its kernels; that time is no layer's."""
    ran = []

    class Found:
        def __init__(self, layers):
            self.cost = Cost(10.0 * layers + (0 if ran else 1000), layers)
            ran.append(layers)

        def report(self, report, case):
            self.cost.report(report, case)

    path = tmp_path / "lines.jsonl"
    measure_layers(Card(CPU), Report(path, "a", "toy", date="now"), [3, 5], 36, run=Found)
    assert ran == [1, 3, 5]
    seconds = {line.case: line.value for line in read_lines(path) if line.figure == "seconds"}
    assert seconds == {"3 layers": 30.0, "5 layers": 50.0, "36 layers": 360.0}


def test_the_crossover_s_times_are_lines_and_its_answer_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(Backend, "missing", lambda self, *_, **__: None)
    found = {1000: (3.0, 2.0), 2000: (1.5, 2.0), 4000: (1.0, 2.0)}
    monkeypatch.setattr(gpu_attention, "measure", lambda *_: found)
    path = tmp_path / "lines.jsonl"
    report = Report(path, "a", "toy", date="now")
    answer = gpu_attention.report_crossover(Card(CPU), Scale(toy=True), report, (8, 2, 64))
    assert answer == (2000, "measured")
    lines = read_lines(path)
    assert {line.case for line in lines} == {"crossover, 8 query and 2 key/value heads of 64"}
    assert [(line.figure, line.value) for line in lines] == [
        ("documents of 1,000", 3.0),
        ("documents of 2,000", 1.5),
        ("documents of 4,000", 1.0),
        ("to cuDNN from", "2,000 tokens"),
    ]
    assert lines[1].note == "cuDNN; varlen 2.000 ms"


def test_equal_documents_are_one_call_of_cudnn_beside_one_of_varlen(tmp_path, monkeypatch):
    monkeypatch.setattr(Backend, "missing", lambda self, *_, **__: None)
    asked = set()

    def stand_in(crossover):
        def attend(q, k, v, packed):
            calls = split_documents(packed, crossover)
            asked.add((crossover, len(calls), calls[0].documents, packed.max_q))
            return q * 1.0 + 0.0 * (k.sum() + v.sum())

        return attend

    monkeypatch.setattr(gpu_attention, "mixed_attention", stand_in)
    path = tmp_path / "lines.jsonl"
    report = Report(path, "a", "full", date="now")
    gpu_attention.report_equal_documents(Card(CPU), Scale(toy=False), report, (2, 1, 8))
    assert asked == {
        (crossover, 1, 16384 // length, length)
        for crossover in (1, NEVER)
        for length in (512, 1024, 2048, 4096)
    }
    lines = read_lines(path)
    assert [line.figure for line in lines] == [
        "documents of 512",
        "documents of 1,024",
        "documents of 2,048",
        "documents of 4,096",
    ]
    assert all(line.value > 0 and "varlen" in line.note for line in lines)


def test_without_the_backend_mixed_the_crossover_is_assumed_and_the_reason_said(quick):
    lines = [line for line in quick["documents"] if line[0].startswith("crossover, ")]
    assert [(kind, note) for _, _, _, kind, note in lines] == [
        ("skipped", "it needs a GPU, and tensors live on cpu")
    ]


def test_the_line_of_mixed_says_its_crossover(monkeypatch):
    config = preset("tiny")
    chosen = []

    def choose(name, device, dtype, *, on_tape, heads, crossover):
        chosen.append((on_tape, heads, crossover))
        return None, "attention: mixed (first choice)"

    monkeypatch.setattr(gpu_parts, "choose_attention", choose)
    _, line = gpu_parts.attention_of(config, Card(CPU), Scale(toy=True))
    assert line == "attention: mixed (first choice); crossover 8,192 tokens (assumed)"
    kept = preset("qwen3-8b", recompute_granularity="attention_kept", attention_head_chunks=4)
    _, line = gpu_parts.attention_of(
        kept, Card(CPU), Scale(toy=True), ranks=8, crossover=NEVER, how="measured"
    )
    assert line.endswith("; crossover no document (measured)")
    assert chosen == [
        (False, (config.num_attention_heads, config.num_kv_heads, config.head_size), 8192),
        (True, (1, 1, 128), NEVER),
    ]


def test_backends_that_a_tree_does_not_have_are_named():
    assert "sdpa" in ATTENTION_BACKENDS and "mixed" in ATTENTION_BACKENDS
    assert missing_backend("nothing", Card(CPU), Scale(toy=True)) == "there is no such backend"
    assert missing_backend("auto", Card(CPU), Scale(toy=True)) is None
