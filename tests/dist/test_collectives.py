"""What travels: the same collectives in the same order on all ranks, the promised bytes, and no leaks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from parallel.layout import World
from parallel.ulysses import HeadSplit, heads_to_seq, seq_to_heads
from pretrain.step import train_step
from tests.dist.parity import Case

# FSDP2 calls the gather and scatter by other names in other releases of torch.
COLLECTIVES = [name for name in ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "all_gather_single",
                                 "reduce_scatter_tensor", "reduce_scatter_single", "broadcast") if hasattr(dist, name)]


class Recorder:
    """Notes every call of torch.distributed's collectives: (operation, its ranks, elements, dtype).

    DTensor's own reductions (partial gradients over tp) and the pipeline's messages go other ways.
    """

    def __init__(self):
        self.calls: list[tuple] = []

    def __enter__(self):
        self.originals = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, original in self.originals.items():
            setattr(dist, name, self.wrap(name, original))
        return self

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def wrap(self, name, original):
        def recorded(*args, **options):
            tensor = args[0] if args else next(iter(options.values()))
            ranks = tuple(dist.get_process_group_ranks(options.get("group") or dist.group.WORLD))
            self.calls.append((name, ranks, tensor.numel(), str(tensor.dtype)))
            return original(*args, **options)
        return recorded


def recorded_step(world: World, case: Case) -> list[tuple]:
    _, _, optimizer, stepper, loader = case.build(world)
    with Recorder() as recorder:
        train_step(stepper, optimizer, loader.read(0), lr=1e-3, clip_grad=1.0)
        stepper.run(loader.read(0), train=False)
    return recorder.calls


def first_difference(calls_by_rank: list[list[tuple]]) -> str | None:
    """Compare, group by group, what each member called; sizes of an uneven exchange may differ."""
    groups = {ranks for calls in calls_by_rank for _, ranks, _, _ in calls}
    for ranks in sorted(groups):
        sequences = {rank: [(name, None if name == "all_to_all_single" else size, dtype)
                            for name, members, size, dtype in calls_by_rank[rank] if members == ranks]
                     for rank in ranks}
        first = sequences[ranks[0]]
        for rank, sequence in sequences.items():
            for step, (ours, theirs) in enumerate(zip(sequence, first)):
                if ours != theirs:
                    return f"group {ranks}: call {step}: rank {rank} does {ours}, rank {ranks[0]} does {theirs}"
            if len(sequence) != len(first):
                return f"group {ranks}: rank {rank} makes {len(sequence)} calls, rank {ranks[0]} makes {len(first)}"
    return None


ORDER_CASES = {
    "tp2 cp2": Case(tp=2, cp=2, model=dict(add_qkv_bias=True, num_query_groups=1)),
    "cp4 uneven heads, empty slices": Case(cp=4, lengths=(1,) * 40 + (200,), model=dict(
        num_attention_heads=6, num_query_groups=2, hidden_size=48)),
    "pp2 dp2 tied": Case(pp=2, dp=2),
    "tp2 cp2 sequence parallel": Case(tp=2, cp=2, sequence_parallel=True),
    "tp2 dp2 zero3 recompute": Case(tp=2, dp=2, strategy="optim_grads_params", recompute="full"),
}


@pytest.mark.parametrize("name", ORDER_CASES)
def test_all_ranks_make_the_same_collectives_in_the_same_order(pool, name):
    case = ORDER_CASES[name]
    calls = pool.run(recorded_step, case.world_size, case)
    assert all(len(part) > 10 for part in calls)
    assert first_difference(calls) is None


def test_a_difference_names_rank_operation_and_step():
    same = [("all_reduce", (0, 1), 4, "torch.float32")] * 3
    other = same[:2] + [("broadcast", (0, 1), 4, "torch.float32")]
    assert "call 2: rank 1 does ('broadcast'" in first_difference([same, other])
    assert "rank 1 makes 2 calls, rank 0 makes 3" in first_difference([same, same[:2]])


def exchange_bytes(world: World, heads: int, kv_heads: int, tokens: int, size: int) -> tuple[int, list]:
    """Elements that this rank sends to others in one forward and one backward, and the calls made."""
    from parallel.config import LayoutConfig
    from parallel.layout import build_layout

    cp = build_layout(LayoutConfig(context_parallel_size=world.size), world).cp
    split = HeadSplit.make(heads, kv_heads, cp.size)
    sent = []
    original = dist.all_to_all_single

    def counting(out, x, receive, send, group=None):
        row = x[0].numel()
        sent.append(sum(rows for rank, rows in enumerate(send) if rank != cp.rank) * row)
        return original(out, x, receive, send, group=group)

    q, k, v = (torch.randn(tokens, n, size, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    dist.all_to_all_single = counting
    try:
        q_m, k_m, v_m = seq_to_heads(q, k, v, split, cp)
        mixed = q_m + torch.cat([k_m + v_m] * q_m.shape[1], dim=1)[:, :q_m.shape[1]]
        heads_to_seq(mixed, split, cp).sum().backward()
    finally:
        dist.all_to_all_single = original
    return cp.rank, sent


@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 4), (8, 1), (6, 2)])
def test_the_exchange_sends_what_the_docstring_says(pool, heads, kv_heads):
    tokens, size, cp = 12, 4, 4
    split, totals = HeadSplit.make(heads, kv_heads, cp), []
    for rank, sent in pool.run(exchange_bytes, cp, heads, kv_heads, tokens, size):
        others = [r for r in range(cp) if r != rank]
        forward_qkv = sum(split.rows(r) for r in others) * tokens * size
        my_queries = split.query[rank][1] - split.query[rank][0]
        forward_out = len(others) * my_queries * tokens * size
        backward_out = sum(split.query[r][1] - split.query[r][0] for r in others) * tokens * size
        backward_qkv = len(others) * split.rows(rank) * tokens * size
        assert sent == [forward_qkv, forward_out, backward_out, backward_qkv], "two exchanges each way, no more bytes"
        totals.append(forward_qkv + forward_out)
    kv_sent = sum(stop - start for start, stop in split.kv)
    assert sum(totals) / cp == (cp - 1) / cp * tokens * size * (2 * heads + 2 * kv_sent), "the docstring's formula"


def logits_of(world: World, case: Case, change: bool) -> np.ndarray:
    """This cp rank's logits of one microbatch; `change` alters one token in the middle of a document."""
    layout, stage, _, _, loader = case.build(world)
    for unit in stage.modules():
        if isinstance(unit, FSDPModule):
            unit.unshard()
    batch = loader.read(0)[0]
    bounds = batch.cu_seqlens.tolist()
    longest = max(range(len(bounds) - 1), key=lambda i: bounds[i + 1] - bounds[i])
    target = (bounds[longest] + bounds[longest + 1]) // 2 - layout.cp.rank * len(batch.tokens)
    if change and 0 <= target < len(batch.tokens):
        batch.tokens[target] = (batch.tokens[target] + 1) % 50
    with torch.no_grad():
        logits = stage.logits(stage.hidden(batch.tokens, batch))
    return logits.numpy(), bounds, longest, layout.cp.rank


@pytest.mark.parametrize("case", [Case(seq_length=128, samples=4), Case(cp=4, seq_length=128, samples=4),
                                  Case(tp=2, cp=2, seq_length=128, samples=4)], ids=["one", "cp4", "tp2 cp2"])
def test_a_token_reaches_its_own_document_only(pool, case):
    before, after = (pool.run(logits_of, case.world_size, case, change) for change in (False, True))
    reached = False
    for (old, bounds, longest, cp_rank), (new, *_) in zip(before, after, strict=True):
        positions = np.arange(len(old)) + cp_rank * len(old)
        inside = (positions >= bounds[longest]) & (positions < bounds[longest + 1])
        assert np.array_equal(old[~inside], new[~inside]), "a document changed that the token is not in"
        reached |= not np.array_equal(old[inside], new[inside])
    assert reached and len(bounds) > 3
