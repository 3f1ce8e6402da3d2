"""What travels: the same collectives in the same order on all ranks, the promised bytes, and no
leaks."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from model.activation_memory.settings import MemorySettings
from parallel.config import LayoutConfig
from parallel.context import gather_keys
from parallel.layout import World, build_layout
from parallel.ulysses import HeadSplit, heads_to_seq, seq_to_heads
from pretrain.step import train_step
from tests.dist.leaks import probe
from tests.dist.parity import Case
from tools.plan_verify.recorder import Call, Recorder, first_difference
from tests.marks import cases
from tests.mutations.mutations import MUTATIONS


def recorded_step(world: World, case: Case) -> list[Call]:
    _, _, optimizer, stepper, loader = case.build(world)
    with Recorder() as recorder:
        for recorder.step in range(2):
            train_step(stepper, optimizer, loader.read(0), lr=1e-3, clip_grad=1.0)
        stepper.run(loader.read(0), train=False)
    return recorder.calls


ORDER_CASES = {
    "tp2 cp2": Case(tp=2, cp=2, model=dict(add_qkv_bias=True, num_query_groups=1)),
    "cp4 uneven heads, empty slices": Case(
        cp=4,
        lengths=(1,) * 40 + (200,),
        model=dict(num_attention_heads=6, num_query_groups=2, hidden_size=48),
    ),
    "pp2 dp2 tied": Case(pp=2, dp=2),
    "pp2 cp2 ZBV tied": Case(pp=2, cp=2, schedule="ZBV", model=dict(num_layers=4)),
    "pp2 tp2 interleaved": Case(
        pp=2, tp=2, schedule="interleaved", model=dict(num_layers=4, qk_layernorm=True)
    ),
    "tp2 cp2 sequence parallel": Case(tp=2, cp=2, sequence_parallel=True),
    "cp2 dp2 head chunks attention kept": Case(
        cp=2, dp=2, memory=MemorySettings("attention_kept", 0, 2, 2, 5)
    ),
    "tp2 dp2 zero3 recompute": Case(
        tp=2, dp=2, strategy="optim_grads_params", memory=MemorySettings("full")
    ),
    "cp4 two levels": Case(cp=4, context_levels=(2, 2)),
}


@pytest.mark.parametrize(
    "name",
    cases(
        ORDER_CASES,
        lambda name: (
            name in ("tp2 cp2", "pp2 cp2 ZBV tied", "tp2 dp2 zero3 recompute", "cp4 two levels")
        ),
    ),
)
def test_all_ranks_make_the_same_collectives_in_the_same_order(pool, name):
    case = ORDER_CASES[name]
    calls = pool.run(recorded_step, case.world_size, case)
    assert all(len(part) > 10 for part in calls)
    assert first_difference(calls) is None


@pytest.mark.long
def test_the_recorder_sees_every_library(pool):
    """FSDP2, DTensor's partial gradients, the pipeline's messages and our own exchanges."""
    case = Case(tp=2, pp=2, cp=2, model=dict(qk_layernorm=True))
    for calls in pool.run(recorded_step, 8, case):
        seen = {call.operation for call in calls}
        assert {
            "_allgather_base_",
            "_reduce_scatter_base_",
            "alltoall_base_",
            "allreduce_",
            "all_reduce",
        } <= seen
        assert {"send", "recv_"} & seen


def test_a_difference_names_rank_operation_and_step():
    call = Call("allreduce_", "0", (0, 1), 4, "float32", step=7)
    other = dataclasses.replace(call, operation="broadcast_")
    found = first_difference([[call] * 3, [call, call, other]])
    assert (
        "call 2: rank 0 makes allreduce_ of 4 x float32 in step 7, rank 1 makes broadcast_ of 4"
        in found
    )
    assert "call 2: rank 0 makes allreduce_ of 4" in first_difference([[call] * 3, [call] * 2])
    assert "rank 1 makes no more calls" in first_difference([[call] * 3, [call] * 2])
    second = dataclasses.replace(call, group="1")
    assert first_difference([[call, second], [second, call]]), (
        "an order over two groups that share ranks"
    )
    sent = dataclasses.replace(call, operation="send", peer=1)
    received = dataclasses.replace(call, operation="recv_", peer=0)
    assert first_difference([[sent], [received]]) is None
    assert "rank 1 makes no more calls" in first_difference([[sent, sent], [received]])
    assert first_difference([[sent], [dataclasses.replace(received, elements=5)]])


def exchange_bytes(
    world: World, heads: int, kv_heads: int, tokens: int, size: int
) -> tuple[int, list]:
    """Elements that this rank sends to others in one forward and one backward, and the calls
    made."""
    cp = build_layout(LayoutConfig(context_parallel_size=world.size), world).cp
    split = HeadSplit.make(heads, kv_heads, cp.size)
    sent = []
    original = dist.all_to_all_single

    def counting(out, x, receive, send, **options):
        row = x[0].numel()
        sent.append(sum(rows for rank, rows in enumerate(send) if rank != cp.rank) * row)
        return original(out, x, receive, send, **options)

    q, k, v = (
        torch.randn(tokens, n, size, requires_grad=True) for n in (heads, kv_heads, kv_heads)
    )
    dist.all_to_all_single = counting
    try:
        q_m, k_m, v_m = seq_to_heads(q, k, v, split, cp)
        mixed = q_m + torch.cat([k_m + v_m] * q_m.shape[1], dim=1)[:, : q_m.shape[1]]
        heads_to_seq(mixed, split, cp).sum().backward()
    finally:
        dist.all_to_all_single = original
    return cp.rank, sent


@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 4), (8, 1), (6, 2)])
def test_the_exchange_sends_what_the_docstring_says(pool, heads, kv_heads):
    tokens = 12
    size = 4
    cp = 4
    split = HeadSplit.make(heads, kv_heads, cp)
    totals = []
    for rank, sent in pool.run(exchange_bytes, cp, heads, kv_heads, tokens, size):
        others = [r for r in range(cp) if r != rank]
        forward_qkv = sum(split.rows(r) for r in others) * tokens * size
        my_queries = split.query[rank][1] - split.query[rank][0]
        forward_out = len(others) * my_queries * tokens * size
        backward_out = sum(split.query[r][1] - split.query[r][0] for r in others) * tokens * size
        backward_qkv = len(others) * split.rows(rank) * tokens * size
        assert sent == [forward_qkv, forward_out, backward_out, backward_qkv], (
            "two exchanges each way, no more bytes"
        )
        totals.append(forward_qkv + forward_out)
    kv_sent = sum(stop - start for start, stop in split.kv)
    assert sum(totals) / cp == (cp - 1) / cp * tokens * size * (2 * heads + 2 * kv_sent), (
        "the docstring's formula"
    )


def gathered_bytes(world: World, tokens: int, kv_heads: int, size: int) -> list[Call]:
    """The collectives of one forward and backward of the outer level."""
    layout = build_layout(
        LayoutConfig(
            context_parallel_size=4,
            cp_comm_type="a2a+allgather",
            hierarchical_context_parallel_sizes=[2, 2],
        ),
        world,
    )
    k, v = (torch.randn(tokens, kv_heads, size, requires_grad=True) for _ in range(2))
    with Recorder() as recorder:
        sum(x.sum() for x in gather_keys(k, v, layout.cp_gather)).backward()
    return recorder.calls


def test_keys_and_values_are_gathered_in_one_collective_each_way(pool):
    tokens = 12
    kv_heads = 3
    size = 4
    groups = 2
    for calls in pool.run(gathered_bytes, 4, tokens, kv_heads, size):
        assert [call.operation for call in calls] == ["_allgather_base_", "_reduce_scatter_base_"]
        # The first tensor of each call is its output: all tokens' keys and values, then the own
        # tokens' gradients.
        assert [call.elements for call in calls] == [
            groups * tokens * 2 * kv_heads * size,
            tokens * 2 * kv_heads * size,
        ]


def run_probe(world: World, case: Case) -> tuple[list[str], bool]:
    layout, _, _, stepper, loader = case.build(world)
    return probe(stepper, layout, loader)


def run_mutated_probe(world: World, case: Case, name: str) -> tuple[list[str], bool]:
    with MUTATIONS[name].applied():
        return run_probe(world, case)


LEAK_CASES = {
    "one": Case(seq_length=128, samples=4),
    "cp4": Case(cp=4, seq_length=128, samples=4),
    "tp2 cp2": Case(tp=2, cp=2, seq_length=128, samples=4),
    "cp4 two levels": Case(cp=4, context_levels=(2, 2), seq_length=128, samples=4),
    "cp8 two heads": Case(
        cp=8,
        context_levels=(2, 4),
        seq_length=128,
        samples=4,
        model=dict(num_attention_heads=2, num_query_groups=2),
    ),
    "pp2 cp2 ZBV": Case(
        pp=2, cp=2, schedule="ZBV", seq_length=128, samples=4, model=dict(num_layers=4)
    ),
}


@pytest.mark.parametrize("name", cases(LEAK_CASES, lambda name: name in ("cp4", "cp8 two heads")))
def test_a_token_reaches_later_tokens_of_its_own_document_only(pool, name):
    case = LEAK_CASES[name]
    results = pool.run(run_probe, case.world_size, case)
    assert [problems for problems, _ in results] == [[]] * case.world_size
    assert any(reached for _, reached in results)


def test_the_probe_notices_attention_across_documents(pool):
    case = LEAK_CASES["cp4"]
    results = pool.run(
        run_mutated_probe,
        4,
        case,
        "attention kernel without the documents' boundaries (axolotl#3608)",
    )
    assert any(problems for problems, _ in results)
