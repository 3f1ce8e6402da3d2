"""The memory model against what autograd really keeps, and torch's own schedules."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.pipelining.schedules import BACKWARD_WEIGHT, FORWARD, FULL_BACKWARD

from model.activation_memory.settings import MemorySettings
from model.attention_backends.choice import choose_attention
from model.config import ModelConfig
from model.gpt import GPTStage
from model.presets import PRESETS
from parallel.config import LayoutConfig
from parallel.layout import single_process_layout
from parallel.schedule import accepts, chunks_in_flight, idle_share
from pretrain.planner.hardware import TABLE, find_hardware, peak_flops
from pretrain.planner.head_counts import allowed_head_chunks
from pretrain.planner.model_size import ModelSize
from pretrain.planner.muon_cost import MuonCost
from pretrain.planner.pass_counts import PassCounts
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.rank_group import RankGroup
from pretrain.planner.step_time import attention_efficiency, step_seconds
from pretrain.planner.workload import Workload
from tests.unit.test_phases import torch_schedule
from tools.plan_verify.live_memory import LiveMemory


class Batch:
    """Tokens in documents with the given bounds."""

    def __init__(self, bounds: tuple[int, ...], vocabulary: int):
        self.tokens = self.labels = torch.arange(bounds[-1]) % vocabulary
        self.positions = torch.arange(bounds[-1])
        self.cu_seqlens = torch.tensor(bounds, dtype=torch.int32)


def real_bytes(
    config: ModelConfig,
    vocabulary: int,
    dtype: torch.dtype,
    bounds: tuple[int, ...],
    settings: MemorySettings,
) -> tuple[int, int]:
    """(what a forward keeps for its backward, the peak of both), without parameters and their
    summed gradients."""
    device = torch.device("cpu")
    stage = GPTStage(
        config,
        vocabulary,
        single_process_layout(device),
        choose_attention("sdpa", device, dtype)[0],
    )
    stage = stage.to_empty(device=device).to(dtype)
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.zeros_like(parameter)
    stage.memory = settings
    stage.begin_step([Batch(bounds, vocabulary)], 10)
    with LiveMemory() as live:
        loss = stage(torch.empty(0))
        kept = live.now
        loss.backward()
    return kept, live.peak


DEEP = dict(num_layers=4, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4)
SHAPES = {
    "plain": (DEEP, 101),
    "grouped heads": (DEEP | dict(num_query_groups=2, ffn_hidden_size=96), 101),
    "qk-norm, one layer": (DEEP | dict(num_layers=1, qk_layernorm=True, num_query_groups=1), 101),
    "wide": (
        DEEP | dict(kv_channels=64, untie_embeddings_and_output_weights=True, ffn_hidden_size=512),
        101,
    ),
    "narrow MLP": (
        DEEP | dict(num_layers=2, ffn_hidden_size=32, num_query_groups=2, kv_channels=64),
        101,
    ),
    "large vocabulary": (DEEP | dict(num_layers=2), 4000),
    "gemma": (
        DEEP
        | dict(
            num_layers=2,
            norm_placement="both",
            apply_layernorm_1p=True,
            activation_func="gelu_tanh",
            embedding_multiplier=8.0,
            residual_multiplier=0.4,
            logits_scaling=3.0,
            window_size=[31, 0],
            window_attn_skip_freq=[2],
            window_rotary_base=100.0,
        ),
        101,
    ),
    "olmo": (
        DEEP
        | dict(
            num_layers=3,
            num_query_groups=2,
            norm_placement="post",
            qk_layernorm=True,
            qk_layernorm_scope="all_heads",
            no_rope_freq=[1],
        ),
        101,
    ),
    "sinks, capped logits": (
        DEEP | dict(num_layers=2, softmax_type="learnable", final_logit_softcapping=5.0),
        2000,
    ),
}


IN_BOTH_DTYPES = ("plain", "large vocabulary", "sinks, capped logits")
"""Shapes that are compared in fp32, too, in every run."""
WITH_ALL = {(torch.float32, shape) for shape in SHAPES if shape not in IN_BOTH_DTYPES}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("level", [None, "selective", "full", "attention_kept"])
@pytest.mark.parametrize(
    "dtype, shape",
    [
        pytest.param(*case, marks=[pytest.mark.long] if case in WITH_ALL else [])
        for case in itertools.product(DTYPES, SHAPES)
    ],
)
def test_activations_are_what_is_alive(dtype, shape, level):
    """Kept bytes within 10 %, the peak within 15 %."""
    sizes, vocabulary = SHAPES[shape]
    problems = []
    config = ModelConfig(**sizes)
    for tiles, chunks, loss_chunk in ((1, 1, 2048), (4, 1, 100), (1, 2, 64), (3, 4, 384)):
        if chunks not in allowed_head_chunks(config, LayoutConfig()):
            continue
        settings = MemorySettings(level, 0, tiles, chunks, loss_chunk)
        # Of the second of two microbatches: a single one's gradients come while this goes.
        load = Workload(LayoutConfig(), 1, 384, 1, 2, settings)
        model = MemoryModel(config, vocabulary, compute_bytes=dtype.itemsize, on_gpu=False)
        memory = model.estimate_worst(load)
        kept, peak = real_bytes(config, vocabulary, dtype, (0, 100, 250, 384), settings)
        predicted = memory.activations + memory.loss
        predicted_peak = predicted + model.layer_memory(load).working_set(
            has_loss=True, with_gradients=True
        )
        if abs(predicted - kept) > 0.1 * kept or abs(predicted_peak - peak) > 0.15 * peak:
            problems.append(
                f"{settings}: kept {predicted / kept:.3f}, peak {predicted_peak / peak:.3f} of "
                "the real"
            )
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_capped_scores_are_counted(dtype):
    """The longest document decides how large a tile is: here there is one."""
    config = ModelConfig(**DEEP, attn_logit_softcapping=5.0)
    settings = MemorySettings("full")
    load = Workload(LayoutConfig(), 1, 512, 1, 2, settings)
    model = MemoryModel(config, 101, compute_bytes=dtype.itemsize, on_gpu=False)
    memory = model.estimate_worst(load)
    predicted = memory.activations + memory.loss
    working = model.layer_memory(load).working_set(has_loss=True, with_gradients=True)
    kept, peak = real_bytes(config, 101, dtype, (0, 512), settings)
    assert predicted == pytest.approx(kept, rel=0.1)
    assert predicted + working == pytest.approx(peak, rel=0.15)


def pipeline_orders():
    """(schedule, pp, stages per rank, microbatches, torch's order of one rank's actions, rank)."""
    for schedule, per_rank in (
        ("interleaved", 2),
        ("interleaved", 3),
        ("zero-bubble", 1),
        ("zero-bubble", 2),
        ("ZBV", 2),
    ):
        for pp in (2, 3, 4, 8):
            for count in (1, 2, pp, 2 * pp, 4 * pp):
                if accepts(schedule, pp, count):
                    order = torch_schedule(schedule, pp, count, per_rank).pipeline_order
                    yield from (
                        (schedule, pp, per_rank, count, order[rank], rank) for rank in range(pp)
                    )


def test_chunks_in_flight_are_those_of_torchs_schedules():
    exact = 0
    for schedule, pp, per_rank, count, actions, rank in pipeline_orders():
        kept = set()
        most = 0
        for action in filter(None, actions):
            chunk = (action.stage_index, action.microbatch_index)
            if action.computation_type == FORWARD:
                kept.add(chunk)
            elif action.computation_type in (FULL_BACKWARD, BACKWARD_WEIGHT):
                kept.discard(chunk)
            most = max(most, len(kept))
        predicted = chunks_in_flight(schedule, rank, pp, per_rank, count)
        case = (schedule, pp, per_rank, count, rank)
        # With few microbatches, ZBV's first ranks keep fewer than its last.
        assert predicted == most or schedule == "ZBV" and count <= pp and most < predicted, (
            case,
            predicted,
            most,
        )
        exact += predicted == most
    assert exact > 200
    assert [chunks_in_flight("1F1B", rank, 4, 1, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert chunks_in_flight("1F1B", 0, 1, 1, 8) == 1


def test_the_bubble_shrinks_with_microbatches_and_better_schedules():
    assert idle_share("1F1B", 1, 1, 4) == 0 and idle_share("1F1B", 4, 1, 12) == pytest.approx(0.25)
    shares = [
        idle_share("1F1B", 4, 1, 8),
        idle_share("interleaved", 4, 2, 8),
        idle_share("zero-bubble", 4, 1, 8),
        idle_share("ZBV", 4, 2, 8),
    ]
    assert shares == sorted(shares, reverse=True) and idle_share("ZBV", 4, 2, 1) > 1


MODEL = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    untie_embeddings_and_output_weights=True,
)


def load(recompute=None, count=4, dp=8, seq_length=8192, memory=None, **layout) -> Workload:
    return Workload(
        LayoutConfig(**layout),
        dp,
        seq_length,
        1,
        count,
        MemorySettings(recompute, **(memory or {})),
    )


def test_each_setting_saves_what_it_is_for():
    model = MemoryModel(MODEL, 128256)
    plain = model.estimate_worst(load())
    assert model.estimate_worst(load("full")).activations < plain.activations / 8
    offloaded = model.estimate_worst(load("full", memory=dict(cpu_offloading_num_layers=16)))
    assert (
        offloaded.activations
        == model.estimate_worst(load("full")).activations - 16 * 8192 * 4096 * 2
    )
    assert offloaded.host == 16 * 8192 * 4096 * 2 and model.estimate_worst(load("full")).host == 0
    sharded = model.estimate_worst(load(data_parallel_sharding_strategy="optim_grads_params"))
    assert sharded.gathered < plain.gathered / 4 and sharded.parameters == plain.parameters
    once = model.estimate_worst(load(data_parallel_sharding_strategy="optim"))
    assert once.gradients == 8 * plain.gradients
    # Of a single microbatch most is held before its first gradient.
    alone = model.estimate_worst(load(count=1, data_parallel_sharding_strategy="optim"))
    assert alone.gradients == 0 and alone.total < plain.total
    split = model.estimate_worst(load(context_parallel_size=8, dp=1))
    assert split.parameters == plain.parameters and split.activations < 1.2 * plain.activations / 8
    tp = dict(tensor_model_parallel_size=8, dp=1)
    with_sp = model.estimate_worst(load(sequence_parallel=True, **tp))
    without = model.estimate_worst(load(**tp))
    assert (
        with_sp.activations < without.activations < plain.activations / 2
        and without.loss < plain.loss / 4
    )
    staged = model.estimate_worst(load(count=8, pipeline_model_parallel_size=4, dp=2))
    assert plain.gathered / 5 < staged.gathered < plain.gathered / 2.5
    assert (
        plain.activations * 0.9 < staged.activations < plain.activations * 1.1
    )  # a quarter, four times


def test_muon_keeps_one_moment_of_a_hidden_matrix_and_works_in_bounded_buffers():
    plain = MemoryModel(MODEL, 128256)
    muon = MemoryModel(MODEL, 128256, muon=MuonCost(ModelSize(MODEL, 128256), 2, 5))
    of_plain = plain.estimate_worst(load())
    of_muon = muon.estimate_worst(load())
    # q, o; k, v; gate, up, down of Llama 3 8B, sharded over 8 ranks.
    hidden = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    assert of_plain.optimizer - of_muon.optimizer == 32 * (4 * hidden // 8 + 4 * 7)
    # While it works the activations are gone: the fullest moment is another.
    assert of_plain.total - of_muon.total == of_plain.optimizer - of_muon.optimizer
    # A matrix of the MLP is larger than a bucket; more ranks do not make it smaller.
    few, many = (muon.muon.of_rank(32, 1, shards, 4).buffers for shards in (8, 128))
    assert 8 * 2 * 14336 * 4096 < many <= few < 18 * 2 * 14336 * 4096


def test_levels_are_in_order():
    model = MemoryModel(MODEL, 128256)
    none, selective, kept, full = (
        model.estimate_worst(load(level)).activations
        for level in (None, "selective", "attention_kept", "full")
    )
    layer = 8192 * 2 * 32
    assert full < kept < selective < none and kept - full == layer * (
        4096 + 32 * 2
    )  # outputs and log-sum-exps
    assert none - selective == layer * (
        2 * 14336 + 4096 + 2
    )  # gate, up, the norm's output and a number per row


def test_parts_of_the_sequence_and_of_the_heads_bound_what_is_there_at_once():
    model = MemoryModel(MODEL, 128256)
    long = dict(seq_length=1 << 18, context_parallel_size=2, dp=4)

    def held(**settings) -> int:
        return model.layer_memory(load("full", memory=settings, **long)).working_set(has_loss=False)

    width = (1 << 17) * 14336 * 2
    assert held() - held(mlp_tiles=8) > 2 * width
    assert held(mlp_tiles=64, attention_head_chunks=4) < 0.85 * held(mlp_tiles=64)
    # Logits are there in bf16 only: a CPU widens a few rows of them at a time.
    for on_gpu in (True, False):
        model = MemoryModel(MODEL, 128256, on_gpu=on_gpu)
        logits = [
            model.layer_memory(
                load("full", seq_length=1 << 16, memory=dict(loss_chunk_tokens=n))
            ).loss_at_work
            for n in (32768, 16384, 8192)
        ]
        assert logits[0] - logits[1] == (32768 - 16384) * 128256 * 2
        assert logits[1] - logits[2] == (16384 - 8192) * 128256 * 2


def test_a_cpu_has_no_host_beside_it():
    settings = dict(cpu_offloading_num_layers=16)
    model = MemoryModel(MODEL, 128256, on_gpu=False, optimizer_on_host=True)
    assert model.estimate_worst(load("full", memory=settings)) == model.estimate_worst(load("full"))


def test_pinned_memory_comes_in_powers_of_two():
    model = MemoryModel(MODEL, 128256)
    offloaded = [
        model.estimate_worst(
            load("attention_kept", seq_length=n, memory=dict(cpu_offloading_num_layers=2))
        ).host
        for n in (8192, 8200)
    ]
    assert offloaded == [2 * 2 * 8192 * 4096 * 2, 2 * 2 * 2 * 8192 * 4096 * 2]


def test_the_optimizer_on_the_host_leaves_the_device():
    device, host = (
        MemoryModel(MODEL, 128256, optimizer_on_host=on_host).estimate_worst(load())
        for on_host in (False, True)
    )
    assert host.parameters == host.optimizer == host.gradients == device.host == 0
    assert host.activations == device.activations and host.gathered == device.gathered
    taken = device.parameters + device.optimizer + device.gradients
    assert taken <= host.host < 2 * taken, "pinned in powers of two"
    whole = MemoryModel(MODEL, 128256, optimizer_on_host=True).estimate_worst(
        load(data_parallel_sharding_strategy="optim")
    )
    assert whole.gradients == 8 * device.gradients, "summed on the device until the last microbatch"


def test_bytes_of_a_known_model():
    """Llama-3 8B on one rank: 8.03B parameters, fp32 master, two moments, bf16 copy."""
    memory = MemoryModel(MODEL, 128256).estimate_worst(load(dp=1, count=1))
    assert memory.parameters == 4 * 8_030_261_248 and memory.gathered == memory.parameters // 2
    assert memory.optimizer == 2 * memory.parameters + 4 * 291


def test_time_follows_the_links():
    hardware = TABLE["H200"]
    inside = RankGroup(8, 1).ring_seconds(1e9, hardware)
    across = RankGroup(16, 1).ring_seconds(1e9, hardware)
    one_card = RankGroup(8, 8).ring_seconds(1e9, hardware)
    assert inside < across < one_card and one_card == pytest.approx(8 * across, rel=0.1)
    assert (
        RankGroup(8, 1).exchange_seconds(1e9, hardware)
        < RankGroup(8, 4).exchange_seconds(1e9, hardware)
        < RankGroup(8, 8).exchange_seconds(1e9, hardware)
    )
    model = MemoryModel(MODEL, 128256)
    plain = step_seconds(model, load(), hardware)
    times = [
        step_seconds(model, load(level, seq_length=131072), hardware)
        for level in (None, "selective", "attention_kept", "full")
    ]
    assert times == sorted(times) and 1.2 < times[3] / times[0] < 1.34 and times[2] < 1.1 * times[0]
    assert 1.2 < step_seconds(model, load("full"), hardware) / plain < 1.34
    assert step_seconds(model, load(tensor_model_parallel_size=8, dp=1), hardware) > plain / 8
    slow = replace(hardware, node_bytes_per_second=1e9, network_bytes_per_second=1e9)
    assert step_seconds(model, load(), slow) > 2 * plain


THREE_B = dict(num_layers=28, hidden_size=3072, num_attention_heads=24, kv_channels=128)


@pytest.mark.parametrize(
    "changes, tokens, samples, measured",
    [
        ({}, 8192, 4, 0.594),
        ({"attention_backend": "varlen"}, 8192, 4, 0.673),
        (THREE_B, 8192, 1, 0.426),
        ({"num_layers": 4}, 1 << 19, 1, 42.1),
    ],
)
def test_the_estimate_is_near_what_an_h100_took(changes, tokens, samples, measured):
    """The steps of tools/bench/RESULTS.md on one card; that of half a million tokens recomputes."""
    long = tokens > 100_000
    memory = MemorySettings("attention_kept" if long else None, mlp_tiles=256 if long else 1)
    layout = LayoutConfig(data_parallel_sharding_strategy="optim")
    config = ModelConfig(**PRESETS["1b"] | changes)
    found = step_seconds(
        MemoryModel(config, 128256),
        Workload(layout, 1, tokens, samples, 1, memory),
        TABLE["H100"],
    )
    assert found == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("size, reached", [(32, 0.35), (64, 0.35), (96, 0.35), (256, 0.46)])
def test_a_head_size_that_was_not_measured_counts_as_the_next_smaller_one(size, reached):
    config = ModelConfig(**PRESETS["tiny"] | {"kv_channels": size})
    assert attention_efficiency(config, TABLE["H100"]) == reached


def test_passes_of_the_levels():
    def of(level, sequence_parallel=False, has_norms_after=False, **settings) -> PassCounts:
        return PassCounts.make(
            MemorySettings(level, **settings),
            sequence_parallel=sequence_parallel,
            has_norms_after=has_norms_after,
        )

    assert of(None) == PassCounts() and of(None, sequence_parallel=True) == PassCounts()
    assert of("selective").mlp == of(None, mlp_tiles=2).mlp == pytest.approx(3 + 2 / 3)
    assert (
        of("selective").attention == of("attention_kept").attention == 3
        and of("full").attention == 4
    )
    assert of("full", sequence_parallel=True).sums == 5.5 and of("full").sums == 5
    assert (
        of(None, attention_head_chunks=2).qkv
        == of("attention_kept", attention_head_chunks=2).qkv
        == 4
    )
    assert of("full", attention_head_chunks=2).to_heads == 4
    # A norm after the MLP reads its result: the third product again, and the sum over tp.
    after = dict(has_norms_after=True)
    assert of(None, **after) == PassCounts()
    assert of("selective", **after).mlp == 4 and of("selective", **after).sums == 5
    assert of("full", mlp_tiles=2, **after).mlp == pytest.approx(4 + 2 / 3)
    assert of("full", **after).sums == of("full", sequence_parallel=True, **after).sums == 6


def test_hardware_is_found_by_a_word_of_its_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("Some GPU") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert find_hardware("h200").memory_bytes == 141 * 10**9
    for other in ("NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA A100X", "NVIDIA H20"):
        assert find_hardware(other) is None, other
