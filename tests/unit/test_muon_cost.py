"""What the plan says of Muon's update: operations and exchanges, counted by hand."""

import dataclasses

import pytest
import torch

from model.config import ModelConfig
from model.presets import PRESETS
from parallel.config import LayoutConfig
from pretrain.checkpointing.save_folder import checkpoint_bytes
from pretrain.checkpointing.state_copy import own_part
from pretrain.config.config import OptimizerConfig
from pretrain.config.load import load_config
from pretrain.optimizer import build_optimizer
from pretrain.planner.hardware import TABLE, Hardware
from pretrain.planner.model_size import ModelSize
from pretrain.planner.muon_cost import MuonCost
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.step_time import StepTime, estimate_step
from pretrain.planner.traffic import Traffic, step_traffic
from pretrain.planner.workload import Workload
from tools.bench.contenders import BenchModel, Ours, one_process

VOCABULARY = 128_256
MODEL = ModelConfig(**PRESETS["llama3-8b"])
HIDDEN = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
"""Elements of a layer's matrices: q, o; k, v; gate, up, down."""
EIGHT = Workload(LayoutConfig(), 8, 8192, 1, 1)
"""Eight ranks share the parameters: each owns four of the 32 layers' matrices."""
WORDS = "--model llama3-8b --optimizer muon --bf16 --lr 1e-3 --mock-data".split()


def cost_of(*words: str) -> MuonCost:
    """The cost in a run on GPUs."""
    cost = MuonCost.of_run(load_config([*WORDS, *words]), VOCABULARY, on_gpu=True)
    assert cost is not None
    return cost


def step_of(short: int, long: int) -> int:
    """Operations of a step of Newton-Schulz: X X^T, its square, and the polynomial times X."""
    gram = 2 * short * short * long
    square = 2 * short**3
    product = 2 * short * short * long
    return gram + square + product


def test_the_owner_of_all_matrices_makes_each_step_of_each():
    # q, o; k, v; gate, up, down of Llama 3 8B.
    layer = 2 * step_of(4096, 4096) + 2 * step_of(1024, 4096) + 3 * step_of(4096, 14336)
    assert cost_of().flops(32, 1, 1) == 5 * 32 * layer
    assert cost_of("--muon-num-ns-steps", "3").flops(32, 1, 1) == 3 * 32 * layer


def test_the_busiest_of_some_owners_has_whole_matrices():
    """The MLPs have 96 matrices: 32 of 64 ranks own two, the others all else, which is less."""
    assert cost_of().flops(32, 1, 64) == 5 * 2 * step_of(4096, 14336)


def test_heads_that_are_orthogonalized_by_themselves_are_counted_one_by_one():
    # 32 heads of q and 8 each of k and v, of 128 rows; o and the MLP's stay whole.
    heads = (32 + 2 * 8) * step_of(128, 4096)
    layer = heads + step_of(4096, 4096) + 3 * step_of(4096, 14336)
    assert cost_of("--muon-per-head").flops(32, 1, 1) == 5 * 32 * layer
    # The largest matrix bounds what the busiest of many owners has.
    assert cost_of("--muon-per-head").flops(32, 1, 1024) == 5 * step_of(4096, 14336)


def test_fp32_products_are_planned_at_fp32_s_rate():
    """An H100 multiplies fp32 at 67 TFLOP/s, bf16 at 989; 0.55 of either is reached."""
    layer = 2 * step_of(4096, 4096) + 2 * step_of(1024, 4096) + 3 * step_of(4096, 14336)
    operations = 5 * 32 * layer
    alone = step_of_one_rank(None).update
    bf16 = step_of_one_rank(cost_of()).update
    fp32 = step_of_one_rank(cost_of("--muon-fp32-matmul-prec", "highest")).update
    assert bf16 - alone == pytest.approx(operations / (0.55 * 989e12))
    assert fp32 - alone == pytest.approx(operations / (0.55 * 67e12))


def step_of_one_rank(muon: MuonCost | None) -> StepTime:
    """A step of one rank that has all layers: nothing is sent."""
    load = Workload(LayoutConfig(), 1, 8192, 1, 1)
    return estimate_step(MemoryModel(MODEL, VOCABULARY, muon=muon), load, TABLE["H100"])


# ---------------------------------------------------------------- what is held and kept


def test_an_owner_of_cheap_matrices_gathers_more_than_its_share():
    """One of two owners has two matrices of the MLP, and the other all else: cut into heads, q, k
    and v cost little, and have as many elements."""
    config = BenchModel(
        num_layers=1,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
    )
    cost = MuonCost(ModelSize(config, 64), 2, 5, is_per_head=True)
    mlp = 96 * 64
    others = mlp + 2 * 64 * 64 + 2 * 32 * 64
    # Eight copies of what it gathers in bf16, three of its shards in bf16 and in fp32.
    shards = (2 * mlp + others) // 2
    assert cost.of_rank(1, 1, 2, 4).buffers == 8 * 2 * others + 3 * (2 + 4) * shards


def test_a_stage_without_layers_holds_nothing_for_muon():
    assert cost_of().of_rank(0, 1, 2, 4) == (0, 0)


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_the_copy_that_saves_write_has_the_bytes_of_a_trainers_state(name):
    """Weights, moments and step counts, of a real model and its optimizer in fp64."""
    config = BenchModel(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
    )
    with one_process() as layout:
        ours = Ours(config, 64, "float64", layout, seed=1, master_dtype=torch.float64)
        settings = OptimizerConfig(optimizer=name, fp64=True)
        optimizer = build_optimizer(ours.stages, config, settings)
        weights = sum(own_part(each).nbytes for each in ours.stages[0].parameters())
        states = [value for state in optimizer.state.values() for value in state.values()]
        kept = sum(own_part(value).nbytes for value in states)
    muon = MuonCost(ModelSize(config, 64), 8, 5) if name == "muon" else None
    load = Workload(LayoutConfig(), 1, 64, 1, 1)
    for copied_values, expected in ((0, 0), (1, weights), (3, weights + kept)):
        model = MemoryModel(
            config, 64, master_bytes=8, compute_bytes=8, copied_values=copied_values, muon=muon
        )
        assert model.copy_bytes(load, 0) == expected, copied_values


def test_a_checkpoint_has_one_moment_of_a_matrix_and_two_of_all_else():
    """The model has 8.03e9 parameters; all but the matrices of its 32 layers are AdamW's."""
    sizes = {}
    for words in ([], ["--no-save-optim"], ["--optimizer", "adam"]):
        config = load_config([*WORDS, *words])
        sizes[" ".join(words)] = checkpoint_bytes(config, VOCABULARY)
    parameters = 32 * (HIDDEN + 2 * 4096) + 2 * VOCABULARY * 4096 + 4096
    assert sizes["--no-save-optim"] == 4 * parameters
    assert sizes["--optimizer adam"] == 12 * parameters
    assert sizes[""] == 12 * parameters - 4 * 32 * HIDDEN
    # Each of eight ranks writes its part, and the step counts of all that is AdamW's.
    model = MemoryModel(MODEL, VOCABULARY, muon=cost_of())
    saved = model.saved_bytes(EIGHT, 0, with_optimizer=True)
    assert saved == sizes[""] / 8 + 4 * (32 * 2 + 3)


# ---------------------------------------------------------------- exchanges

BUCKETS = 12 + 4 + 1
"""Matrices of the MLP alone, q and o in pairs, k and v by eight: at most 32 Mi elements each."""


def exchanges_of(hardware: Hardware) -> list[Traffic]:
    model = MemoryModel(MODEL, VOCABULARY, muon=cost_of())
    found = step_traffic(model, EIGHT, hardware)
    return [each for each in found if each.axis == "dp_cp_tp"]


def test_matrices_go_to_their_owners_and_back():
    there, back = exchanges_of(TABLE["H100"])
    assert (there.what, back.what) == ("matrices to their owners", "updates from the owners")
    for each in (there, back):
        assert each.operation == "all-to-all" and each.group.size == 8
        assert each.calls == BUCKETS
        # A rank's eighth of all matrices in bf16, but for those that it owns; as much comes back.
        assert each.sent_bytes == 2 * 32 * HIDDEN / 8 * 7 / 8
        assert each.between_nodes_bytes == 0
        # 0.8 of NVLink's 450 GB/s, and 15 us for each of three doublings of the ranks.
        alone = each.sent_bytes / 360e9
        assert each.seconds == pytest.approx(alone + BUCKETS * 3 * 15e-6)


def test_a_run_of_one_rank_and_one_without_muon_exchange_no_matrices():
    one = dataclasses.replace(EIGHT, data_parallel_size=1)
    for muon, load in ((None, EIGHT), (cost_of(), one)):
        found = step_traffic(MemoryModel(MODEL, VOCABULARY, muon=muon), load, TABLE["H100"])
        assert "dp_cp_tp" not in {each.axis for each in found}


def test_the_rank_that_owns_most_is_waited_for():
    """A matrix of the MLP belongs to 96 of 256 ranks, and nobody owns two of them."""
    load = dataclasses.replace(EIGHT, data_parallel_size=256)
    model = MemoryModel(MODEL, VOCABULARY, muon=cost_of())
    there, back = (
        each for each in step_traffic(model, load, TABLE["H100"]) if each.axis == "dp_cp_tp"
    )
    largest = 14336 * 4096
    assert back.calls == 1 and back.sent_bytes == 2 * largest * 255 / 256
    assert there.sent_bytes == 2 * (32 * HIDDEN - largest) / 256
    # Of 255 others 248 are behind its network card of 50 GB/s, of which 0.8 is reached.
    assert back.between_nodes_bytes == pytest.approx(back.sent_bytes * 248 / 255)
    seconds = back.between_nodes_bytes / 40e9 + 8 * 15e-6
    assert there.seconds == back.seconds == pytest.approx(seconds)


@pytest.mark.parametrize("links", [0.8, 0.001])
def test_all_but_the_first_and_the_last_bucket_travel_beside_the_products(links):
    efficiency = dataclasses.replace(TABLE["H100"].efficiency, links=links)
    hardware = dataclasses.replace(TABLE["H100"], efficiency=efficiency)
    plain, muon = (
        estimate_step(MemoryModel(MODEL, VOCABULARY, muon=cost), EIGHT, hardware).update
        for cost in (None, cost_of())
    )
    layer = 2 * step_of(4096, 4096) + 2 * step_of(1024, 4096) + 3 * step_of(4096, 14336)
    computing = 5 * 4 * layer / (0.55 * 989e12)
    sent = sum(each.seconds for each in exchanges_of(hardware))
    hidden = min(computing, sent * (BUCKETS - 1) / BUCKETS)
    assert (hidden == computing) == (links < 0.1), "both kinds are tried"
    # Computing loses a fifth of what runs beside it.
    assert muon - plain == pytest.approx(computing + sent - hidden + 0.2 * hidden)
