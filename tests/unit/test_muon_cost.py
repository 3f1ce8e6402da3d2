"""What the plan says of Muon's update: its operations, counted by hand."""

import pytest

from model.config import ModelConfig
from model.presets import PRESETS
from parallel.config import LayoutConfig
from pretrain.config.load import load_config
from pretrain.planner.hardware import TABLE
from pretrain.planner.muon_cost import MuonCost
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.step_time import StepTime, estimate_step
from pretrain.planner.workload import Workload

VOCABULARY = 128_256
MODEL = ModelConfig(**PRESETS["llama3-8b"])
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
