"""Which layout `layout: auto` chooses, and what it says where none fits."""

import dataclasses
import time

import pytest

from data.units import GIB
from model.presets import PRESETS
from pretrain.config.config import Config, GivenSettings
from pretrain.config.config_yaml import dump_yaml
from pretrain.config.effects import effect_warnings
from pretrain.config.flat import from_flat
from pretrain.config.load import load_config
from pretrain.config.phase_config import PhaseConfig
from pretrain.planner.auto_layout import settle_layouts
from pretrain.planner.check_phases import check_phases
from pretrain.planner.hardware import CPU, TABLE
from pretrain.planner.layout_candidates import choose_layout
from pretrain.planner.machine import Device
from pretrain.schedule.phase_table import describe
from pretrain.schedule.resolve import resolve_phases

H200 = Device(TABLE["H200"], TABLE["H200"].memory_bytes)
VOCABULARY = 128256


def config(preset: str, *phases: dict, **layout) -> Config:
    made = from_flat(
        {"bf16": "true"} | {name: str(value) for name, value in PRESETS[preset].items()}, "test"
    )
    made.given = GivenSettings()  # what is set below was not written by a user either
    made.layout.layout = "auto"
    for name, value in layout.items():
        setattr(made.layout, name, value)
    made.schedule.phases = [
        PhaseConfig(
            **(
                dict(
                    name=f"phase{number}",
                    seq_length=8192,
                    train_tokens=10**9,
                    global_batch_tokens=1 << 23,
                )
                | phase
            )
        )
        for number, phase in enumerate(phases)
    ]
    return made


def choose(made: Config, world_size: int, device: Device = H200):
    return [
        choose_layout(phase, made, world_size, VOCABULARY, device) for phase in resolve_phases(made)
    ]


def test_a_million_tokens_get_many_ranks_and_a_short_phase_none():
    short, long = choose(config("llama3-8b", {}, {"seq_length": 1 << 20}), 1024)
    assert short.best.phase.layout.sizes == (1, 1, 1)
    tp, pp, cp = long.best.phase.layout.sizes
    assert tp * cp >= 64 and pp == 1 and long.best.phase.layout.context_levels[1] > 1, (
        "more ranks than heads"
    )
    for choice in (short, long):
        assert choice.best.memory.total <= 0.9 * H200.memory_bytes
        assert choice.next_best.phase.layout.sizes != choice.best.phase.layout.sizes


def test_tp_and_the_all_to_all_stay_inside_a_node_unless_told_otherwise():
    long = {"seq_length": 1 << 20}
    for node_size in (4, 8):
        hardware = dataclasses.replace(TABLE["H200"], devices_per_node=node_size)
        (choice,) = choose(
            config("llama3-8b", long), 1024, Device(hardware, TABLE["H200"].memory_bytes)
        )
        for candidate in (choice.best, choice.next_best):
            layout = candidate.phase.layout
            together = layout.tensor_model_parallel_size * layout.context_levels[0]
            assert node_size % together == 0, candidate.describe()
        assert "inside a node" not in choice.describe()
    # A size that is given is kept.
    (wide,) = choose(config("llama3-8b", long | {"tensor_model_parallel_size": 16}), 1024)
    assert wide.best.phase.layout.tensor_model_parallel_size == 16


def test_a_layout_leaves_a_node_where_no_other_fits_and_says_so():
    # A 70B on 16 GPUs of 64 GiB, two to a node, with neither a pipeline nor context parallelism.
    hardware = dataclasses.replace(TABLE["H100"], devices_per_node=2)
    sizes = {"pipeline_model_parallel_size": 1, "context_parallel_size": 1}
    made = config("llama3-70b", sizes | {"data_parallel_sharding_strategy": "optim"})
    (choice,) = choose(made, 16, Device(hardware, 150 * GIB))
    assert choice.best.phase.layout.tensor_model_parallel_size > 2
    assert "nothing fits whose tp and all-to-all stay inside a node" in choice.describe()


def test_a_large_model_is_split_and_a_small_one_is_not():
    (large,) = choose(config("llama3-70b", {}), 64)
    (small,) = choose(config("125m", {}), 64)
    assert large.best.phase.layout.sizes != (1, 1, 1) and small.best.phase.layout.sizes == (1, 1, 1)


def test_sizes_that_are_given_are_kept():
    made = config(
        "llama3-8b",
        {"tensor_model_parallel_size": 4},
        {"context_parallel_size": 1, "recompute_granularity": "full"},
    )
    first, second = choose(made, 64)
    assert first.best.phase.layout.sizes[0] == 4 and second.best.phase.layout.sizes[2] == 1
    assert second.best.phase.memory.recompute_granularity == "full"
    whole_run = config(
        "llama3-8b", {}, pipeline_model_parallel_size=2, data_parallel_sharding_strategy="optim"
    )
    (choice,) = choose(whole_run, 64)
    assert (
        choice.best.phase.layout.sizes[1] == 2
        and choice.best.phase.layout.sharding_strategy == "optim"
    )
    two_levels = config(
        "llama3-8b",
        dict(
            context_parallel_size=16,
            cp_comm_type="a2a+allgather",
            hierarchical_context_parallel_sizes=[4, 4],
        ),
    )
    (choice,) = choose(two_levels, 64)
    assert choice.best.phase.layout.context_levels == (4, 4)


def test_only_what_is_not_given_is_open():
    made = config(
        "llama3-8b",
        {"tensor_model_parallel_size": 1, "recompute_granularity": "none"},
        {"layout": "given"},
        {"hierarchical_context_parallel_sizes": [2, 2]},
        context_parallel_size=4,
    )
    assert [phase.auto for phase in resolve_phases(made)] == [
        ("pipeline_model_parallel_size", "data_parallel_sharding_strategy"),
        (),
        (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "data_parallel_sharding_strategy",
            "recompute_granularity",
        ),
    ]


def test_nothing_fits_names_the_least_and_what_would_help():
    made = config(
        "llama3-70b",
        {"seq_length": 1 << 20, "recompute_granularity": "none", "pipeline_model_parallel_size": 1},
    )
    with pytest.raises(ValueError) as error:
        choose(made, 64)
    text = str(error.value)
    assert text.startswith(
        "phase 'phase0': layout = auto: nothing fits 64 processes with 118.2 GiB (all but a tenth"
    )
    assert "The least is tp " in text and "(parameters " in text and "activations " in text
    assert "Fix: recompute_granularity full (tp " in text and "processes (tp " in text
    packed = config(
        "llama3-8b",
        {
            "micro_batch_size": 64,
            "context_parallel_size": 1,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
        },
    )
    with pytest.raises(
        ValueError, match="Fix: micro_batch_size 1 .*; or leaving all sizes to auto"
    ):
        choose(packed, 16)


def test_no_legal_layout_says_why():
    made = config("llama3-8b", {"tensor_model_parallel_size": 3})
    with pytest.raises(ValueError) as error:
        choose(made, 64)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(
        "phase 'phase0': layout = auto: no layout of 64 processes can run it with the tp 3 that "
        "are given. Fix: change what is given; layouts that work: tp "
    )
    assert any("must divide num_attention_heads" in line for line in lines[1:])


def settle(
    made: Config, world_size: int, stored: dict | None = None, clock: int = 0, device: Device = H200
):
    return settle_layouts(
        resolve_phases(made), made, world_size, VOCABULARY, stored or {}, clock, device
    )


def test_the_stored_choice_wins_until_the_question_changes():
    made = config("llama3-8b", {"seq_length": 131072}, {"layout": "given"})
    phases, stored, lines = settle(made, 64)
    assert stored.keys() == {"phase0"} and len(lines) == 3 and "; next tp " in lines[0]
    assert lines[1] == (
        "layout auto: step times assume 0.55 of the data sheet's FLOP/s in matrix products, 0.46 "
        "in attention (as measured on an H100) and 0.8 of the links"
    )
    assert lines[2].startswith(
        "layout auto: no data is looked at: each sample counts as one document"
    )
    assert "data ranks as equally loaded" in lines[2]
    assert check_phases(phases, made, 64, VOCABULARY) == []
    smaller = Device(TABLE["H100"], 60 * GIB)
    again, kept, lines = settle(made, 64, stored, device=smaller)
    assert again == phases and kept == stored and lines[0].endswith("(kept from the checkpoint)")
    assert len(lines) == 1, "what was kept was not compared"
    fresh, _, _ = settle(made, 64, device=smaller)
    chosen = [(phase.layout, phase.memory) for phase in (fresh[0], phases[0])]
    assert chosen[0] != chosen[1], "or the stored choice would prove nothing"
    _, _, lines = settle(made, 128, stored)
    assert "(chosen again, since world_size was 64; it was tp 1 pp 1 cp " in lines[0]
    made.schedule.phases[0].seq_length = 65536
    _, _, lines = settle(made, 64, stored)
    assert "(chosen again, since seq_length was 131072;" in lines[0]


def test_choices_of_earlier_versions_are_kept():
    """Their records know neither tiles nor chunks."""
    made = config("llama3-8b", {"seq_length": 131072})
    phases, stored, _ = settle(made, 64)
    for name in ("mlp_tiles", "attention_head_chunks", "loss_chunk_tokens"):
        del stored["phase0"]["asked"][name]
    again, _, lines = settle(made, 64, stored, device=Device(TABLE["H100"], 60 * GIB))
    assert again == phases and lines[0].endswith("(kept from the checkpoint)")
    made.schedule.phases[0].mlp_tiles = 4
    assert "(chosen again, since mlp_tiles was 1;" in settle(made, 64, stored)[2][0]


def test_offloaded_layers_need_a_level_that_keeps_inputs():
    made = config("llama3-8b", {"cpu_offloading_num_layers": 4})
    (choice,) = choose(made, 64)
    assert choice.best.phase.memory.recompute_granularity in ("full", "attention_kept")


def test_a_phase_that_is_over_need_not_fit():
    made = config("llama3-8b", {"seq_length": 1 << 20, "recompute_granularity": "none"}, {})
    tiny = Device(TABLE["H200"], 45 * GIB)
    with pytest.raises(ValueError, match="phase 'phase0': layout = auto: nothing fits"):
        settle(made, 64, device=tiny)
    first, _ = resolve_phases(made)
    phases, _, _ = settle(made, 64, clock=first.end, device=tiny)
    assert phases[0].predicted_bytes > tiny.memory_bytes > phases[1].predicted_bytes


def test_the_plan_marks_what_was_chosen():
    made = config("llama3-8b", {}, {"layout": "given"})
    rows = describe(settle(made, 64)[0], 64).splitlines()
    assert "(auto, " in rows[1] and " GiB)" in rows[1] and "auto" not in rows[2]


def test_a_gpu_of_less_memory_gets_another_layout_and_a_cpu_any():
    made = config("llama3-8b", {})
    (roomy,) = choose(made, 8)
    (tight,) = choose(made, 8, Device(TABLE["H100"], 48 * GIB))
    assert tight.best.memory.total <= 0.9 * 48 * GIB < roomy.best.memory.total
    (cpu,) = choose(config("tiny", {"global_batch_tokens": 65536}), 4, Device(CPU, 8 * GIB))
    assert cpu.best.memory.total < 8 * GIB


def test_the_choice_is_quick_and_the_same_each_time():
    made = config("llama3-70b", {})
    began = time.process_time()
    first = choose(made, 1024)
    second = choose(made, 1024)
    assert first == second and time.process_time() - began < 6, "two searches"


def test_the_setting_is_read_from_files_and_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "phases:\n  - {name: a, seq_length: 128, layout: given}\n  - {name: b, seq_length: 128}\n"
    )
    made = load_config(["--config", str(path), "--layout", "auto", "--device-memory-gib", "80"])
    assert made.layout.layout == "auto" and made.schedule.phases[0].layout == "given"
    assert [bool(made.open_settings(phase)) for phase in made.schedule.phases] == [False, True]
    path.write_text(dump_yaml(made))
    assert load_config(["--config", str(path)]) == made
    assert Device.here(made.layout).memory_bytes == 80 * GIB
    with pytest.raises(ValueError, match="must be one of auto, given"):
        load_config(["--layout", "best"])


def test_settings_that_an_open_size_may_need_are_not_called_useless():
    made = config("llama3-8b", {}, sequence_parallel=True, device_memory_gib=80.0)
    assert effect_warnings(made) == []
    given = dataclasses.replace(made, layout=dataclasses.replace(made.layout, layout="given"))
    assert [text.split(" = ")[0] for text in effect_warnings(given)] == ["sequence_parallel"]
