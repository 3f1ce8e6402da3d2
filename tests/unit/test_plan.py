"""ithaca plan: figures that are counted by hand, the names of its JSON, and what it refuses."""

import json

import numpy as np
import pytest

from parallel.config import LayoutConfig
from pretrain.planner.hardware import TABLE
from tools.plan import Arguments, main, plan_run
from tools.planning.axes import groups_of_layout
from tools.planning.hardware_file import read_hardware
from tools.planning.phases import pairs_of_lengths
from tools.planning.report import RunPlan
from tools.shared.door import split_words
from tools.shared.effective_time import FailureCosts

LAYERS = 2
HIDDEN = 64
RUN = f"""--num-layers {LAYERS} --hidden-size {HIDDEN} --ffn-hidden-size 128 --num-attention-heads 4
    --vocab-size 128 --seq-length 256 --global-batch-tokens 1024 --micro-batch-size 1
    --train-tokens 8192 --lr 1e-3 --lr-decay-style constant --eval-iters 0 --no-bf16""".split()
MOCK = [*RUN, "--mock-data"]
EIGHT_STEPS = 8


def planned(words: list[str], **arguments) -> RunPlan:
    return plan_run(Arguments(**{"hardware": "h100", "world_size": 2} | arguments), words)


def refused(argv: list[str], capsys) -> list[str]:
    assert main(argv) == 2
    return capsys.readouterr().err.splitlines()


# ---------------------------------------------------------------- figures


def test_flops_and_utilization_are_those_of_a_count_by_hand():
    plan = planned([*MOCK, "--untie-embeddings-and-output-weights"], document_tokens=64)
    (phase,) = plan.phases
    # Weights of products: q, k, v, o; gate, up, down; the logits. 6 FLOPs for each and token.
    weights = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * 128) + 128 * HIDDEN
    # In documents of 64 tokens a token sees 32.5 on average: 2 products of 2 FLOPs, 3 times.
    attention = 12 * LAYERS * HIDDEN * 1024 * 32.5
    flops = 6 * weights * 1024 + attention
    assert phase.batch.pairs_per_token == 32.5
    assert phase.speed.model_flops == pytest.approx(flops)
    assert phase.speed.model_flops_utilization == pytest.approx(
        flops / phase.speed.step_seconds / (2 * 989e12)
    )
    assert phase.speed.tokens_per_second == pytest.approx(1024 / phase.speed.step_seconds)


def test_days_and_price_follow_from_the_steps_and_the_failures():
    plan = planned(
        [*MOCK, "--save", "runs/x", "--save-interval", "2"],
        price_per_gpu_hour=3.0,
        mtbf_hours=1000.0,
        disk_gigabytes_per_second=0.5,
    )
    (phase,) = plan.phases
    seconds = EIGHT_STEPS * phase.speed.step_seconds
    assert (phase.cost.steps, phase.cost.tokens) == (EIGHT_STEPS, 8192)
    assert phase.cost.train_seconds == pytest.approx(seconds)
    # fp32 weights and both moments, read twice by the only node.
    size = 12 * plan.parameters
    saved = plan.checkpoints
    assert saved is not None
    assert (saved.size_bytes, saved.saves) == (size, 4)
    assert saved.write_seconds == pytest.approx(size / 0.5e9)
    restart = 30 + 4.5 + 60 + 2 * size / 0.5e9
    between = seconds / 4 + saved.stall_seconds
    share = 1 - (restart + between / 2) / 3.6e6 - saved.stall_seconds / between
    assert plan.failures.effective_share == pytest.approx(share)
    hours = seconds / share / 3600
    assert plan.total.device_hours == pytest.approx(2 * hours)
    assert plan.total.days == pytest.approx(hours / 24)
    assert plan.total.price == pytest.approx(3.0 * 2 * hours)
    assert plan.failures.failures == pytest.approx(hours / 1000)
    parts = phase.cost.train_seconds + phase.cost.save_seconds + phase.cost.failure_seconds
    assert parts == pytest.approx(hours * 3600)


def test_a_save_that_waits_for_the_disk_takes_its_time_from_the_steps():
    words = [*MOCK, "--save", "runs/x"]
    background = planned(words).checkpoints
    waiting = planned([*words, "--no-async-save"]).checkpoints
    assert background is not None and waiting is not None
    assert waiting.stall_seconds == pytest.approx(
        background.stall_seconds + background.write_seconds
    )
    assert background.saves == 1 and background.interval_seconds is None


def test_a_node_that_fails_counts_for_the_whole_run():
    hours = planned(MOCK, world_size=4, gpus_per_node=2, node_mtbf_hours=500.0)
    assert (hours.nodes, hours.failures.hours_to_failure) == (2, 250)
    assert planned(MOCK, world_size=4).failures.hours_to_failure == pytest.approx(7.9 * 256)


def test_an_interval_that_divides_the_steps_saves_that_often():
    # Of 9 steps.
    words = [word.replace("8192", "9216") for word in [*MOCK, "--save", "runs/x"]]
    for interval, saves in ((1, 9), (3, 3), (4, 3), (9, 1), (100, 1)):
        saved = planned([*words, "--save-interval", str(interval)]).checkpoints
        assert saved is not None and saved.saves == saves


def test_a_plan_of_what_the_launcher_starts_has_its_nodes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    plan = planned(MOCK, hardware=None, world_size=None)
    assert (plan.world_size, plan.devices_per_node, plan.nodes) == (4, 2, 2)


def test_failures_that_leave_no_time_are_refused():
    with pytest.raises(ValueError, match="mtbf_hours = 0.01: a failure costs .* never ends. Fix"):
        planned(MOCK, mtbf_hours=0.01)


def test_failures_that_are_assumed_and_leave_no_time_are_left_out_with_a_line():
    # 1000T tokens without a save on the way, on a CPU.
    flags = [*MOCK, "--train-tokens", "1000T", "--save", "runs/x"]
    plan = planned(flags, hardware="cpu", world_size=1)
    (line,) = [text for text in plan.warnings if text.startswith("failures are left out")]
    assert "never end" in line and "Fix: save more often" in line
    assert (plan.failures.failures, plan.total.failure_seconds) == (0, 0)
    assert plan.total.days == pytest.approx(plan.total.train_seconds / 86400, rel=1e-3)


def test_the_effective_share_is_that_of_the_arithmetic_by_hand():
    costs = FailureCosts(
        hours_to_failure=10,
        notice_seconds=30,
        own_seconds=10,
        groups_seconds=20,
        read_bytes=100e9,
        read_bytes_per_second=2e9,
        save_seconds=600,
        stall_seconds=0.6,
    )
    # Away 110 s, trained again 300 s, in 36,000 s; 0.6 s in each 600 s.
    assert costs.effective_share == pytest.approx(1 - 410 / 36_000 - 0.001)


def test_documents_beyond_a_sample_are_cut_into_samples():
    pairs = 10 * 11 / 2 + 256 * 257 / 2 + 44 * 45 / 2
    assert pairs_of_lengths(np.array([10, 300], np.int32), 256, (None,)) == pytest.approx(
        pairs / 310
    )


def test_a_given_length_of_documents_keeps_the_windows():
    words = [*MOCK, "--window-size", "9", "0"]
    (phase,) = planned(words, document_tokens=100).phases
    # A token sees 10, the first nine of a document fewer.
    assert phase.batch.pairs_per_token == (55 + 90 * 10) / 100


def test_the_data_says_how_long_documents_are_and_how_many_epochs_are_drawn():
    (phase,) = planned(MOCK).phases
    (source,) = phase.sources
    assert 16 < phase.batch.pairs_per_token < 128.5
    assert (source.name, source.tokens, source.share) == ("mock data", 8192, 1.0)
    assert source.to_epoch == pytest.approx(8192 / source.epoch_tokens)


# ---------------------------------------------------------------- who talks to whom


def test_the_groups_of_a_layout_are_megatrons():
    layout = LayoutConfig(tensor_model_parallel_size=2, context_parallel_size=2)
    found = {each.name: each for each in groups_of_layout(layout, 8)}
    assert found["tp"].groups == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert found["cp"].groups == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert found["dp"].groups == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert found["dp_cp"].groups == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert found["cp"].plan(4).is_inside_node and not found["dp"].plan(4).is_inside_node
    assert found["dp"].plan(4).nodes_of_first_group == (0, 1)


def test_all_ranks_of_a_stage_exchange_what_muon_updates():
    words = [*MOCK, "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    (plain,) = planned(words, world_size=8).phases
    (phase,) = planned([*words, "--optimizer", "muon"], world_size=8).phases
    assert "dp_cp_tp" not in {axis.name for axis in plain.layout.axes}
    (axis,) = [axis for axis in phase.layout.axes if axis.name == "dp_cp_tp"]
    assert (axis.size, axis.num_groups, axis.first_group) == (4, 2, (0, 1, 2, 3))
    there, back = [each for each in phase.traffic if each.axis == "dp_cp_tp"]
    assert phase.speed.parts_seconds.update > plain.speed.parts_seconds.update
    # Of a single bucket nothing travels while another one is computed.
    assert (there.collectives, there.is_overlapped, back.is_overlapped) == (1, False, False)


@pytest.mark.parametrize("hardware, is_overlapped", [("h100", True), ("cpu", False)])
def test_only_gpus_send_beside_computing(hardware, is_overlapped):
    (phase,) = planned(MOCK, hardware=hardware).phases
    found = [each for each in phase.traffic if each.axis == "dp_cp"]
    assert [each.is_overlapped for each in found] == [is_overlapped] * 2
    # What the traffic's lines say is what the step's time has.
    alone = sum(each.seconds for each in found)
    exposed = phase.speed.parts_seconds.sharding_exposed
    assert exposed < alone if is_overlapped else exposed == pytest.approx(alone)


def test_a_group_that_leaves_its_node_is_warned_of():
    words = [*MOCK, "--tensor-model-parallel-size", "2"]
    crossing = planned(words, world_size=4, gpus_per_node=1)
    assert any(
        text.startswith("phase 'main': tp 2 is not inside a node of 1 devices")
        for text in crossing.warnings
    )
    inside = planned(words, world_size=4, gpus_per_node=2)
    assert not any("not inside" in text for text in inside.warnings)
    (of_crossing,) = [each for each in crossing.phases[0].traffic if each.axis == "tp"]
    assert of_crossing.between_nodes_bytes == of_crossing.sent_bytes > 0


# ---------------------------------------------------------------- search


def test_the_search_ranks_what_fits_and_says_why_the_others_lose():
    (phase,) = planned([*MOCK, "--device-memory-gib", "1"], world_size=4, search=True).phases
    search = phase.search
    assert search is not None and 1 < search.fitting <= search.legal
    best, *others = search.rows
    assert best.fits and best.why == ""
    fitting = [row for row in others if row.fits and not row.is_own]
    assert [row.step_seconds for row in fitting] == sorted(row.step_seconds for row in fitting)
    for row in fitting:
        assert " % slower: " in row.why and "s more for " in row.why
    assert sum(row.is_own for row in search.rows) == 1


def test_the_search_names_what_would_be_faster_and_does_not_fit():
    words = [*MOCK, "--recompute-granularity", "full", "--device-memory-gib", "0.003"]
    (phase,) = planned(words, world_size=4, search=True).phases
    assert phase.search is not None
    (row,) = [row for row in phase.search.rows if not row.fits and not row.is_own]
    assert row.why.startswith("needs ") and row.why.endswith(" of 2.8 MiB")


# ---------------------------------------------------------------- what is printed and written


def test_the_json_has_these_names(tmp_path, capsys):
    out = tmp_path / "plan.json"
    argv = [*MOCK, "--hardware", "h100", "--world-size", "2", "--json", str(out)]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert text.startswith("plan of a run without a file: 2 layers, ") and "assumed:" in text
    plan = json.loads(out.read_text())
    assert set(plan) == {
        *("format", "config", "model", "parameters", "world_size", "devices_per_node", "nodes"),
        *("hardware", "price_per_device_hour", "phases", "total", "checkpoints", "failures"),
        *("assumptions", "notes", "warnings"),
    }
    (phase,) = plan["phases"]
    assert set(phase) == {
        *(
            "name",
            "layout",
            "memory",
            "batch",
            "balance",
            "speed",
            "traffic",
            "cost",
            "sources",
            "search",
        )
    }
    assert phase["memory"]["parts_bytes"]["parameters"] > 0
    total = sum(
        value
        for name, value in phase["speed"]["parts_seconds"].items()
        if name != "sharding_hidden"
    )
    assert phase["speed"]["step_seconds"] == pytest.approx(total)


def test_the_flags_of_the_run_and_of_the_plan_are_told_apart():
    own, run = split_words(
        Arguments,
        ["--config", "a", "--world_size", "8", "--search", "--lr", "1", "--json=f", "--help"],
    )
    assert own == ["--world_size", "8", "--search", "--json=f", "--help"]
    assert run == ["--config", "a", "--lr", "1"]


# ---------------------------------------------------------------- other machines


def test_data_that_is_elsewhere_is_said_in_a_line_and_stops_no_plan_of_other_machines(capsys):
    words = [*RUN, "--data-path", "corpora/web", "--tokenizer-model", "llama.model"]
    plan = planned(words)
    (note,) = plan.notes
    assert note.startswith("data: not looked at, since llama.model, corpora/web.idx are not on")
    assert plan.phases[0].sources == () and plan.phases[0].batch.pairs_per_token == 128.5
    # A plan for this machine needs them, as the run does.
    (line,) = refused(words, capsys)
    assert "llama.model" in line and "Fix: " in line


def test_a_checkpoint_that_is_elsewhere_is_said_and_stops_no_plan_of_other_machines(capsys):
    words = [*MOCK, "--pretrained-checkpoint", "/nonexistent/llama"]
    assert planned(words).notes == (
        "start: /nonexistent/llama is not on this machine; planned from the first token",
    )
    (line,) = refused(words, capsys)
    assert line.startswith("error: pretrained_checkpoint = /nonexistent/llama: no checkpoint is")


def test_a_plan_for_many_processes_says_where_it_takes_this_machines_cpu_for_theirs():
    (note,) = planned(MOCK, hardware=None).notes
    assert note == "hardware: CPUs as of this machine; --hardware h100 plans for GPUs"
    assert planned(MOCK, hardware="cpu").notes == ()


def test_without_data_the_vocabulary_must_be_given(capsys):
    words = [*RUN, "--data-path", "corpora/web", "--tokenizer-model", "llama.model"]
    place = words.index("--vocab-size")
    del words[place : place + 2]
    (line,) = refused([*words, "--without-data"], capsys)
    assert line.startswith("error: vocab_size = None: must be given where tokenizer_model = llama")


def test_a_layout_that_cannot_run_is_refused_as_by_the_trainer(capsys):
    argv = [*MOCK, "--tensor-model-parallel-size", "2", "--world-size", "3"]
    line, *_ = refused(argv, capsys)
    assert line.startswith("error: phase 'main': world size = 3: must be a multiple of")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--hardware", "h900"], "hardware = h900: is not known. Fix: one of h200, h100, "),
        (["--hardware", "h100", "--hardware-file", "x"], "cannot be combined with hardware_file"),
        (["--world-size", "0"], "world_size = 0: must be above 0"),
        (["--world-size", "many"], "--world-size"),
        (["--price-per-gpu-hour", "-1"], "price_per_gpu_hour = -1.0: must be above 0"),
        (["--mtbf-hours", "1", "--node-mtbf-hours", "1"], "cannot be combined with mtbf_hours"),
        (["--across-nodes"], "across_nodes = True: is about what --search ranks"),
        (["--hardware-file", "/nonexistent"], "hardware_file = /nonexistent: cannot be read"),
        (["--wrold-size", "8"], "--wrold-size: no such flag"),
    ],
)
def test_what_cannot_be_is_one_line(argv, message, capsys):
    (line,) = refused([*MOCK, *argv], capsys)
    assert line.startswith("error: ") and message in line and " Fix: " in line


# ---------------------------------------------------------------- hardware of one's own


def test_a_row_of_ones_own_begins_with_one_of_the_table(tmp_path):
    file = tmp_path / "ours.yaml"
    file.write_text(
        "base: h100\nname: ours\nnetwork_bytes_per_second: 25e9\n"
        "efficiency: {products: 0.6, attention: {128: 0.5}}\n"
    )
    row = read_hardware(str(file))
    assert (row.name, row.network_bytes_per_second, row.flops) == ("ours", 25e9, 989e12)
    assert (row.efficiency.products, row.efficiency.attention) == (0.6, {128: 0.5})
    assert row.efficiency.links == TABLE["H100"].efficiency.links
    assert planned(MOCK, hardware=None, hardware_file=str(file)).hardware == row


def test_a_row_says_everything_that_is_wrong_with_it(tmp_path):
    file = tmp_path / "ours.yaml"
    file.write_text("name: ours\nflops: fast\nmemory_byte: 1\nefficiency: {product: 1}\n")
    with pytest.raises(ValueError) as error:
        read_hardware(str(file))
    text = str(error.value)
    assert "memory_byte: no such key. Fix: did you mean memory_bytes?" in text
    assert "product: no such key. Fix: did you mean products?" in text
    assert "flops = fast: must be a number above 0" in text
    assert "memory_bytes, memory_bytes_per_second, node_bytes_per_second" in text
