"""What a plan says of groups and bytes, against what the processes of a layout really do."""

from dataclasses import replace
from unittest import mock

import pytest

from model.activation_memory.settings import MemorySettings
from parallel.layout import World
from pretrain.muon.owners import make_buckets
from pretrain.planner import muon_cost
from pretrain.planner.hardware import TABLE
from pretrain.planner.model_size import ModelSize
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.traffic import Traffic, step_traffic
from pretrain.planner.workload import Workload
from pretrain.step import train_step
from tests.dist.parity import VOCABULARY, Case, Recorder
from tests.marks import cases
from tools.planning.axes import groups_of_layout

FP64_BYTES = 8
NAMES = ("tp", "cp", "cp_a2a", "cp_gather", "dp", "dp_cp", "pp")
CASES = {
    "tp2 dp2": Case(tp=2, dp=2),
    "tp2 dp2 sequence parallel": Case(tp=2, dp=2, sequence_parallel=True),
    "tp2 cp2": Case(tp=2, cp=2),
    "tp2 dp2 norms after the MLP": Case(
        tp=2, dp=2, model=dict(norm_placement="both"), memory=MemorySettings("selective")
    ),
    "tp2 cp2 sequence parallel norms after the MLP": Case(
        tp=2,
        cp=2,
        sequence_parallel=True,
        model=dict(norm_placement="post"),
        memory=MemorySettings("full"),
    ),
    "pp2 dp2": Case(pp=2, dp=2),
    "cp4 two levels": Case(cp=4, context_levels=(2, 2)),
    "tp2 dp2 zero3": Case(tp=2, dp=2, strategy="optim_grads_params"),
}


MUON = dict(optimizer="muon")
MUON_CASES = {
    "tp2 dp2": Case(tp=2, dp=2, optimizer=MUON),
    "dp4 uneven": Case(dp=4, model=dict(ffn_hidden_size=46), optimizer=MUON),
    "pp2 dp2": Case(pp=2, dp=2, model=dict(num_layers=4), optimizer=MUON),
}
SMALL_BUCKET = 2_000
"""Elements of a bucket: a matrix or two."""


def recorded(world: World, case: Case) -> tuple[dict[str, tuple[int, ...]], list]:
    """(the ranks of each axis, the collectives of one step) of this process."""
    layout, _, optimizer, stepper, loader = case.build(world)
    with Recorder() as recorder:
        train_step(stepper, optimizer, loader.read(0), lr=1e-3, clip_grad=1.0)
    ranks = {name: getattr(layout, name).ranks for name in NAMES}
    if layout.cp_gather.size > 1:
        ranks.pop("cp")
    else:
        ranks.pop("cp_a2a")
    return {name: group for name, group in ranks.items() if len(group) > 1}, recorder.calls


def planned(
    case: Case, muon: muon_cost.MuonCost | None = None
) -> dict[tuple[str, str], Traffic]:
    """What the plan says, by axis and operation or purpose."""
    model = MemoryModel(
        case.model_config(),
        VOCABULARY,
        master_bytes=FP64_BYTES,
        compute_bytes=FP64_BYTES,
        muon=muon,
    )
    count = case.samples // case.dp // case.micro_batch_size
    load = Workload(case.layout_config(), case.dp, case.seq_length, 1, count, case.memory)
    return {(each.axis, each.what): each for each in step_traffic(model, load, TABLE["H100"])}


def recorded_exchanges(world: World, case: Case) -> list:
    """The all-to-alls of one step over all ranks of this process's stage."""

    def small(matrices, owners, ranks) -> list[list[list[int]]]:
        return make_buckets(matrices, owners, ranks, SMALL_BUCKET)

    with mock.patch("pretrain.muon.muon.make_buckets", small):
        layout, _, optimizer, stepper, loader = case.build(world)
    with Recorder() as recorder:
        train_step(stepper, optimizer, loader.read(0), lr=1e-3, clip_grad=1.0)
    return [
        call
        for call in recorder.calls
        if call.operation.startswith("alltoall") and call.ranks == layout.dp_cp_tp.ranks
    ]


@pytest.mark.parametrize("name", MUON_CASES)
def test_the_plan_counts_the_matrices_that_muon_exchanges(pool, name):
    case = MUON_CASES[name]
    results = pool.run(recorded_exchanges, case.world_size, case)
    with mock.patch.object(muon_cost, "BUCKET_ELEMENTS", SMALL_BUCKET):
        cost = muon_cost.MuonCost(ModelSize(case.model_config(), VOCABULARY), FP64_BYTES, 5)
        plan = planned(case, cost)
    there = plan["dp_cp_tp", "matrices to their owners"]
    back = plan["dp_cp_tp", "updates from the owners"]
    (first, *_) = results
    assert len(first) == there.calls + back.calls and there.calls >= 3
    layers = case.model_config().num_layers // case.pp
    owners = cost.owners(layers, case.tp, case.dp)
    stage = case.tp * case.dp
    sent = [sum(call.sent_bytes for call in calls) for calls in results]
    for rank, size in enumerate(sent):
        assert size == FP64_BYTES * owners.sent_by(rank % stage), f"rank {rank}"
    assert max(sent) == there.sent_bytes + back.sent_bytes
    # On the way there a rank sends each owner its piece, on the way back it gets one of each.
    most = sorted(max(call.sent_parts + call.received_parts) for call in first)
    assert most == sorted(2 * owners.fullest)


def elements(calls: list, operation: str, ranks: tuple[int, ...]) -> list[int]:
    """The elements of the first tensor of each such call."""
    return [
        call.elements or 0
        for call in calls
        if call.operation.startswith(operation) and call.ranks == ranks
    ]


@pytest.mark.parametrize(
    "name",
    cases(
        CASES,
        lambda name: (
            name in ("tp2 dp2", "pp2 dp2", "cp4 two levels") or name.endswith("after the MLP")
        ),
    ),
)
def test_the_plan_counts_what_the_processes_send(pool, name):
    case = CASES[name]
    results = pool.run(recorded, case.world_size, case)
    groups = {
        each.name: each.groups for each in groups_of_layout(case.layout_config(), case.world_size)
    }
    for rank, (axes, _) in enumerate(results):
        ours = {
            axis: next(group for group in found if rank in group) for axis, found in groups.items()
        }
        assert ours == axes, f"rank {rank}"
    axes, calls = results[0]
    plan = planned(case)
    assert {axis for axis, _ in plan} == set(axes) - {"dp"}
    if "tp" in axes:
        check_tensor(case, calls, axes["tp"], plan)
    if case.cp > 1:
        check_context(calls, axes, plan)
    if "pp" in axes:
        check_pipeline(case, calls, plan)
    check_sharding(case, calls, axes["dp_cp"], plan)


@pytest.mark.parametrize("name", ["cp2", pytest.param("cp4 two levels", marks=pytest.mark.long)])
def test_a_window_changes_nothing_that_is_sent(pool, name):
    plain = CASES[name] if name in CASES else Case(cp=2)
    windowed = replace(plain, model=dict(window_size=[2, 0]))
    expected = pool.run(recorded, plain.world_size, plain)
    found = pool.run(recorded, windowed.world_size, windowed)
    for (_, calls), (_, calls_of_plain) in zip(found, expected, strict=True):
        assert any(call.operation.startswith("alltoall") for call in calls)
        assert calls == calls_of_plain


def check_tensor(case: Case, calls, ranks, plan) -> None:
    """Sums of whole activations, or gathers and scatters."""
    traffic = plan["tp", "activations between the parts of a layer, and at both ends of the model"]
    size = case.seq_length // case.cp * case.model_config().hidden_size
    each_sends = 2 * (case.tp - 1) / case.tp * size * FP64_BYTES
    assert traffic.sent_bytes == traffic.calls * each_sends
    if case.sequence_parallel:
        gathers = elements(calls, "_allgather_base_", ranks).count(size)
        scatters = elements(calls, "_reduce_scatter_base_", ranks).count(size // case.tp)
        assert gathers + scatters == 2 * traffic.calls
    else:
        sums = elements(calls, "allreduce_", ranks).count(size)
        assert sums == traffic.calls


def check_context(calls, axes, plan) -> None:
    axis = "cp" if "cp" in axes else "cp_a2a"
    exchanges = elements(calls, "alltoall", axes[axis])
    to_heads = plan[axis, "q, k, v to heads"]
    to_tokens = plan[axis, "attention's output to tokens"]
    assert len(exchanges) == to_heads.calls + to_tokens.calls
    if "cp_gather" not in axes:
        return
    ranks = axes["cp_gather"]
    others = len(ranks) - 1
    gathered = elements(calls, "_allgather_base_", ranks)
    scattered = elements(calls, "_reduce_scatter_base_", ranks)
    sent = sum(gathered) * others / len(ranks) + sum(scattered) * others
    traffic = plan["cp_gather", "keys and values of the other groups"]
    assert traffic.calls == len(gathered) + len(scattered)
    assert traffic.sent_bytes == sent * FP64_BYTES


def check_pipeline(case: Case, calls, plan) -> None:
    """Rank 0 has one neighbour: what it sends and gets is what a rank between two sends."""
    traffic = plan["pp", "activations and their gradients between stages"]
    messages = [call.elements for call in calls if call.operation in ("send", "recv_")]
    activations = case.seq_length * case.model_config().hidden_size
    sizes = [size for size in messages if size == activations]
    assert len(sizes) == traffic.calls
    assert sum(sizes) * FP64_BYTES == traffic.sent_bytes


def check_sharding(case: Case, calls, ranks, plan) -> None:
    others = len(ranks) - 1
    reduced = sum(elements(calls, "_reduce_scatter_base_", ranks)) * others * FP64_BYTES
    assert plan["dp_cp", "gradients"].sent_bytes == pytest.approx(reduced, rel=0.01)
    gathered = sum(elements(calls, "_allgather_base_", ranks)) * others / len(ranks) * FP64_BYTES
    assert plan["dp_cp", "parameters"].sent_bytes == pytest.approx(gathered, rel=0.01)
