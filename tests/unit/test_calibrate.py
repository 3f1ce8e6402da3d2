"""plan --calibrate: what processes measured becomes a row, and a row is read back as it was."""

import dataclasses
import subprocess

import pytest
import torch
import torch.distributed as dist

from pretrain.planner.hardware import CPU, TABLE
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.step_time import UPDATE_BYTES, estimate_step
from tests.unit.test_plan import MOCK, planned, refused
from tools.bench import predictions
from tools.plan import Arguments, check_run, main, plan_run
from tools.planning import calibrate
from tools.planning.calibrate import (
    Processes,
    document_tokens_of,
    is_own_row,
    row_of,
    split_rest,
    with_step_factor,
)
from tools.planning.hardware_file import read_hardware
from tools.planning.machine_rates import SHORT, Rates, middle
from tools.planning.rank_work import Work
from tools.planning.reference_step import ReferenceJob, make_slice
from tools.planning.run_plan import estimate_phases
from tools.planning.sending_rates import Sending

WORK = Work(
    layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=16,
    vocabulary_rows=128,
    loss_tokens=64,
    tokens=64,
    document_tokens=32,
    dtype="float32",
    attention_backend="auto",
    gathered_elements=50_000,
    around_elements=16_384,
    exchanged_elements=12_288,
)
RATES = Rates(
    plain_flops=100e9,
    product_flops=80e9,
    attention_flops=25e9,
    attention_backend="attention: sdpa (first choice)",
    layer_seconds=0.1,
    short_layer_seconds=0.04,
    short_product_seconds=0.004,
    short_attention_seconds=0.001,
    loss_flops=60e9,
    copy_bytes_per_second=10e9,
    weights_bytes_per_second=4e9,
    update_parameters_per_second=0.1e9,
    step_seconds=1.0,
    ring_bytes_per_second=2e9,
    reduction_bytes_per_second=1e9,
    exchange_bytes_per_second=3e9,
    latency_seconds=2e-3,
)


def test_the_work_is_counted_as_by_hand():
    # q, k, v and o are 64 x 64, gate, up and down 64 x 128; 6 operations a token and weight.
    assert WORK.layer_product_flops == 6 * 64 * (4 * 64 * 64 + 3 * 64 * 128)
    # Two documents of 32 tokens; 4 heads of 16; three times 4 operations a pair and channel.
    assert WORK.layer_attention_flops == 3 * 4 * 64 * (2 * 32 * 33 // 2)


def test_a_row_holds_what_was_measured_and_the_rest_of_its_base():
    row = row_of(WORK, RATES, Processes(count=4, cores=2), CPU)
    shares = row.efficiency
    assert (row.flops, row.devices_per_node, row.crowding) == (100e9, 4, 2.0)
    assert (shares.products, shares.loss, shares.attention) == (0.8, 0.6, {16: 0.25})
    assert (row.memory_bytes_per_second, shares.weights) == (10e9, 0.4)
    assert shares.memory == pytest.approx(UPDATE_BYTES * 0.1e9 / 10e9)
    assert (row.node_bytes_per_second, shares.links) == (2e9, 1.0)
    assert (shares.reductions, shares.exchanges) == (0.5, 1.5)
    # Four ranks double twice.
    assert shares.collective_latency_seconds == 1e-3
    assert row.network_bytes_per_second == CPU.network_bytes_per_second


def test_a_gpus_shares_are_of_its_rate_for_the_dtype():
    """What fp32 reached is no share of an H100's 989 TFLOP/s in bf16, but of 67."""
    h100 = TABLE["H100"]
    for dtype, peak in (("float32", 67e12), ("bfloat16", 989e12)):
        work = dataclasses.replace(WORK, dtype=dtype)
        row = row_of(work, RATES, Processes(count=2, cores=2), h100)
        assert row.efficiency.products == pytest.approx(80e9 / peak), dtype
        assert row.efficiency.attention == pytest.approx({16: 25e9 / peak}), dtype
        assert (row.flops, row.fp32_flops) == (h100.flops, h100.fp32_flops)


def test_one_process_sends_nothing():
    alone = dataclasses.replace(
        RATES,
        ring_bytes_per_second=None,
        reduction_bytes_per_second=None,
        exchange_bytes_per_second=None,
        latency_seconds=None,
    )
    row = row_of(WORK, alone, Processes(count=1, cores=2), CPU)
    assert row.node_bytes_per_second == CPU.node_bytes_per_second
    assert row.efficiency.links == CPU.efficiency.links


def test_two_lengths_tell_the_hosts_calls_from_the_memory():
    kernels = WORK.layer_product_flops / 80e9 + WORK.layer_attention_flops / 25e9
    # The memory's part falls with the tokens, the host's does not.
    host = 0.03
    memory = 0.08
    rates = dataclasses.replace(
        RATES,
        layer_seconds=kernels + memory + host,
        short_layer_seconds=0.005 + memory / SHORT + host,
    )
    found = split_rest(WORK, rates, with_overhead=True)
    assert found == pytest.approx((memory, host))
    assert split_rest(WORK, rates, with_overhead=False) == pytest.approx((memory + host, 0.0))


def test_an_all_reduce_sends_everything_twice(monkeypatch):
    """Each collective takes a second beyond its latency; two ranks, 100 elements for each."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    sending = Sending(WORK, torch.device("cpu"))
    monkeypatch.setattr(sending, "_between_products", lambda call: 1.5 if call else 0.5)
    makers = dict.fromkeys(("_sum_of", "_exchange_of", "_gather_of", "_reduction_of"))
    for name in makers:
        monkeypatch.setattr(sending, name, lambda elements: elements > 512)
    found = sending.rates()
    tokens = WORK.exchanged_elements // 2
    assert found["exchange_bytes_per_second"] == 4 * tokens
    shards = [(WORK.gathered_elements // 2, WORK.layers), (WORK.around_elements // 2, 1)]
    gathered = 4 * sum(each * times for each, times in shards) / (WORK.layers + 1)
    assert found["reduction_bytes_per_second"] == gathered
    assert found["ring_bytes_per_second"] == (gathered + 2 * 4 * tokens) / 2


def test_a_reference_step_has_the_documents_and_pairs_of_its_prediction():
    words = [*MOCK, "--context-parallel-size", "2", "--num-layers", "4"]
    arguments = Arguments(world_size=2, hardware="cpu", document_tokens=100)
    checked = check_run(arguments, words)
    (estimate,) = estimate_phases(checked.plan, checked.cluster, 100)
    job = ReferenceJob.of(estimate, document_tokens_of(estimate))
    assert (job.config.model.num_layers, job.document_tokens) == (1, 100)
    slices = [make_slice(job, rank, torch.device("cpu")) for rank in range(2)]
    assert all(each.cu_seqlens.tolist() == [0, 100, 200, 256] for each in slices)
    positions = torch.cat([each.positions for each in slices])
    expected = torch.cat([torch.arange(100), torch.arange(100), torch.arange(56)])
    assert torch.equal(positions, expected)
    # What a token sees is what its position says.
    assert job.load.tokens_seen((None,)) == float((positions + 1).double().mean())


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_reference_step_is_compared_with_a_step_of_the_same_optimizer(optimizer):
    """Three times as long as its parts say: of Muon's step they have Newton-Schulz, too."""
    words = [*MOCK, "--num-layers", "4", "--optimizer", optimizer]
    checked = check_run(Arguments(world_size=1, hardware="cpu", document_tokens=100), words)
    (estimate,) = estimate_phases(checked.plan, checked.cluster, 100)
    job = ReferenceJob.of(estimate, document_tokens_of(estimate))
    parts = estimate_step(MemoryModel.of_run(job.config, job.vocab_size, CPU), job.load, CPU)
    rates = dataclasses.replace(RATES, step_seconds=3 * parts.total)
    row = with_step_factor(CPU, rates, estimate.model, job)
    assert row.efficiency.step_factor == pytest.approx(3)


def test_the_middle_of_processes_is_that_of_each_figure():
    others = [dataclasses.replace(RATES, plain_flops=x, loss_flops=-x) for x in (1.0, 9.0, 4.0)]
    found = middle(others)
    assert (found.plain_flops, found.loss_flops) == (4.0, -4.0)
    assert found.attention_backend == RATES.attention_backend


@pytest.fixture
def quick(monkeypatch):
    """Measure for a moment: whether it works, not what it finds."""
    original = calibrate.work_of

    def short(estimate):
        return dataclasses.replace(original(estimate), seconds=0.001, buffer_bytes=1 << 16)

    monkeypatch.setattr(calibrate, "work_of", short)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_machine_is_measured_and_its_row_predicts(tmp_path, quick, capsys, processes):
    file = tmp_path / "row.yaml"
    words = [*MOCK, "--context-parallel-size", str(processes)]
    assert main([*words, "--calibrate", str(file), "--world-size", str(processes)]) == 0
    assert is_own_row(file)
    row = read_hardware(str(file))
    assert row.is_cpu and row.devices_per_node == processes
    assert row.flops > 1e6 and row.efficiency.step_factor > 0
    sends = row.node_bytes_per_second != CPU.node_bytes_per_second
    assert sends == (processes > 1)
    plan = planned(words, hardware=None, hardware_file=str(file), world_size=processes)
    assert plan.hardware == row and plan.phases[0].speed.step_seconds > 0
    # A second time it takes its own file's place, and no other one's.
    capsys.readouterr()
    file.write_text("base: h100\n")
    (line,) = refused([*words, "--calibrate", str(file), "--world-size", "1"], capsys)
    assert str(file) in line and file.read_text() == "base: h100\n"


def test_a_process_that_fails_ends_the_others(tmp_path, quick, monkeypatch, capsys):
    original = subprocess.Popen
    started = []

    def start(command, **options):
        # The second one ends at once, while the first waits for it.
        is_second = options.get("env", {}).get("RANK") == "1"
        started.append(original(["false"] if is_second else command, **options))
        return started[-1]

    monkeypatch.setattr(calibrate.subprocess, "Popen", start)
    words = [*MOCK, "--calibrate", str(tmp_path / "row.yaml"), "--world-size", "2"]
    line = refused(words, capsys)[-1]
    assert "calibrate: the processes that measure ended with codes [None, 1]" in line
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--window-size", "7", "0"], "window_size = [7, 0]: attention with a window is not"),
        (
            ["--attn-logit-softcapping", "50"],
            "attn_logit_softcapping = 50.0: attention with capped scores is not measured yet",
        ),
        (
            ["--softmax-type", "learnable"],
            "softmax_type = learnable: attention with sinks is not measured yet",
        ),
        (["--verify"], "verify = True: cannot be combined with calibrate"),
        (["--hardware", "h100"], "hardware = h100: cannot be combined with calibrate"),
        (
            ["--world-size", "4096", "--global-batch-tokens", "1Mi"],
            "world_size = 4096: a row is measured on one machine, which",
        ),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, capsys, argv, message):
    *_, line = refused([*MOCK, "--calibrate", str(tmp_path / "row.yaml"), *argv], capsys)
    assert message in line and " Fix: " in line
    assert not (tmp_path / "row.yaml").exists()


# ---------------------------------------------------------------- predictions


def test_the_runs_are_drawn_alike_on_1_2_and_4_processes():
    drawn = list(predictions.draw(0, 20))
    assert drawn == list(predictions.draw(0, 20)) != list(predictions.draw(1, 20))
    assert [each.processes for each in drawn[:6]] == [1, 2, 4, 1, 2, 4]
    assert len(set(drawn)) == 20
    layouts = {(each.tp, each.pp, each.cp, each.dp) for each in drawn}
    assert {axis for layout in layouts for axis, size in enumerate(layout) if size > 1} == {
        0,
        1,
        2,
        3,
    }


def test_a_drawn_run_can_be_planned():
    for configuration in predictions.draw(0, 20):
        arguments = Arguments(world_size=configuration.processes, hardware="cpu")
        assert plan_run(arguments, configuration.flags).phases[0].speed.step_seconds > 0


def test_errors_are_shares_of_what_was_measured():
    (configuration, *_) = predictions.draw(0, 1)
    compared = predictions.Compared(configuration, 0.9, 1.0, 105, 100, {})
    assert compared.error == pytest.approx(-0.1) and compared.memory_error == pytest.approx(0.05)
    assert compared.cells()[-2:] == ["-10.0 %", "+5.0 %"]
