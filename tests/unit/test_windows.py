"""Sliding windows: which layers have one, what their attention computes, and what it costs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention_backends import choice, varlen, windowed
from model.attention_backends.choice import BACKENDS, choose_attention, pick_backend
from model.attention_backends.documents import pack_documents
from model.attention_backends.mixed import mixed_attention
from model.attention_backends.windowed import attend_by_blocks, blocks_of_document
from model.config import ModelConfig
from model.scoring import Scoring, ScoringNeeds
from model.windows import (
    layer_windows,
    mean_pairs_seen,
    pairs_seen,
    shortest_skip,
    tokens_beyond,
    window_problems,
)
from parallel.context import group_pieces
from pretrain.planner.model_size import ModelSize
from tools.plan_verify.live_memory import LiveMemory

CPU = torch.device("cpu")
HEAD_SIZE = 8


# ---- which layers


@pytest.mark.parametrize("skip", [[], [2], [3], [6], [7], [1, 1, 0, 1, 0, 1]])
def test_the_layers_with_a_window_are_those_of_megatron(skip):
    theirs = None if not skip else skip[0] if len(skip) == 1 else skip
    expected = [
        8 if is_layer_window_attention((7, 0), theirs, number) else None for number in range(1, 7)
    ]
    assert list(layer_windows([7, 0], skip, 6)) == expected


def test_without_a_size_no_layer_has_a_window():
    assert layer_windows([], [], 3) == (None, None, None)


@pytest.mark.parametrize(
    "size, skip, said",
    [
        ([7], [], "window_size = [7]: must be two numbers"),
        ([7, 1], [], "window_size = [7, 1]: must be two numbers"),
        ([-1, 0], [], "window_size = [-1, 0]: must be two numbers"),
        ([], [2], "window_attn_skip_freq = [2]: says which layers have a window, but window_size"),
        ([7, 0], [1], "window_attn_skip_freq = 1: every so many layers"),
        ([7, 0], [4], "window_attn_skip_freq = 4: every so many layers"),
        (
            [7, 0],
            [1, 0],
            "window_attn_skip_freq = [1, 0]: must be one number, or for each of the 3",
        ),
        ([7, 0], [1, 0, 2], "window_attn_skip_freq = [1, 0, 2]: must be one number"),
    ],
)
def test_what_cannot_be_is_refused(size, skip, said):
    (problem,) = window_problems(size, skip, 3)
    assert problem.startswith(said) and "Fix: " in problem


@pytest.mark.parametrize(
    "pattern, skip",
    [
        ([1, 1, 1, 1], []),
        ([1, 0, 1, 0], [2]),
        ([1, 1, 0, 1], [3]),
        ([1, 1, 1, 0], [4]),
        ([0, 1, 1, 1], [0, 1, 1, 1]),
        ([1, 1, 0, 0], [1, 1, 0, 0]),
    ],
)
def test_a_pattern_is_spelled_shortly_and_means_the_same(pattern, skip):
    assert shortest_skip(pattern) == skip
    assert [int(each is not None) for each in layer_windows([7, 0], skip, 4)] == pattern


# ---- what is computed


def definition(q, k, v, bounds: list[int], window: int) -> torch.Tensor:
    """Softmax over a mask of all pairs: same document, not later, closer than the window."""
    position = torch.arange(len(q))
    document = torch.bucketize(position, torch.tensor(bounds[1:]), right=True)
    distance = position[:, None] - position[None, :]
    is_seen = (document[:, None] == document[None, :]) & (distance >= 0) & (distance < window)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qmh,kmh->mqk", q, k) / HEAD_SIZE**0.5
    shares = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
    return torch.einsum("mqk,kmh->qmh", shares, v)


def draw(tokens: int, kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(
            tokens, heads, HEAD_SIZE, dtype=torch.float64, generator=generator
        ).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]


def attend_on_cpu(q, k, v, documents, scoring: Scoring) -> torch.Tensor:
    attend, _ = choose_attention("sdpa", CPU, q.dtype, needs=ScoringNeeds(windows=True))
    return attend(q, k, v, documents, scoring)


def attend_as_on_a_gpu(q, k, v, documents, scoring: Scoring) -> torch.Tensor:
    """What the backend does on other devices than a CPU."""
    blocks = []
    for number in range(len(documents.bounds_q) - 1):
        rows_q = slice(*documents.bounds_q[number : number + 2])
        rows_k = slice(*documents.bounds_k[number : number + 2])
        blocks += blocks_of_document(rows_q, rows_k, scoring.window)
    return attend_by_blocks(q, k, v, blocks, scoring.window, scoring.scale)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("window", [1, 2, 7, 256, 257, 300, 5000])
def test_a_window_is_what_its_definition_says(window, kv_heads, groups):
    check_definition(attend_on_cpu, window, kv_heads, groups)


@pytest.mark.parametrize("window, kv_heads, groups", [(2, 4, 4), (300, 1, 1), (300, 2, 4)])
def test_a_window_on_other_devices_is_what_its_definition_says(window, kv_heads, groups):
    check_definition(attend_as_on_a_gpu, window, kv_heads, groups)


def check_definition(attend, window: int, kv_heads: int, groups: int) -> None:
    """Documents shorter and longer than a block and than the window; queries of parts of them."""
    bounds = [0, 1, 6, 262, 520, 1320]
    q, k, v = draw(bounds[-1], kv_heads)
    expected = definition(q, k, v, bounds, window)
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    for group in range(groups):
        pieces = group_pieces(bounds[-1], group, groups)
        rows = torch.cat([torch.arange(begin, end) for begin, end in pieces])
        own = q[rows]
        found = torch.cat(
            [
                attend(own[part.queries], k[part.keys], v[part.keys], part, Scoring(window))
                for part in pack_documents(cu_seqlens, pieces, CPU)
            ]
        )
        torch.testing.assert_close(found, expected[rows], rtol=0, atol=1e-12)
        for total, grad in zip(
            grads, torch.autograd.grad((found * weight[rows]).sum(), (q, k, v)), strict=True
        ):
            total += grad
    for found, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_nothing_comes_from_beyond_the_window_bit_for_bit():
    window = 100
    bounds = torch.tensor([0, 300, 1000], dtype=torch.int32)
    (documents,) = pack_documents(bounds, [(0, 1000)], CPU)
    attend, _ = choose_attention("sdpa", CPU, torch.float64, needs=ScoringNeeds(windows=True))
    with torch.no_grad():
        q, k, v = draw(1000, 2)
        before = attend(q, k, v, documents, Scoring(window))
        # A token in the middle of a document, and the last of another.
        for changed in (299, 600):
            k[changed] = 1e3
            v[changed] = -1e3
            after = attend(q, k, v, documents, Scoring(window))
            is_equal = (before == after).all(dim=(1, 2))
            end = 300 if changed < 300 else changed + window
            assert is_equal[:changed].all() and is_equal[end:].all()
            assert not is_equal[changed:end].any()
            before = after


@pytest.mark.parametrize("attend", [attend_on_cpu, attend_as_on_a_gpu])
def test_keys_of_several_blocks_get_their_gradient_in_fp32(attend):
    """In bf16 the sum of five blocks' gradients would lose digits of each."""
    tokens = 2048
    (documents,) = pack_documents(torch.tensor([0, tokens], dtype=torch.int32), [(0, tokens)], CPU)
    exact = draw(tokens, 4)
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    same = [x.detach().double().requires_grad_() for x in rounded]
    weight = torch.randn(tokens, 4, HEAD_SIZE, dtype=torch.float64).bfloat16()
    found = torch.autograd.grad(attend(*rounded, documents, Scoring(1024)), rounded, weight)
    expected = torch.autograd.grad(attend(*same, documents, Scoring(1024)), same, weight.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 0.006


class LargeResults(TorchDispatchMode):
    """Notes the operators that give tensors of at least as many elements."""

    def __init__(self, elements: int):
        super().__init__()
        self.elements = elements
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.numel() >= self.elements:
            self.found.append(func.overloadpacket.__name__)
        return result


def test_a_gpu_makes_gradients_of_a_block_s_rows_only():
    """Those of slices would be as large as those of all tokens: here 16 blocks of q, k and v."""
    tokens = 4096
    (documents,) = pack_documents(torch.tensor([0, tokens], dtype=torch.int32), [(0, tokens)], CPU)
    q, k, v = (torch.randn(tokens, 1, 64, requires_grad=True) for _ in range(3))
    out = attend_as_on_a_gpu(q, k, v, documents, Scoring(50))
    weight = torch.randn_like(out)
    with LargeResults(k.numel()) as large:
        torch.autograd.grad(out, (q, k, v), weight)
    assert len(large.found) <= 8, large.found


def test_a_gpu_s_masks_begin_where_their_kernels_can_read_them(monkeypatch):
    """A window of 265 and a block of 256 make rows of 520: aligned, from wherever they begin."""
    masks = []

    def listen(*args, attn_mask: torch.Tensor, **kwargs):
        masks.append((attn_mask.data_ptr() % 16, attn_mask.stride(0), attn_mask.shape[1]))
        return scaled_dot_product_attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(windowed, "scaled_dot_product_attention", listen)
    # A last block of one query is contiguous wherever it is.
    bounds = [0, 300, 557, 1200]
    q, k, v = draw(bounds[-1], 4)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    (documents,) = pack_documents(cu_seqlens, [(0, bounds[-1])], CPU)
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in (q, k, v))
    attend_as_on_a_gpu(q, k, v, documents, Scoring(265)).sum().backward()
    # torch copies those whose rows are not aligned.
    misplaced = [mask for mask in masks if mask[1] % 8 == 0 and mask[0] != 0]
    assert len(masks) == 2 * 7 and not misplaced, misplaced


def test_a_gpu_keeps_nothing_of_a_block_for_its_backward():
    """With a key head for several query heads torch may choose a kernel that keeps all scores."""
    tokens = 1024
    (documents,) = pack_documents(torch.tensor([0, tokens], dtype=torch.int32), [(0, tokens)], CPU)
    q, k, v = draw(tokens, 2)
    attend_as_on_a_gpu(q, k, v, documents, Scoring(50))  # makes the mask
    with LiveMemory() as memory:
        out = attend_as_on_a_gpu(q, k, v, documents, Scoring(50))
        assert memory.now == out.nbytes


def test_a_comparison_is_longer_than_every_window():
    assert tokens_beyond((None, 4096), 256) == 4096 + 64
    assert tokens_beyond((None, 8), 256) == 256 and tokens_beyond((None,), 256) == 256


# ---- backends


@pytest.mark.parametrize("name", ["te", "cudnn"])
def test_a_backend_that_is_not_proven_with_windows_says_so(name, monkeypatch):
    monkeypatch.setattr("model.attention_backends.backend.is_installed", lambda _name: True)
    missing = BACKENDS[name].missing(
        torch.device("cuda"), torch.bfloat16, needs=ScoringNeeds(windows=True)
    )
    assert missing is not None and missing.startswith("sliding windows are not proven with ")


def test_auto_passes_over_a_backend_without_windows(monkeypatch):
    sdpa = BACKENDS["sdpa"]
    without = replace(sdpa, name="other", why_not_scored=lambda *_: "it has none")
    monkeypatch.setattr(choice, "BACKENDS", {"other": without, "sdpa": sdpa})
    assert pick_backend("auto", CPU, torch.float32)[0].name == "other"
    found, why = pick_backend("auto", CPU, torch.float32, needs=ScoringNeeds(windows=True))
    assert (found.name, why) == ("sdpa", "other: it has none")


def test_varlen_gets_the_tokens_before_the_query():
    def new(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)): ...
    def old(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False): ...

    assert varlen.varlen_options(new, Scoring(8)) == {"window_size": (7, 0)}
    assert varlen.varlen_options(new) == {"window_size": (-1, 0)}
    with pytest.raises(AssertionError):
        varlen.varlen_options(old, Scoring(8))


def test_mixed_gives_a_layer_with_a_window_to_the_varlen_op(monkeypatch):
    (documents,) = pack_documents(torch.tensor([0, 50], dtype=torch.int32), [(0, 50)], CPU)
    q, k, v = draw(50, 4)
    asked = []

    def note(_q, _k, _v, _sinks, calls, _kernels, scoring):
        asked.append((scoring.window, [call.is_long for call in calls]))

    monkeypatch.setattr("model.attention_backends.mixed._Mixed.apply", note)
    mixed_attention(1)(q, k, v, documents, Scoring(49))
    # A window that reaches over all of it changes nothing: cuDNN takes the whole document.
    mixed_attention(1)(q, k, v, documents, Scoring(50))
    assert asked == [(49, [False]), (50, [True])]


# ---- what it costs


@pytest.mark.parametrize("window", [None, 1, 3, 10, 11, 50])
def test_the_pairs_are_those_of_the_mask(window):
    for length in (0, 1, 2, 10, 11, 37):
        distance = np.arange(length)[:, None] - np.arange(length)[None, :]
        seen = (distance >= 0) & (distance < (window or length + 1))
        assert pairs_seen(np.array([length]), window)[0] == seen.sum()


def test_flops_count_each_layers_own_window():
    model = dict(num_layers=4, hidden_size=32, ffn_hidden_size=32, num_attention_heads=4)
    config = ModelConfig(**model, window_size=[9, 0], window_attn_skip_freq=[4])
    whole = ModelConfig(**model)
    pairs = float(mean_pairs_seen(np.array([100]), config.windows)[0])
    difference = ModelSize(whole, 64).step_flops(100, 5050) - ModelSize(config, 64).step_flops(
        100, pairs
    )
    # Three layers see 10 tokens each, but for the first nine: 955 pairs of 5,050; two products of
    # 2 operations for each of 32 channels, three times.
    assert difference == 3 * 3 * 4 * 32 * (5050 - 955)
