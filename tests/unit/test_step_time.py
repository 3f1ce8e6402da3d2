"""The parts of a step: their sum is what was recorded, and each is what a count by hand says."""

import dataclasses

import numpy as np
import pytest
import torch

from model.activation_memory.settings import MemorySettings
from model.attention_backends.documents import pack_documents
from model.attention_logits import TileSize, _SeenPairs
from model.config import ModelConfig
from model.presets import PRESETS
from model.scoring import Scoring
from parallel.config import LayoutConfig
from pretrain.planner.documents import PhaseDocuments, StepCosts
from pretrain.planner.hardware import CPU, TABLE, Hardware, find_hardware
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.rank_group import RankGroup
from pretrain.planner.step_time import estimate_step
from pretrain.planner.traffic import step_traffic
from pretrain.planner.workload import Workload

VOCABULARY = 128_256


def model_of(preset: str) -> MemoryModel:
    return MemoryModel(ModelConfig(**PRESETS[preset]), VOCABULARY)


def load_of(layout: dict, dp: int, length: int, micro: int, count: int, memory=None) -> Workload:
    return Workload(LayoutConfig(**layout), dp, length, micro, count, memory or MemorySettings())


RECORDED = [
    ("llama3-8b", "H100", dict(tensor_model_parallel_size=2), (32, 8192, 2, 4), None, 3.4699616),
    (
        "llama3-70b",
        "H100",
        dict(tensor_model_parallel_size=8, pipeline_model_parallel_size=4, sequence_parallel=True),
        (32, 8192, 1, 16),
        MemorySettings("selective"),
        6.2051109,
    ),
    (
        "llama3-70b",
        "B200",
        dict(
            tensor_model_parallel_size=8,
            pipeline_model_parallel_size=4,
            pipeline_schedule="interleaved",
        ),
        (4, 8192, 1, 8),
        MemorySettings("full"),
        1.6923299,
    ),
    (
        "llama3-8b",
        "A100",
        dict(
            context_parallel_size=64,
            cp_comm_type="a2a+allgather",
            hierarchical_context_parallel_sizes=[8, 8],
            data_parallel_sharding_strategy="optim_grads_params",
        ),
        (2, 1 << 20, 1, 2),
        MemorySettings("attention_kept"),
        203.7593001,
    ),
    (
        "qwen3-8b",
        "H800",
        dict(context_parallel_size=3, data_parallel_sharding_strategy="optim"),
        (5, 49152, 1, 3),
        MemorySettings("full", attention_head_chunks=2),
        12.2943546,
    ),
    ("llama3-8b", "H200", dict(tensor_model_parallel_size=16), (8, 8192, 1, 1), None, 0.17158490),
]


@pytest.mark.parametrize("preset, gpu, layout, shape, memory, seconds", RECORDED)
def test_the_parts_sum_up_to_the_step_that_was_recorded(
    preset, gpu, layout, shape, memory, seconds
):
    step = estimate_step(model_of(preset), load_of(layout, *shape, memory), TABLE[gpu])
    assert step.total == pytest.approx(seconds, rel=1e-7)
    assert step.total == pytest.approx(
        step.compute
        + step.tensor
        + step.context
        + step.pipeline
        + step.bubble
        + step.sharding_exposed
        + step.sharding_slowdown
        + step.update
    )


def test_what_is_sent_has_the_bytes_that_a_count_by_hand_gives():
    """Llama-3-8B: hidden 4096, 32 layers, 32 heads of 128, 8 of keys; 2 bytes an activation."""
    layout = dict(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=4
    )
    found = {
        (each.axis, each.what): each
        for each in step_traffic(model_of("llama3-8b"), load_of(layout, 4, 8192, 1, 2), H100)
    }
    sent = {key: each.sent_bytes for key, each in found.items()}
    layers = 16 * 2  # of a stage, for two microbatches
    tokens = 8192 // 4
    # An all-reduce of 2 ranks sends half of the tensor twice; four a layer, one at the model's end.
    tp = found["tp", "activations between the parts of a layer, and at both ends of the model"]
    calls = 4 * layers + 2
    assert (tp.calls, tp.sent_bytes) == (calls, calls * tokens * 4096 * 2)
    # 16 query heads of a tp rank go to 4 ranks, and of its 4 key heads 1 to each; 3/4 leave.
    head = tokens * 128 * 2
    assert sent["cp", "q, k, v to heads"] == 2 * layers * head * (16 + 2 * 4) * 3 / 4
    assert sent["cp", "attention's output to tokens"] == 2 * layers * head * 16 * 3 / 4
    assert sent["pp", "activations and their gradients between stages"] == (
        2 * 2 * tokens * 4096 * 2
    )
    # A stage's half of the layers, its half of the vocabulary's rows on the ends, over 16 shards.
    layer = 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336)
    held = 16 * (layer // 2 + 2 * 4096) + VOCABULARY // 2 * 4096 + 4096
    assert sent["dp_cp", "gradients"] == pytest.approx(held * 4 * 15 / 16)
    assert sent["dp_cp", "parameters"] == pytest.approx(held * 2 * 15 / 16)


H100 = TABLE["H100"]


def test_a_part_goes_over_the_network_where_its_group_leaves_the_node():
    assert RankGroup(8, 1).is_inside_node(H100) and not RankGroup(8, 2).is_inside_node(H100)
    # Of 7 others 3 are in the node; a ring's neighbours in the next node get it over 4 cards.
    assert RankGroup(8, 2).exchanged_between_nodes(700, H100) == pytest.approx(400)
    assert RankGroup(8, 2).ringed_between_nodes(700, H100) == pytest.approx(175)
    assert RankGroup(8, 1).exchanged_between_nodes(700, H100) == 0
    assert RankGroup(8, 1).ringed_between_nodes(700, H100) == 0


def test_without_a_switch_few_peers_have_few_links():
    mi300x = TABLE["MI300X"]
    assert find_hardware("AMD Instinct MI300X") is mi300x
    assert mi300x.rate_inside_node(1) == 64e9 and mi300x.rate_inside_node(7) == 448e9
    assert H100.rate_inside_node(1) == H100.rate_inside_node(7) == 450e9
    quiet = dataclasses.replace(
        mi300x,
        efficiency=dataclasses.replace(mi300x.efficiency, links=1, collective_latency_seconds=0),
    )
    assert RankGroup(2, 1).ring_seconds(64e9, quiet) == pytest.approx(1)
    assert RankGroup(8, 1).exchange_seconds(448e9, quiet) == pytest.approx(1)


def test_short_documents_cost_attention_what_their_pairs_do():
    model = model_of("llama3-8b")
    whole = load_of(dict(), 8, 8192, 1, 1)
    packed = dataclasses.replace(whole, pairs_per_token=8193 / 4)
    one = estimate_step(model, whole, H100)
    half = estimate_step(model, packed, H100)
    assert half.attention == pytest.approx(one.attention / 2)
    assert half.products == one.products


@pytest.mark.parametrize("level, passes", [(None, 3), ("full", 4)])
def test_a_step_waits_for_the_attention_of_the_slowest_data_rank(level, passes):
    """One data rank has whole documents, the other one documents of an eighth."""
    model = model_of("llama3-8b")
    memory = MemorySettings(level)
    even = load_of(dict(pipeline_model_parallel_size=4), 2, 8192, 1, 8, memory)
    # 32 layers with 32 heads of 128: pairs of queries and keys, and all else that tokens cost.
    whole = 8192 * 8193 / 2
    short = 8 * 1024 * 1025 / 2
    pair = 4 * 32 * 128
    tokens = 6 * 8e9 * 8192
    costs = [tokens + 3 * 32 * pair * pairs for pairs in (whole, short)]
    documents = PhaseDocuments(costs=StepCosts(np.array([costs * 8])), is_dealt=False)
    extra = documents.extra_flops_per_sample(even.step_shape)
    uneven = dataclasses.replace(even, extra_flops_per_sample=extra)
    step = estimate_step(model, even, H100)
    slow = estimate_step(model, uneven, H100)
    assert step.imbalance == 0
    # A stage has 8 layers, a rank 8 samples, and attention reaches 0.46 of 989 TFLOP/s.
    beyond_mean = (whole - short) / 2
    assert slow.imbalance == pytest.approx(8 * 8 * passes * pair * beyond_mean / (0.46 * 989e12))
    # The slowest rank's pipeline has its bubble: 3 of 8 microbatches.
    assert slow.bubble - step.bubble == pytest.approx(slow.imbalance * 3 / 8)
    assert slow.total == pytest.approx(step.total + slow.imbalance * 11 / 8)


def test_the_wait_grows_with_the_microbatches_and_falls_with_attention_s_rate():
    model = model_of("llama3-8b")
    load = dataclasses.replace(load_of(dict(), 2, 8192, 1, 4), extra_flops_per_sample=1e12)
    longer = dataclasses.replace(load, num_microbatches=8)
    slower = dataclasses.replace(
        H100, efficiency=dataclasses.replace(H100.efficiency, attention={128: 0.23})
    )
    wait = estimate_step(model, load, H100).imbalance
    assert wait == pytest.approx(4 * 1e12 / (0.46 * 989e12))
    assert estimate_step(model, longer, H100).imbalance == pytest.approx(2 * wait)
    assert estimate_step(model, load, slower).imbalance == pytest.approx(2 * wait)


def test_nobody_waits_for_logits_that_every_rank_measures():
    """A GPU scores whole tiles: of a rank's tiles only the keys are more where documents are."""
    config = ModelConfig(**PRESETS["llama3-8b"])
    measuring = MemoryModel(config, VOCABULARY, measures_logits=True)
    even = load_of(dict(), 2, 8192, 1, 4)
    assert estimate_step(measuring, even, H100).imbalance == 0
    # The slowest rank's tokens see 1,000 tokens more on average.
    pair = 4 * 32 * 128
    extra = 3 * 32 * pair * 8192 * 1000
    step = estimate_step(measuring, dataclasses.replace(even, extra_flops_per_sample=extra), H100)
    # Their scores of 32 heads are written and read in fp32, in 32 layers of 4 microbatches.
    scores = 32 * 32 * 4 * 8192 * 1000
    measured = 2 * 4 * scores / (3.35e12 * 0.85)
    assert step.imbalance == pytest.approx(4 * extra / (0.46 * 989e12) + measured)


def test_cores_that_processes_share_compute_for_those_that_wait():
    model = model_of("llama3-8b")
    uneven = dataclasses.replace(load_of(dict(), 8, 8192, 1, 8), extra_flops_per_sample=2e14)
    shared = dataclasses.replace(H100, crowding=1.25)
    alone = estimate_step(model, uneven, H100)
    crowded = estimate_step(model, uneven, shared)
    slowest = alone.compute + alone.imbalance
    assert crowded.imbalance == pytest.approx(slowest / 1.25 - alone.compute)
    assert crowded.imbalance > 0
    assert estimate_step(model, uneven, dataclasses.replace(H100, crowding=2.0)).imbalance == 0


def test_a_share_of_the_rates_acts_on_its_part_alone():
    model = model_of("llama3-8b")
    load = load_of(dict(tensor_model_parallel_size=2), 4, 8192, 1, 2)

    def with_(**shares) -> Hardware:
        return dataclasses.replace(H100, efficiency=dataclasses.replace(H100.efficiency, **shares))

    plain = estimate_step(model, load, H100)
    slow = estimate_step(model, load, with_(products=0.275))
    assert slow.products == pytest.approx(2 * plain.products)
    assert slow.attention == plain.attention and slow.tensor == plain.tensor
    assert estimate_step(model, load, with_(memory=0.425)).update == pytest.approx(2 * plain.update)


def test_products_and_attention_of_fp32_run_at_fp32_s_rate():
    """An H100 multiplies fp32 at 67 TFLOP/s, without TF32, and bf16 at 989."""
    load = load_of(dict(), 8, 8192, 1, 1)
    narrow = model_of("llama3-8b")
    wide = MemoryModel(narrow.config, VOCABULARY, compute_bytes=4)
    bf16 = estimate_step(narrow, load, H100)
    fp32 = estimate_step(wide, load, H100)
    for part in ("products", "attention", "logits"):
        assert fp32.parts[part] == pytest.approx(bf16.parts[part] * 989 / 67), part
    # A CPU's row is for whatever its run computes in.
    parts = [estimate_step(model, load, CPU).products for model in (narrow, wide)]
    assert parts[0] == parts[1]


def test_measuring_logits_costs_a_cpu_half_of_attention_s_forward():
    load = load_of(dict(), 8, 8192, 1, 1)
    plain = model_of("llama3-8b")
    measuring = MemoryModel(plain.config, VOCABULARY, measures_logits=True)
    one = estimate_step(plain, load, CPU)
    other = estimate_step(measuring, load, CPU)
    assert other.attention == pytest.approx(one.attention * 3.5 / 3)
    assert other.products == one.products


def test_measuring_logits_costs_a_gpu_the_way_of_the_scores_through_its_memory():
    plain = model_of("llama3-8b")
    measuring = MemoryModel(plain.config, VOCABULARY, measures_logits=True)
    load = load_of(dict(context_parallel_size=2), 4, 8192, 1, 3)
    one = estimate_step(plain, load, H100)
    other = estimate_step(measuring, load, H100)
    # 16 of the 32 heads, 3 microbatches, 32 layers. A tile of 16 heads in as many bytes as the
    # output, 32 MiB, has 8 Mi scores: 512 queries by 1,024 keys.
    scores = 32 * 3 * 16 * 8192 * (8193 / 2 + 512)
    # Each is written and read in fp32.
    expected = 2 * 4 * scores / (3.35e12 * 0.85)
    assert other.attention - one.attention == pytest.approx(expected)
    assert other.products == one.products
    # A device of much faster memory waits for the product.
    fast = dataclasses.replace(H100, memory_bytes_per_second=3.35e15)
    added = (
        estimate_step(measuring, load, fast).attention - estimate_step(plain, load, fast).attention
    )
    assert added == pytest.approx(one.attention / 6)


@pytest.mark.parametrize("documents", [[8192], [300] * 27 + [92], [50, 3000, 1200, 3942]])
def test_the_scores_of_the_plan_are_about_those_that_the_tiles_have(documents):
    """Within an eighth: the plan does not know where in a block of queries documents begin."""
    plain = model_of("llama3-8b")
    measuring = MemoryModel(plain.config, VOCABULARY, measures_logits=True)
    pairs = sum(length * (length + 1) / 2 for length in documents)
    load = dataclasses.replace(load_of(dict(), 1, 8192, 1, 1), pairs_per_token=pairs / 8192)
    added = (
        estimate_step(measuring, load, H100).attention - estimate_step(plain, load, H100).attention
    )
    planned = added * (3.35e12 * 0.85) / (2 * 4) / (32 * 32)

    bounds = torch.tensor([0, *np.cumsum(documents)], dtype=torch.int32)
    (call,) = pack_documents(bounds, [(0, 8192)], torch.device("cpu"))
    seen = _SeenPairs(call, Scoring(), torch.device("cpu"))
    tile = TileSize.choose(8192, 32, 128, 2, on_gpu=True)
    scored = 0
    for begin in range(0, 8192, tile.queries):
        end = min(begin + tile.queries, 8192)
        keys = sum(keys.stop - keys.start for keys, _ in seen.tiles(begin, end, tile.keys))
        scored += (end - begin) * keys
    assert planned == pytest.approx(scored, rel=0.12)
