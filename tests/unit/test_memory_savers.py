"""What is computed in pieces, or again, or kept elsewhere: the same numbers, and really less."""

import gc
import itertools
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import pointwise
from model.activation_memory.saved_attention import AttentionTape, KeptCall, free_storage
from model.activation_memory.settings import MemorySettings
from model.attention_backends import sdpa
from model.attention_backends.choice import choose_attention
from model.attention_backends.sdpa import _one_by_one, sdpa_attention
from model.config import ModelConfig
from model.gpt import GPTStage
from model.mlp import gated_mlp
from model.pointwise import rms_norm, rotate
from model.scoring import PLAIN, Scoring
from parallel.collectives import start_all_to_all
from parallel.layout import Axis, single_process_layout
from parallel.ulysses import HeadSplit, chunk_counts, head_rounds

CPU = torch.device("cpu")
LAYOUT = single_process_layout(CPU)


def leaves(*shapes: tuple[int, ...], dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


def assert_same(
    found: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor], tolerance=1e-12
) -> None:
    """Values and gradients, for a random gradient of the result."""
    weight = torch.randn_like(expected)
    pairs = [
        (found, expected),
        *zip(
            torch.autograd.grad(found, inputs, weight),
            torch.autograd.grad(expected, inputs, weight),
            strict=True,
        ),
    ]
    for a, b in pairs:
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("tiles", [1, 3, 4, 50])
def test_swiglu_in_tiles(tiles):
    inputs = leaves((10, 6), (12, 6), (12, 6), (6, 12))
    x, gate, up, down = inputs
    assert_same(gated_mlp(*inputs, tiles), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T, inputs)


def test_tiles_add_their_gradients_in_fp32():
    """In bf16, 64 additions of a part to the sum would lose more than the parts' own rounding."""
    inputs = [
        x.detach().bfloat16().requires_grad_()
        for x in leaves((512, 16), (32, 16), (32, 16), (16, 32))
    ]
    grads = {
        tiles: torch.autograd.grad(gated_mlp(*inputs, tiles).sum(), inputs[1])[0].double()
        for tiles in (1, 64)
    }
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(gated_mlp(*exact, 1).sum(), exact[1])[0]
    errors = {
        tiles: float((grad - expected).norm() / expected.norm()) for tiles, grad in grads.items()
    }
    assert errors[64] < 1.5 * errors[1], errors


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_norm_and_rotation_have_the_gradients_of_their_definitions(dtype, tolerance):
    x, weight, cos, sin = leaves((5, 3, 8), (8,), (5, 4), (5, 4), dtype=dtype)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
    assert_same(rms_norm(x, weight, 1e-5), expected, [x, weight], tolerance)
    cos, sin = (torch.cat([table, table], dim=-1).detach() for table in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    expected = x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    assert_same(rotate(x, cos, sin), expected, [x], tolerance)


def test_a_kept_call_forgets_its_inputs_and_gives_their_gradients():
    q, k, v = leaves((6, 4, 8), (6, 2, 8), (6, 2, 8))

    def call(q, k, v):
        out = torch.einsum("nmh,skh->nms", q, k).softmax(-1) @ v.sum(1)
        return [out[:2] * 1, out[2:] * 1]

    def output(q, k, v):
        return torch.cat(call(q, k, v))

    expected = torch.autograd.grad(output(q, k, v).square().sum(), [q, k, v])
    tape = AttentionTape()
    copies = [x.detach().clone() for x in (q, k, v)]
    out = tape.attend(call, *copies)
    free_storage(*copies)
    assert all(x.untyped_storage().nbytes() == 0 for x in tape.calls[0].inputs)
    tape.play()
    again = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(tape.attend(call, *again).square().sum(), again)
    assert torch.equal(out, output(q, k, v)) and all(
        torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )


def test_a_kept_output_may_be_away_meanwhile():
    q, k, v = leaves((6, 4, 8), (6, 2, 8), (6, 2, 8))
    call = KeptCall(lambda q, k, v: [part * k.sum() * v.sum() for part in q.split(3)], q, k, v)
    copies = [part.clone() for part in call.outputs]
    call.free_outputs()
    assert all(part.untyped_storage().nbytes() == 0 for part in call.outputs)
    call.refill_outputs([copy.clone() for copy in copies])
    assert torch.equal(call.output, torch.cat(copies))


SPLITS = [(32, 8, 8), (32, 8, 1), (32, 32, 4), (32, 8, 4), (32, 4, 8), (16, 1, 2), (16, 4, 2)]


@pytest.mark.parametrize("heads, kv_heads, ranks", SPLITS)
def test_in_chunks_each_rank_attends_with_its_own_heads_and_no_key_travels_twice(
    heads, kv_heads, ranks
):
    split = HeadSplit.make(heads, kv_heads, ranks)
    for chunks in chunk_counts(split)[1:]:
        rounds = head_rounds(split, chunks)
        assert sum(len(each.query_chunks) for each in rounds) == chunks
        for rank in range(ranks):
            queries = []
            keys = []
            for each in rounds:
                k0, k1 = each.kv_split.kv[rank]
                q0, q1 = each.query_split.query[rank]
                keys += each.kv_heads[k0:k1]
                for flat in each.query_chunks:
                    queries += flat[q0:q1]
                    # `attend` pairs query i with key i // (queries / keys).
                    assert [
                        each.kv_heads[k0 + i // ((q1 - q0) // (k1 - k0))] for i in range(q1 - q0)
                    ] == [head // split.group for head in flat[q0:q1]]
            assert queries == list(range(*split.query[rank])) and keys == list(
                range(*split.kv[rank])
            )
        assert max(Counter(head for each in rounds for head in each.kv_heads).values()) == 1


def test_chunk_counts_are_those_that_divide_a_ranks_heads():
    assert chunk_counts(HeadSplit.make(32, 8, 8)) == [1, 2, 4]  # 4 query heads of one group
    assert chunk_counts(HeadSplit.make(32, 8, 1)) == [1, 2, 4, 8, 16, 32]
    assert chunk_counts(HeadSplit.make(6, 2, 4)) == [1]  # uneven
    assert chunk_counts(HeadSplit.make(12, 3, 2)) == [
        1
    ]  # a rank's 6 heads are one group and a half


class Counting(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def one_step(
    settings: MemorySettings, bounds: list[int], *, backward: bool = True, **model
) -> None:
    """Forward and backward of two layers over the documents between the bounds."""
    config = ModelConfig(
        num_layers=2, num_attention_heads=4, **dict(hidden_size=16, ffn_hidden_size=24) | model
    )
    stage = GPTStage(config, 50, LAYOUT, choose_attention("sdpa", CPU, torch.float32)[0]).to_empty(
        device=CPU
    )
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(bounds[-1])
    batch = SimpleNamespace(
        tokens=ids % 50,
        labels=ids % 50,
        positions=ids,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
    )
    stage.memory = settings
    stage.begin_step([batch], len(ids))
    loss = stage(torch.empty(0))
    if backward:
        loss.backward()


PRODUCTS = ("mm", "addmm", "_linear_pointwise")
"""Operators that multiply matrices; the last one is oneDNN's."""


@pytest.mark.parametrize(
    "settings, forwards, products",
    [
        (MemorySettings(), 1, 0),
        (MemorySettings("selective"), 1, 2),
        (MemorySettings("full"), 2, 4),
        (MemorySettings("attention_kept"), 1, 4),
        (MemorySettings("full", attention_head_chunks=2), 2, None),
        (MemorySettings("attention_kept", attention_head_chunks=2), 1, None),
    ],
    ids=str,
)
def test_each_level_computes_again_what_it_says(settings, forwards, products):
    """Attention's forward per layer, and matrix products of a layer that run a second time.

    Never all of q, k and v (one product), o, gate, up and down: neither the MLP's result nor, in
    chunks, the projections of a kept attention are needed again.
    """

    def calls(settings: MemorySettings) -> Counter:
        with Counting() as counting:
            one_step(settings, [0, 12])
        return counting.calls

    found = calls(settings)
    plain = calls(MemorySettings())
    chunks = settings.attention_head_chunks
    layers = 2
    assert found["_scaled_dot_product_flash_attention_for_cpu"] == layers * chunks * forwards
    if products is not None:
        again = sum(found[name] - plain[name] for name in PRODUCTS)
        assert again == layers * products
    assert not found["slice_backward"]  # each would be a copy of q, k or v


@pytest.mark.parametrize(
    "settings, most",
    [
        (MemorySettings("full", mlp_tiles=16, loss_chunk_tokens=512), 13.8),
        (
            MemorySettings("full", mlp_tiles=16, attention_head_chunks=4, loss_chunk_tokens=512),
            10.8,
        ),
    ],
    ids=str,
)
def test_the_peak_of_a_step(settings, most, monkeypatch):
    """In units of all tokens' hidden states: one more that outlives its use, and the step is above
    it."""
    width = 64
    tokens = 16384
    # What a norm widens is small beside all tokens.
    monkeypatch.setattr(pointwise, "BLOCK_ELEMENTS", tokens * width // 4)
    gc.collect()
    with MemTracker() as tracker:
        one_step(settings, list(range(0, tokens + 1, 2048)), hidden_size=width, ffn_hidden_size=128)
    peak = sum(parts["Total"] for parts in tracker.get_tracker_snapshot("peak").values())
    assert peak < most * 4 * tokens * width, peak / (4 * tokens * width)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_norm_in_blocks_of_rows_is_that_of_all(dtype, monkeypatch):
    x, weight, grad = (a.detach().to(dtype) for a in leaves((30, 8), (8,), (30, 8)))
    inputs = (x.requires_grad_(), weight.requires_grad_())
    found = {}
    for block in (1, 7 * 8, 2**20):
        monkeypatch.setattr(pointwise, "BLOCK_ELEMENTS", block)
        out = rms_norm(*inputs, 1e-5)
        found[block] = (out, *torch.autograd.grad(out, inputs, grad))
    wide = [a.detach().double().requires_grad_() for a in inputs]
    expected = F.rms_norm(wide[0], (8,), wide[1], 1e-5)
    exact = (expected, *torch.autograd.grad(expected, wide, grad.double()))
    tolerance = 1e-14 if dtype == torch.float64 else 2**-7
    for results in found.values():
        for one, other in zip(results, exact, strict=True):
            assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("scoring", [PLAIN, Scoring(window=3), Scoring(softcap=0.9)], ids=str)
@pytest.mark.parametrize(
    "bounds", [([0, 12], [0, 12]), ([0, 9], [0, 12]), ([0, 2, 8, 9], [0, 5, 11, 12])]
)
def test_heads_lie_in_memory_as_they_like(bounds, scoring, monkeypatch):
    """Spread or together, copied or not: the same bits, in an output whose tokens lie together."""
    rows_q, rows_k = ([slice(a, b) for a, b in zip(x, x[1:], strict=False)] for x in bounds)
    shapes = ((rows_q[-1].stop, 4, 8), (12, 2, 8), (12, 2, 8))
    spread = [x.detach() for x in leaves(*shapes)]
    together = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in spread]
    found = []
    for inputs, copied_from in itertools.product((spread, together), (1, 512)):
        monkeypatch.setattr(sdpa, "SPREAD_TOKENS", copied_from)
        given = [x.clone().requires_grad_() for x in inputs]
        out = sdpa_attention(*given, rows_q, rows_k, scoring)
        assert out.is_contiguous()
        found.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gradients_of_the_gate_leave_what_is_kept_unchanged(activation):
    """Backward may come twice, and reads gate and up again."""
    inputs = leaves((10, 6), (12, 6), (12, 6), (6, 12))
    out = gated_mlp(*inputs, 1, activation)
    first, second = (
        torch.autograd.grad(out.square().sum(), inputs, retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_documents_one_by_one_are_those_together():
    """What runs on a GPU without a better kernel."""
    inputs = leaves((9, 4, 8), (12, 2, 8), (12, 2, 8))
    rows_q, rows_k = (
        [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        for bounds in ([0, 2, 8, 9], [0, 5, 11, 12])
    )
    found, expected = (attend(*inputs, rows_q, rows_k) for attend in (_one_by_one, sdpa_attention))
    with Counting() as counting:
        assert_same(found, expected, inputs)
    assert not counting.calls["slice_backward"]
    alone = [x.detach()[:5] for x in inputs]
    assert torch.allclose(
        _one_by_one(*alone, [slice(0, 5)], [slice(0, 5)]),
        sdpa_attention(*alone, [slice(0, 5)], [slice(0, 5)]),
    )


def test_who_waited_for_an_exchange_does_not_hold_what_was_sent(monkeypatch):
    def all_to_all_single(out, x, *_, **__):
        out.copy_(x)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)
    sent = torch.arange(4.0)
    alive = weakref.ref(sent)
    finish = start_all_to_all(sent, [2, 2], [2, 2], Axis("cp", 0, 2, (0, 1), None))
    del sent
    assert alive() is not None  # until the exchange is over
    assert torch.equal(finish(), torch.arange(4.0)) and alive() is None
