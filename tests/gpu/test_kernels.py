"""Attention backends on a GPU: against the definition, for queries that continue a document, and
for leaks."""

import pytest
import torch

from model.attention_backends.choice import BACKENDS, choose_attention
from model.attention_backends.documents import pack_documents
from model.attention_backends.kernel_calls import NEVER, split_documents
from model.attention_logits import largest_logits
from model.scoring import NO_NEEDS, Scoring, ScoringNeeds
from parallel.context import group_pieces
from tests.unit.test_model import masked_attention

pytestmark = pytest.mark.gpu
BOUNDS = [0, 1, 7, 128, 512, 513, 1024]
HEADS = 8
HEAD_SIZE = 64


CALLS = [
    pytest.param(name, crossover, id=name if name != "mixed" else f"mixed from {crossover}")
    for name in BACKENDS
    for crossover in ((1, 128, NEVER) if name == "mixed" else (NEVER,))
]
"""(backend, tokens from which on `mixed` gives a document to cuDNN)."""


def backend(name: str, crossover: int, *, needs: ScoringNeeds = NO_NEEDS):
    """The backend in bf16 on the GPU, or a skip that says what is missing."""
    device = torch.device("cuda")
    missing = BACKENDS[name].missing(
        device, torch.bfloat16, heads=(HEADS, HEADS, HEAD_SIZE), needs=needs
    )
    if missing:
        pytest.skip(missing)
    return choose_attention(name, device, torch.bfloat16, crossover=crossover)[0]


def inputs(kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(BOUNDS[-1], heads, HEAD_SIZE, generator=generator)
        .to("cuda", torch.bfloat16)
        .requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    ]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("name, crossover", CALLS)
def test_backend_equals_the_definition(name, crossover, kv_heads, groups):
    """Output and gradients, also where a document has more keys than queries; bf16 rounds to about
    0.4 %."""
    attend = backend(name, crossover)
    qkv = inputs(kv_heads)
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    expected = masked_attention(*exact, cu_seqlens.cuda())
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), exact)
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in qkv]
    for group in range(groups):
        pieces = group_pieces(BOUNDS[-1], group, groups)
        rows = torch.cat([torch.arange(a, b) for a, b in pieces]).cuda()
        q = qkv[0][rows]
        found = torch.cat(
            [
                attend(q[part.queries], qkv[1][part.keys], qkv[2][part.keys], part)
                for part in pack_documents(cu_seqlens, pieces, qkv[0].device)
            ]
        )
        assert relative(found, expected[rows]) < 0.01
        for total, grad in zip(
            grads, torch.autograd.grad((found.float() * weight[rows]).sum(), qkv), strict=True
        ):
            total += grad
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert relative(grad, wanted) < 0.02


WAYS = {
    "window of 1": (Scoring(1), False),
    "window of 64": (Scoring(64), False),
    "window of 300": (Scoring(300), False),
    "scale": (Scoring(scale=0.2), False),
    "scale, window": (Scoring(64, 0.2), False),
    "cap": (Scoring(softcap=1.5), False),
    "cap, window": (Scoring(64, 0.2, 1.5), False),
    "sinks": (Scoring(), True),
    "sinks, window": (Scoring(64, 0.2), True),
    "sinks, cap, window": (Scoring(300, 0.2, 1.5), True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name, crossover", CALLS)
def test_scores_are_those_of_the_cpu(name, crossover, way):
    """Output and all gradients, against a CPU in fp64."""
    scoring, with_sinks = WAYS[way]
    needs = ScoringNeeds(
        windows=scoring.window is not None, softcap=scoring.softcap is not None, sinks=with_sinks
    )
    attend = backend(name, crossover, needs=needs)
    leaves = inputs(2)
    if with_sinks:
        sinks = torch.linspace(-1, 2, HEADS, device="cuda", dtype=torch.bfloat16)
        leaves.append(sinks.requires_grad_())
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    pieces = [(0, BOUNDS[-1])]
    (here,) = pack_documents(cu_seqlens, pieces, leaves[0].device)
    (on_cpu,) = pack_documents(cu_seqlens, pieces, torch.device("cpu"))
    reference, _ = choose_attention("sdpa", torch.device("cpu"), torch.float64)
    expected = reference(*exact[:3], on_cpu, scoring, *exact[3:])
    found = attend(*leaves[:3], here, scoring, *leaves[3:])
    weight = torch.randn_like(expected)
    assert relative(found.cpu(), expected) < 0.01
    ours = torch.autograd.grad(found, leaves, weight.cuda().to(found.dtype))
    theirs = torch.autograd.grad(expected, exact, weight)
    for grad, wanted in zip(ours, theirs, strict=True):
        assert relative(grad.cpu(), wanted) < 0.02


@pytest.mark.parametrize("kv_heads", [2, HEADS])
@pytest.mark.parametrize("window", [64, 265])
def test_windows_of_sdpa_are_those_of_the_cpu(window, kv_heads):
    """With a key head for each query head torch takes another kernel; 265 aligns a mask's rows."""
    attend = backend("sdpa", NEVER, needs=ScoringNeeds(windows=True))
    leaves = inputs(kv_heads)
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    pieces = [(0, BOUNDS[-1])]
    (here,) = pack_documents(cu_seqlens, pieces, leaves[0].device)
    (on_cpu,) = pack_documents(cu_seqlens, pieces, torch.device("cpu"))
    reference, _ = choose_attention("sdpa", torch.device("cpu"), torch.float64)
    expected = reference(*exact, on_cpu, Scoring(window))
    found = attend(*leaves, here, Scoring(window))
    weight = torch.randn_like(expected)
    assert relative(found.cpu(), expected) < 0.01
    ours = torch.autograd.grad(found, leaves, weight.cuda().to(found.dtype))
    theirs = torch.autograd.grad(expected, exact, weight)
    for grad, wanted in zip(ours, theirs, strict=True):
        assert relative(grad.cpu(), wanted) < 0.02


@pytest.mark.parametrize("name, crossover", CALLS)
def test_backend_keeps_documents_apart_bit_for_bit(name, crossover):
    attend = backend(name, crossover)
    q, k, v = inputs(2)
    (segments,) = pack_documents(
        torch.tensor(BOUNDS, dtype=torch.int32), [(0, BOUNDS[-1])], q.device
    )
    with torch.no_grad():
        before = attend(q, k, v, segments).clone()
        for x in (q, k, v):
            x[200] += 1
        changed = (attend(q, k, v, segments) != before).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert changed and min(changed) >= 200 and max(changed) < 512


def test_mixed_takes_its_bounds_from_those_of_the_call_without_waiting_for_the_gpu():
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    (segments,) = pack_documents(cu_seqlens, [(0, BOUNDS[-1])], torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts = split_documents(segments, 500)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [part.is_long for part in parts] == [False, True]
    assert all(part.cu_q.device.type == "cuda" for part in parts)


def test_grouped_heads_are_not_repeated_for_the_varlen_op():
    """The forward makes its output and log-sum-exp, and no copy of keys and values for each query
    head."""
    attend = backend("varlen", NEVER)
    tokens = 4096
    heads = 32
    q, k, v = (
        torch.randn(tokens, count, HEAD_SIZE, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for count in (heads, 4, 4)
    )
    (segments,) = pack_documents(
        torch.tensor([0, tokens], dtype=torch.int32), [(0, tokens)], q.device
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend(q, k, v, segments)
    made = torch.cuda.max_memory_allocated() - before
    of_output = out.nbytes + tokens * heads * 4
    assert made < 1.1 * of_output, f"{made:,} bytes for an output of {of_output:,}"


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_the_largest_logits_are_those_of_the_cpu(kv_heads, window):
    q, k, _ = (x.detach() for x in inputs(kv_heads))
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    found, expected = (
        largest_logits(
            q.to(device),
            k.to(device),
            pack_documents(bounds, [(0, BOUNDS[-1])], torch.device(device))[0],
            Scoring(window),
        )
        for device in ("cuda", "cpu")
    )
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("window", [None, 5000])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (8, 2)])
def test_the_largest_logit_of_a_long_document_is_found_wherever_it_is(heads, kv_heads, window):
    """One pair of each head has a logit, at the edge of what is seen; larger ones are not seen."""
    begin = 1000
    tokens = 150_000
    q = torch.zeros(tokens, heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
    k = torch.zeros(tokens, kv_heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
    for head in range(heads):
        query = tokens - 2 - 17_000 * head
        first = begin if window is None else query - window + 1
        q[query, head, head] = 1
        key_head = k[:, head * kv_heads // heads, head]
        key_head[first] = 1 + head
        # Of an earlier document or beyond the window, and of a later token.
        key_head[first - 1] = 100
        key_head[query + 1] = 100
    bounds = torch.tensor([0, begin, tokens], dtype=torch.int32)
    (call,) = pack_documents(bounds, [(0, tokens)], q.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = largest_logits(q, k, call, Scoring(window, scale=1.0))
    made = torch.cuda.max_memory_allocated() - before
    assert found.tolist() == [1 + head for head in range(heads)]
    # What comes next is the attention's output, as large as q.
    assert made < max(1.2 * q.nbytes, 20 * 2**20), f"{made:,} bytes beside a q of {q.nbytes:,}"
