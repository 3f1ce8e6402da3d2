"""Muon on every layout: the weights of one process that holds whole matrices, in fp64."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch

from model.activation_memory.settings import MemorySettings
from parallel.layout import World
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.state_copy import own_part
from pretrain.muon.owners import make_buckets
from pretrain.optimizer import update
from pretrain.planner import muon_cost
from pretrain.planner.model_size import ModelSize
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.workload import Workload
from tests.dist.layout_table import make_table
from tests.dist.parity import VOCABULARY, Case, check_replicas_equal, compare, run_step
from tests.dist.training import base_arguments, losses, refusal, stored, train, write_corpus
from tests.marks import cases
from tools.plan_verify.live_memory import LiveMemory

MUON = dict(optimizer="muon")
TABLE = {
    name: dataclasses.replace(case, optimizer=MUON | dict(muon_per_head=bool(number % 2)))
    for number, (name, case) in enumerate(make_table()[0].items())
}
"""Every row of the table of layouts; in every second one q, k and v are cut into heads."""
CASES = {
    # Rows and columns cut over both axes, in whole and in uneven shards; key/value heads copied.
    "tp2 dp2": Case(tp=2, dp=2, optimizer=MUON),
    "tp2 cp3 kv1 uneven": Case(
        tp=2,
        cp=3,
        seq_length=36,
        model=dict(
            hidden_size=40,
            ffn_hidden_size=46,
            num_attention_heads=8,
            kv_channels=10,
            num_query_groups=1,
        ),
        optimizer=MUON | dict(muon_per_head=True),
    ),
    # More ranks than a shard has rows.
    "dp4 empty shards zero1": Case(
        dp=4, strategy="optim", model=dict(kv_channels=2), optimizer=MUON
    ),
    "pp2 cp2 zero3 tied": Case(
        pp=2, cp=2, strategy="optim_grads_params", optimizer=MUON | dict(muon_nesterov=False)
    ),
    "pp2 ZBV": Case(
        pp=2, schedule="ZBV", model=dict(num_layers=4), optimizer=MUON | dict(muon_momentum=0.5)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_muon_equals_one_process_after_three_steps(pool, single, name):
    check(pool, single, dataclasses.replace(CASES[name], steps=3, samples=4))


@pytest.mark.parametrize("name", cases(TABLE, lambda name: True))
def test_muon_equals_one_process_on_every_layout(pool, single, name):
    check(pool, single, TABLE[name])


def check(pool, single, case: Case) -> None:
    results = pool.run(run_step, case.world_size, case)
    compare(results, single(case))
    check_replicas_equal(results)


# ---------------------------------------------------------------- memory


LARGE = dict(num_layers=8, hidden_size=128, ffn_hidden_size=352, init_method_std=0.05)


def memory_of_update(world: World, case: Case) -> tuple[int, int, int]:
    """(bytes of the state, the peak of an update above what was there, its buckets)."""
    layout, stages, optimizer, stepper, loader = case.build(world)
    stepper.run(loader.read(0), train=True)
    with LiveMemory() as live:
        update(optimizer, 1e-3, torch.tensor(True))
    states = [value for state in optimizer.state.values() for value in state.values()]
    size = sum(own_part(value).nbytes for value in states)
    return size, live.peak, len(optimizer.buckets)


@pytest.mark.parametrize("sizes", [dict(), dict(tp=2, dp=2)], ids=["one", "tp2 dp2"])
def test_an_update_takes_no_more_than_the_plan_says(pool, sizes):
    """With buckets of a few matrices: what comes and goes is bounded by them, not by the model."""
    case = Case(**sizes, model=LARGE, samples=4, optimizer=MUON)
    with mock.patch.object(muon_cost, "BUCKET_ELEMENTS", SMALL_BUCKET):
        config = case.model_config()
        cost = muon_cost.MuonCost(ModelSize(config, VOCABULARY), 8, 5)
        model = MemoryModel(
            config, VOCABULARY, master_bytes=8, compute_bytes=8, on_gpu=False, muon=cost
        )
        load = Workload(case.layout_config(), case.dp, case.seq_length, 1, 2, MemorySettings())
        planned = cost.of_rank(8, case.tp, case.dp, 8).buffers
        state = model.estimate_worst(load).optimizer
    for size, peak, buckets in pool.run(memory_in_small_buckets, case.world_size, case):
        assert buckets >= 4
        assert size == state
        assert 0.4 * planned < peak <= planned, (peak, planned)


SMALL_BUCKET = 100_000


def memory_in_small_buckets(world: World, case: Case) -> tuple[int, int, int]:
    def small(matrices, owners, ranks) -> list[list[list[int]]]:
        return make_buckets(matrices, owners, ranks, SMALL_BUCKET)

    with mock.patch("pretrain.muon.muon.make_buckets", small):
        return memory_of_update(world, case)


# ---------------------------------------------------------------- checkpoints


TIED = dict(num_layers=4, untie_embeddings_and_output_weights=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def train_without_momentum(world: World, argv: list[str]) -> str:
    """Go on from a checkpoint, and lose the momenta that it holds."""
    load = checkpoint.load

    def lossy(folder, tensors, *args, **options) -> None:
        load(folder, tensors, *args, **options)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name.endswith("momentum_buffer"):
                    tensor.zero_()

    with mock.patch.object(checkpoint, "load", lossy):
        return train(world, argv)


ZBV = dict(pipeline_model_parallel_size=2, pipeline_schedule="ZBV")


@pytest.mark.parametrize(
    "other", [{}, pytest.param(ZBV, marks=pytest.mark.long)], ids=["dp2", "zbv"]
)
def test_another_layout_goes_on_with_the_momentum(pool, corpus, tmp_path, other):
    """Momenta are cut for it: the next losses are the same, and others without them."""
    save = str(tmp_path / "save")
    common = dict(optimizer="muon", fp64=True, train_iters=5, **TIED)
    tp2 = dict(tensor_model_parallel_size=2)
    pool.run(train, 2, base_arguments(corpus, save=save, exit_interval=3, **tp2, **common))
    names = {name.rsplit(".", 1)[1] for name in stored(save) if "mlp.up" in name}
    assert names == {"weight", "momentum_buffer"}

    def go_on(name: str, function=train, **layout) -> dict[int, float]:
        folder = str(tmp_path / name)
        argv = base_arguments(corpus, save=folder, load=save, **layout, **common)
        assert pool.run(function, 2, argv) == ["done"] * 2
        found = losses(folder)
        assert sorted(found) == [4, 5]
        return found

    expected = go_on("same", **tp2)
    found = go_on("other", **other)
    worst = max(abs(found[step] / expected[step] - 1) for step in expected)
    assert worst <= 1e-10, worst
    without = go_on("without", train_without_momentum)
    assert abs(without[5] / expected[5] - 1) > 1e-6


def test_another_optimizer_is_refused_or_starts_with_fresh_moments(pool, corpus, tmp_path):
    save = str(tmp_path / "save")
    pool.run(train, 1, base_arguments(corpus, save=save, train_iters=3, eval_iters=0))
    argv = base_arguments(
        corpus, save=save, train_iters=4, eval_iters=0, optimizer="muon", lr_decay_style="constant"
    )
    assert (
        "optimizer: checkpoint adam, run muon: the checkpoint's moments are of another optimizer, "
        "and would start at zero. Fix: the checkpoint's value, or --accept-changes optimization."
    ) in refusal(pool, argv)
    before = stored(save)
    assert pool.run(train, 1, [*argv, "--accept-changes", "optimization"]) == ["done"]
    after = stored(save)
    assert sorted(losses(save)) == [1, 2, 3, 4]
    assert float(after["optimizer.final_norm.weight.step"]) == 1
    assert "optimizer.layers.0.mlp.up.weight.exp_avg" not in after
    # One step of Muon from the checkpoint's weights: the update has the size that its scale says.
    name = "model.layers.0.mlp.up.weight"
    moved = (before[name] * (1 - 1e-2 * 0.1) - after[name]) / 1e-2
    assert 0.1 < np.sqrt(np.mean(moved**2)) < 0.3
    # The run that went on is Muon's from now on.
    assert pool.run(train, 1, argv) == ["done"]
