"""A plan's verification: the code of some ranks on device meta, and faults that it must see."""

import dataclasses
from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed.tensor._collective_utils import MeshTopoInfo
from torch.distributed.tensor._redistribute import (
    _gen_transform_infos,
    clear_redistribute_planner_cache,
)
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from parallel.config import LayoutConfig
from pretrain.config.load import load_config
from pretrain.planner.hardware import TABLE
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.workload import Workload
from pretrain.schedule.resolve import resolve_phases
from tools.plan_verify import rehearsal
from tools.plan_verify.checks import (
    check_bytes,
    check_device,
    check_groups,
    check_memory,
    check_order,
    expected_axes,
)
from tools.plan_verify.rehearsal import RankJob, RankTrace, rehearse
from tools.plan_verify.sample import Sizes, rehearsed_part, sampled_ranks

VOCABULARY = 32000
WORLD = 16
FLAGS = (
    "--model 1b --num-layers 4 --mock-data --bf16 --micro-batch-size 1 --lr 1e-3 --train-iters 2 "
    "--seq-length 128Ki --global-batch-tokens 384Ki --tensor-model-parallel-size 2 "
    "--pipeline-model-parallel-size 2 --context-parallel-size 4 --sequence-parallel "
    "--recompute-granularity full --mlp-tiles 2"
).split()
FAULTY_RANK = 5
RANKS = (0, 1, FAULTY_RANK, 8)
"""0 and 1 share a group of tp, 1 and 5 one of cp, 0 and 8 one of pp."""


def make_jobs(*words: str) -> list[RankJob]:
    config = load_config([*FLAGS, "--vocab-size", str(VOCABULARY), *words])
    (phase,) = resolve_phases(config)
    part = rehearsed_part(config, phase, WORLD)
    return [
        RankJob(part.config, phase, VOCABULARY, WORLD, rank, part.num_microbatches)
        for rank in RANKS
    ]


def rehearse_here(job: RankJob) -> RankTrace:
    """Rehearse in this process; DTensor must forget the meshes of the world that ended."""
    try:
        return rehearse(job)
    finally:
        _clear_sharding_prop_cache()
        _gen_transform_infos.cache_clear()
        MeshTopoInfo.build_from_mesh.cache_clear()
        clear_redistribute_planner_cache()


@pytest.fixture(scope="module")
def jobs() -> list[RankJob]:
    return make_jobs()


@pytest.fixture(scope="module")
def traces(jobs) -> list[RankTrace]:
    return [rehearse_here(job) for job in jobs]


def with_fault(traces: list[RankTrace], faulty: RankTrace) -> list[RankTrace]:
    return [faulty if trace.rank == faulty.rank else trace for trace in traces]


def memory_of(job: RankJob) -> tuple[MemoryModel, Workload]:
    load = Workload.of_phase(job.phase, WORLD)
    model = MemoryModel.of_run(job.config, VOCABULARY, TABLE["H100"], with_kernels=False)
    return model, dataclasses.replace(load, num_microbatches=job.num_microbatches)


def test_a_right_plan_has_no_problems(jobs, traces):
    model, load = memory_of(jobs[0])
    layout = jobs[0].phase.layout
    assert check_groups(traces, layout, WORLD)[1] == []
    assert check_order(traces)[1] == []
    sent, problems = check_bytes(traces, model, load, TABLE["H100"])
    assert problems == [], sent
    result, problems, _ = check_memory(traces, model, load)
    assert problems == [], result
    assert {"tp", "cp", "pp", "dp_cp"} <= traces[0].sent_bytes.keys(), traces[0].sent_bytes
    assert min(len(trace.calls) for trace in traces) > 50


def test_what_muon_exchanges_is_compared_by_the_matrices_that_each_rank_owns():
    jobs = [job for job in make_jobs("--optimizer", "muon") if job.rank in (1, FAULTY_RANK)]
    traces = [rehearse_here(job) for job in jobs]
    model, load = memory_of(jobs[0])
    sent, problems = check_bytes(traces, model, load, TABLE["H100"])
    assert problems == [] and "dp_cp_tp 1.000" in sent, sent
    # In fp32 as many elements are twice the bytes.
    assert model.muon is not None
    model.muon.element_bytes *= 2
    (problem,) = check_bytes(traces, model, load, TABLE["H100"])[1]
    assert "dp_cp_tp: expected" in problem


def test_a_shifted_context_parallel_group_is_found(jobs, traces):
    original = dist.new_group

    def shifted(ranks=None, *args, **options):
        name = options.get("group_desc")
        if ranks is not None and FAULTY_RANK in ranks and name == "CONTEXT_PARALLEL_GROUP":
            ranks = list(range(FAULTY_RANK, FAULTY_RANK + len(ranks)))
        return original(ranks, *args, **options)

    job = next(job for job in jobs if job.rank == FAULTY_RANK)
    with mock.patch.object(dist, "new_group", shifted):
        faulty = rehearse_here(job)
    problems = check_groups(with_fault(traces, faulty), job.phase.layout, WORLD)[1]
    expected = f"rank {FAULTY_RANK}: cp: expected ranks (1, 3, 5, 7), found (5, 6, 7, 8)"
    assert expected in problems


def test_another_order_of_collectives_on_one_rank_is_found(jobs, traces):
    """One rank sums the gradients' norm before it has reduced what others reduce first."""
    original = rehearsal.queue_step

    def reordered(stepper, *args):
        dist.all_reduce(args[1][0].labels.clone(), group=stepper.layout.dp_cp.group)
        return original(stepper, *args)

    job = next(job for job in jobs if job.rank == FAULTY_RANK)
    with mock.patch.object(rehearsal, "queue_step", reordered):
        faulty = rehearse_here(job)
    (problem,) = check_order(with_fault(traces, faulty))[1]
    assert f"rank {FAULTY_RANK} makes allreduce_ of 32768 x int64" in problem


def test_a_device_that_is_too_small_is_found(jobs, traces):
    model, load = memory_of(jobs[0])
    fullest = max(model.estimate_rank(load, trace.pp_rank).total for trace in traces)
    assert check_device(traces, model, load, 1.0, fullest)[1] == []
    (problem,) = check_device(traces, model, load, 1.0, fullest - 1)[1]
    assert "out of memory: expected at most" in problem
    assert check_device(traces, model, load, 1.05, fullest)[1], "the tensors were more"


@pytest.mark.parametrize("rank", [0, 5, 77, 1023])
def test_the_expected_ranks_of_an_axis_are_those_that_differ_in_its_place_alone(rank):
    layout = LayoutConfig(
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=4,
        context_parallel_size=8,
        cp_comm_type="a2a+allgather",
        hierarchical_context_parallel_sizes=[2, 4],
    )
    sizes = Sizes.of_layout(layout, 1024)
    own = sizes.places(rank)
    for number, name in enumerate(("tp", "cp", "dp", "pp")):
        found = [
            other
            for other in range(1024)
            if all(
                place == own[axis] or axis == number
                for axis, place in enumerate(sizes.places(other))
            )
        ]
        assert expected_axes(layout, 1024, rank)[name] == tuple(found)


def test_the_sample_holds_both_ends_of_every_axis():
    layout = LayoutConfig(
        tensor_model_parallel_size=8, pipeline_model_parallel_size=8, context_parallel_size=4
    )
    sizes = Sizes.of_layout(layout, 1024)
    places = list(zip(*map(sizes.places, sampled_ranks(layout, 1024)), strict=True))
    for size, found in zip((sizes.tp, sizes.cp, sizes.dp), places[:3], strict=True):
        assert {0, size // 2, size - 1} <= set(found)
    assert {0, 1, 6, 7} <= set(places[3])


def test_what_is_left_out_is_said(jobs):
    config = load_config([*FLAGS, "--vocab-size", "100", "--global-batch-tokens", "4Mi"])
    (phase,) = resolve_phases(config)
    part = rehearsed_part(config, phase, WORLD)
    assert part.num_microbatches == 4
    assert part.note == "4 of 32 microbatches"


SMALL = (
    "--model tiny --mock-data --lr 1e-3 --train-iters 2 --seq-length 512 --num-layers 4 "
    "--micro-batch-size 1 --vocab-size"
).split()
SMALL_RUNS = {
    "one microbatch of many weights": ("16384 --bf16 --hidden-size 512 --global-batch-size 2", 2),
    "two microbatches of many weights": ("16384 --bf16 --hidden-size 256 --global-batch-size 2", 1),
    "one microbatch in fp32": ("4096 --hidden-size 256 --global-batch-size 1", 1),
    "two microbatches over two stages": (
        "4096 --hidden-size 256 --pipeline-model-parallel-size 2 --global-batch-size 2",
        2,
    ),
}


@pytest.mark.parametrize("name", SMALL_RUNS)
def test_the_formula_holds_where_weights_need_more_than_activations(name):
    flags, world_size = SMALL_RUNS[name]
    config = load_config([*SMALL, *flags.split(), "--ffn-hidden-size", "512"])
    (phase,) = resolve_phases(config)
    vocabulary = config.data.vocab_size
    load = Workload.of_phase(phase, world_size)
    job = RankJob(config, phase, vocabulary, world_size, 0, load.num_microbatches)
    trace = rehearse_here(job)
    model = MemoryModel.of_run(config, vocabulary, TABLE["H100"], with_kernels=False)
    memory = model.estimate_rank(load, 0)
    # Before the step there is nothing but the shards of parameters and of both moments.
    assert trace.state_bytes == memory.parameters + memory.optimizer
    assert memory.total == pytest.approx(trace.peak_bytes, rel=0.1)
