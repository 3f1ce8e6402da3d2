"""Phases that do not fit are refused with the settings that would, and running out of memory says
what to try."""

import dataclasses

import pytest

from data.units import GIB
from pretrain.config.effects import effect_warnings
from pretrain.config.load import load_config
from pretrain.plan import make_plan
from pretrain.planner.check_phases import check_phases
from pretrain.planner.hardware import CPU, TABLE
from pretrain.planner.leaner_settings import LEANER_LEVELS, nearest_settings
from pretrain.planner.loss_chunks import choose_loss_chunks
from pretrain.planner.machine import Device, Machine
from pretrain.planner.memory_check import check_memory, describe_out_of_memory
from pretrain.planner.phase_memory import PhaseMemory
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.workload import Workload
from pretrain.schedule.phase_table import describe
from pretrain.schedule.resolve import resolve_phases
from tests.unit.test_auto_layout import VOCABULARY, config

H200 = Device(TABLE["H200"], TABLE["H200"].memory_bytes)


def machine(device: Device = H200, host_gib: int = 2048, processes: int = 8) -> Machine:
    return Machine(device, processes, host_gib * GIB, "the machine's memory")


def given(preset: str, *phases: dict, **layout):
    made = config(preset, *phases, **layout)
    made.layout.layout = "given"
    return made


def check(made, world_size: int = 8, clock: int = 0, on: Machine | None = None):
    return check_memory(resolve_phases(made), made, world_size, VOCABULARY, clock, on or machine())


def settings_of(text: str) -> dict[str, str]:
    """ "name value, name value (12.3 GiB)" -> name: value."""
    return dict(part.split(" ", 1) for part in text.rpartition(" (")[0].split(", "))


def test_a_phase_beyond_the_memory_is_refused_with_settings_that_fit():
    made = given("llama3-8b", {"seq_length": 1 << 17, "recompute_granularity": "none"}, {})
    report = check(made)
    (problem,) = report.problems
    assert (
        problem.startswith("phase 'phase0': seq_length = 131072: needs ")
        and "(parameters " in problem
    )
    assert (
        "activations " in problem and "and a process has 131.3 GiB of H200 memory. Fix: " in problem
    )
    assert [line.split(":")[0] for line in report.lines] == ["phase phase0", "phase phase1"]
    fixes = (
        problem.split("Fix: ")[1]
        .removesuffix(". To try it all the same: --device-memory-gib.")
        .split("; or ")
    )
    assert len(fixes) > 3
    model = MemoryModel.of_run(made, VOCABULARY, H200.hardware)
    tried = 0
    for fix in fixes:
        assert not any(
            set(other.rpartition(" (")[0].split(", ")) < set(fix.rpartition(" (")[0].split(", "))
            for other in fixes
        ), "more than is needed"
        if "processes" in fix or " in two levels" in fix:
            continue
        changed = given(
            "llama3-8b",
            {"seq_length": 1 << 17, "recompute_granularity": "none"}
            | {
                name: int(value) if value.isdigit() else value
                for name, value in settings_of(fix).items()
            },
        )
        assert check_phases(resolve_phases(changed), changed, 8, VOCABULARY) == []
        memory = PhaseMemory(resolve_phases(changed)[0], changed, 8, model, machine()).memory
        assert memory.total <= H200.usable and fix.endswith(f"({memory.total / GIB:.1f} GiB)")
        tried += 1
    assert tried > 2


@pytest.mark.parametrize("present", [None, "selective", "full", "attention_kept"])
def test_a_leaner_level_alone_is_offered_where_it_is_enough(present):
    made = given(
        "llama3-8b",
        {"seq_length": 1 << 16} | ({"recompute_granularity": present} if present else {}),
    )
    (phase,) = resolve_phases(made)
    on = machine()
    model = MemoryModel.of_run(made, VOCABULARY, H200.hardware)
    needs = PhaseMemory(phase, made, 8, model, on)
    totals = {
        level: PhaseMemory(
            phase.with_memory(recompute_granularity=level), made, 8, needs.model, on
        ).memory.total
        for level in LEANER_LEVELS
    }
    assert list(totals.values()) == sorted(totals.values(), reverse=True)
    for level in LEANER_LEVELS[LEANER_LEVELS.index(present) + 1 :]:
        offers = nearest_settings(needs, totals[level], count=20)
        assert any(text.startswith(f"recompute_granularity {level} (") for text in offers), (
            level,
            offers,
        )


def test_the_hosts_memory_is_that_of_a_nodes_ranks():
    made = given(
        "llama3-8b",
        {"recompute_granularity": "full", "cpu_offloading_num_layers": 8},
        pipeline_model_parallel_size=4,
    )
    (phase,) = resolve_phases(made)
    model = MemoryModel.of_run(made, VOCABULARY, H200.hardware)
    load = Workload.of_phase(phase, 16)
    hosts = [model.estimate_rank(load, pp_rank).host for pp_rank in range(4)]
    assert hosts == sorted(hosts, reverse=True) and hosts[0] > hosts[-1] > 0
    assert model.estimate_host_of_node(load, 16) == 4 * sum(hosts)
    assert model.estimate_host_of_node(load, 8) == 4 * (hosts[0] + hosts[1])
    assert model.estimate_host_of_node(load, 2) == 2 * hosts[0]


def test_all_that_is_to_come_is_checked_and_nothing_that_is_over():
    made = given(
        "llama3-8b",
        {"seq_length": 1 << 17, "recompute_granularity": "none"},
        {},
        {"seq_length": 1 << 18},
    )
    assert [text.split("'")[1] for text in check(made).problems] == ["phase0", "phase2"]
    first = resolve_phases(made)[0]
    assert [text.split("'")[1] for text in check(made, clock=first.end).problems] == ["phase2"]


def test_a_cpu_is_checked_only_against_memory_that_is_given():
    made = given("llama3-8b", {"seq_length": 1 << 17})
    on_cpu = machine(Device(CPU, 8 * GIB))
    report = check(made, on=on_cpu)
    assert (report.problems, report.lines) == ([], [])
    made.layout.device_memory_gib = 8.0
    assert "and a process has 8.0 GiB of cpu memory. Fix: " in check(made, on=on_cpu).problems[0]


def test_nearly_all_of_the_memory_is_warned_of():
    made = given("llama3-8b", {"recompute_granularity": "full"})
    needs = PhaseMemory(
        resolve_phases(made)[0],
        made,
        8,
        MemoryModel.of_run(made, VOCABULARY, H200.hardware),
        machine(),
    ).memory
    tight = machine(Device(TABLE["H200"], int(needs.total / 0.95)))
    report = check(made, on=tight)
    assert report.problems == [] and "which is more than " in report.warnings[0]
    assert check(made).warnings == []


def test_more_offloaded_layers_than_the_host_holds_are_refused():
    made = given(
        "llama3-8b",
        {"recompute_granularity": "full", "cpu_offloading_num_layers": 32, "seq_length": 1 << 16},
    )
    layer = (1 << 16) * 4096 * 2  # a power of two
    assert check(made, on=machine(host_gib=128)).problems == []
    (problem,) = check(made, on=machine(host_gib=64)).problems
    assert problem == (
        f"phase 'phase0': cpu_offloading_num_layers = 32: takes {32 * 8 * layer / GIB:.1f} GiB "
        "of a node's memory with 8 processes on it, beyond the machine's memory. Fix: at most "
        "16 layers, or more --cpu-offloading-host-memory where the node has it."
    )
    made.optimizer.optimizer_cpu_offload = True
    made.memory.cpu_offloading_num_layers = 0
    made.schedule.phases[0].cpu_offloading_num_layers = 0
    (problem,) = check(made, on=machine(host_gib=64)).problems
    assert (
        "optimizer_cpu_offload = True: takes " in problem
        and "no --optimizer-cpu-offload" in problem
    )


def test_the_bound_on_the_hosts_memory_is_read():
    made = load_config("--cpu-offloading-host-memory 12.5 --device-memory-gib 80".split())
    here = Machine.here(made)
    assert (
        here.host_bytes == int(12.5 * GIB)
        and here.host_limit == "cpu_offloading_host_memory = 12.5"
    )
    assert Machine.here(load_config([])).host_limit.startswith("the machine's ")
    assert any(
        "cpu_offloading_host_memory = 12.5: has no effect" in text for text in effect_warnings(made)
    )
    made.memory.cpu_offloading_host_memory = 0.0
    assert any(
        "cpu_offloading_host_memory = 0.0: must be above 0" in text for text in made.validate()
    )


@pytest.mark.parametrize(
    "asked",
    [dict(), dict(recompute_granularity="full"), dict(recompute_granularity="full", mlp_tiles=8)],
)
def test_running_out_all_the_same_names_three_settings_that_need_less(asked):
    made = given("llama3-8b", {"seq_length": 1 << 15} | asked)
    (phase,) = resolve_phases(made)
    text = describe_out_of_memory(
        phase,
        3,
        {"allocated": 120 * GIB, "at most": 131 * GIB, "reserved": 135 * GIB},
        made,
        8,
        VOCABULARY,
        machine(),
    )
    assert text.startswith("out of memory in phase 'phase0' on rank 3 (process ")
    assert "allocated 120.0 GiB, at most 131.0 GiB, reserved 135.0 GiB; estimated were " in text
    assert "(parameters " in text and " of 131.3 GiB. To try: " in text
    tries = text.split("To try: ")[1].rstrip(".").split("; or ")
    total = PhaseMemory(
        phase, made, 8, MemoryModel.of_run(made, VOCABULARY, H200.hardware), machine()
    ).memory.total
    assert len(tries) == 3
    assert all(float(each.rpartition("(")[2].split()[0]) * GIB < 0.86 * total for each in tries)


def test_the_trainers_start_refuses(tmp_path):
    argv = (
        "--model tiny --mock-data --vocab-size 100 --global-batch-size 1 --train-iters 1 "
        "--seq-length 65536 --device-memory-gib 3"
    ).split()
    with pytest.raises(
        ValueError, match="phase 'main': seq_length = 65536: needs .* Fix: .*recompute_granularity"
    ):
        make_plan(load_config(argv), 1)
    plan = make_plan(load_config([*argv, "--seq-length", "256"]), 1)
    assert plan.memory.lines[0].startswith("phase main: estimated memory of a process ")


def test_the_plan_names_the_memory_settings():
    made = given(
        "llama3-8b",
        {
            "recompute_granularity": "attention_kept",
            "cpu_offloading_num_layers": 2,
            "mlp_tiles": 8,
            "attention_head_chunks": 4,
            "loss_chunk_tokens": 1024,
        },
        {},
    )
    first, second = describe(resolve_phases(made), 8).splitlines()[1:]
    assert first.endswith(
        "optim_grads, recompute attention_kept, 2 layers offloaded, 8 MLP tiles, 4 head chunks, "
        "loss by 1,024 tokens"
    ) and second.endswith("optim_grads")


def chunks_on(device: Device, made, vocabulary: int = VOCABULARY) -> list[int | None]:
    phases = choose_loss_chunks(resolve_phases(made), made, 8, vocabulary, machine(device))
    return [phase.memory.loss_chunk_tokens for phase in phases]


def test_a_gpu_takes_the_largest_chunk_of_the_loss_that_fits():
    """8,192 tokens x 128,256 logits x 2 bytes are 1.96 GiB, and 2 GiB are the limit; tp divides the
    vocabulary."""
    made = given("llama3-8b", {"seq_length": 16384}, {"loss_chunk_tokens": 100})
    assert chunks_on(H200, made) == [8192, 100]
    assert chunks_on(H200, made, 2 * VOCABULARY) == [4096, 100]
    halved = given("llama3-8b", {"seq_length": 16384}, tensor_model_parallel_size=2)
    assert chunks_on(H200, halved, 2 * VOCABULARY) == [8192]
    assert chunks_on(Device(CPU, H200.memory_bytes), made) == [None, 100]
    unfused = dataclasses.replace(
        machine(), is_fused=False
    )  # a chunk would hold three times as much
    phases = choose_loss_chunks(resolve_phases(made), made, 8, VOCABULARY, unfused)
    assert [phase.memory.loss_chunk_tokens for phase in phases] == [None, 100]


def test_the_chunk_of_the_loss_leaves_the_phase_within_the_memory():
    made = given("llama3-8b", {"seq_length": 16384})
    (phase,) = resolve_phases(made)
    model = MemoryModel.of_run(made, VOCABULARY, H200.hardware)

    def needs(tokens: int) -> int:
        return PhaseMemory(
            phase.with_memory(loss_chunk_tokens=tokens), made, 8, model, machine()
        ).memory.total

    # The weight's gradient, brought to bf16 at the end, takes as much as 4,096 tokens' logits.
    assert needs(2048) == needs(4096) < needs(8192)
    for room, expected in ((needs(8192), 8192), (needs(8192) - 1, 4096), (needs(4096) - 1, None)):
        assert chunks_on(device_with(room), made) == [expected]


def device_with(usable: int) -> Device:
    """An H200 of which this many bytes may be used."""
    device = Device(H200.hardware, usable)
    while device.usable < usable:
        device = Device(H200.hardware, device.memory_bytes + usable - device.usable)
    assert device.usable == usable
    return device


def test_settings_that_the_schedule_refuses_are_not_offered():
    made = given(
        "llama3-8b",
        {"seq_length": 1 << 17, "pipeline_schedule": "ZBV"},
        pipeline_model_parallel_size=8,
    )
    report = check(made)
    assert "recompute" not in report.problems[0].split("Fix: ")[1]


def test_the_copy_that_saves_write_is_counted_where_it_is():
    """On a GPU in the memory of its node, on a CPU in the process's own."""
    plain = given("llama3-8b", {}, pipeline_model_parallel_size=2)
    runs = {"plain": plain}
    for name, values in (
        ("saving", {}),
        ("waiting", {"async_save": False}),
        ("weights", {"no_save_optim": True}),
    ):
        saves = dataclasses.replace(plain.checkpoint, save="somewhere", **values)
        runs[name] = dataclasses.replace(plain, checkpoint=saves)
    saving = runs["saving"]
    waiting = runs["waiting"]
    (phase,) = resolve_phases(plain)
    load = Workload.of_phase(phase, 8)
    copies = {}
    for name, made in runs.items():
        model = MemoryModel.of_run(made, VOCABULARY, H200.hardware)
        copies[name] = model.estimate_copies_of_node(load, 8)
        assert model.estimate_worst(load).copy == 0
    # 8.03e9 parameters, each 4 bytes and two moments of 4 bytes; rows of padding beside.
    assert copies["plain"] == copies["waiting"] == 0
    assert copies["saving"] == pytest.approx(12 * 8.03e9, rel=0.01)
    assert copies["weights"] == pytest.approx(4 * 8.03e9, rel=0.01)

    here = dataclasses.replace(machine(), local_processes=8, host_bytes=89 * GIB)
    (line,) = check(saving, on=here).problems
    assert "async_save = True: the copies of the state that saves write take 8" in line, line
    assert line.endswith("Fix: --no-async-save, which waits for each save."), line
    assert check(waiting, on=here).problems == []
    enough = dataclasses.replace(here, host_bytes=90 * GIB)
    report = check(saving, on=enough)
    assert not report.problems and "; copies for saves 89." in report.lines[0], report.lines

    on_cpu = MemoryModel.of_run(saving, VOCABULARY, CPU)
    memory = on_cpu.estimate_worst(load)
    assert memory.copy == pytest.approx(memory.parameters + memory.optimizer, rel=1e-6)
    assert f", copy {memory.copy / GIB:.1f} GiB" in memory.describe()
    without = MemoryModel.of_run(waiting, VOCABULARY, CPU).estimate_worst(load)
    assert memory.total == without.total + memory.copy
