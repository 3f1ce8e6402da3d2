"""How attention scores its pairs: scale, soft cap and sinks, against formulas and transformers."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from model.attention_backends import choice, flash, tiled, windowed
from model.attention_backends.choice import BACKENDS, choose_attention, pick_backend
from model.attention_backends.documents import pack_documents
from model.attention_backends.kernel_calls import NEVER
from model.attention_backends.mixed import mixed_attention
from model.config import ModelConfig
from model.key_cache import LayerCache, Places, slots_of_window
from model.loss import IGNORED_LABEL, LossSettings, fused_loss, score
from model.scoring import PLAIN, Scoring, ScoringNeeds
from parallel.context import group_pieces
from parallel.layout import single_process_layout
from pretrain.planner.model_size import ModelSize
from tests.unit.test_attention_backends import StandIns

CPU = torch.device("cpu")
GPU = torch.device("cuda")
HEADS = 4
HEAD_SIZE = 8
BOUNDS = [0, 1, 6, 70, 130, 312]


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks and tiles at the size of a test, of which one divides the other's edges nowhere."""
    windowed.window_mask.cache_clear()
    monkeypatch.setattr(windowed, "BLOCK", 32)
    monkeypatch.setattr(tiled, "TILE_KEYS", 20)
    yield
    windowed.window_mask.cache_clear()


def definition(q, k, v, bounds: list[int], scoring: Scoring, sinks) -> torch.Tensor:
    """Softmax over a mask of all pairs and, where there are sinks, one more column."""
    position = torch.arange(len(q))
    document = torch.bucketize(position, torch.tensor(bounds[1:]), right=True)
    distance = position[:, None] - position[None, :]
    is_seen = (document[:, None] == document[None, :]) & (distance >= 0)
    if scoring.window is not None:
        is_seen &= distance < scoring.window
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scale = HEAD_SIZE**-0.5 if scoring.scale is None else scoring.scale
    scores = torch.einsum("qmh,kmh->mqk", q, k) * scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.masked_fill(~is_seen, float("-inf"))
    if sinks is not None:
        column = sinks[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat([scores, column], dim=-1)
    shares = scores.softmax(-1)[..., : len(q)]
    return torch.einsum("mqk,kmh->qmh", shares, v)


def draw(tokens: int, kv_heads: int, *, with_sinks: bool) -> list[torch.Tensor]:
    """q, k, v and sinks in fp64, of which gradients are asked for."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, HEAD_SIZE) for heads in (HEADS, kv_heads, kv_heads)]
    shapes += [(HEADS,)] if with_sinks else []
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    ]


WAYS = {
    "scale": (Scoring(scale=0.7), False),
    "scale, window": (Scoring(30, 0.7), False),
    "cap": (Scoring(softcap=1.3), False),
    "cap, window": (Scoring(30, 0.7, 1.3), False),
    "sinks": (PLAIN, True),
    "sinks, window": (Scoring(30, 0.7), True),
    "sinks, cap": (Scoring(softcap=1.3), True),
    "sinks, cap, window": (Scoring(45, 0.7, 1.3), True),
}


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("way", WAYS)
def test_scores_are_what_their_definition_says(way, kv_heads, groups, small_tiles):
    """Output and all gradients; with groups, queries whose document began before them."""
    scoring, with_sinks = WAYS[way]
    leaves = draw(BOUNDS[-1], kv_heads, with_sinks=with_sinks)
    q, k, v, *rest = leaves
    sinks = rest[0] if rest else None
    expected = definition(q, k, v, BOUNDS, scoring, sinks)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    attend, _ = choose_attention("sdpa", CPU, torch.float64)
    totals = [torch.zeros_like(x) for x in leaves]
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    for group in range(groups):
        pieces = group_pieces(BOUNDS[-1], group, groups)
        rows = torch.cat([torch.arange(begin, end) for begin, end in pieces])
        own = q[rows]
        found = torch.cat(
            [
                attend(own[part.queries], k[part.keys], v[part.keys], part, scoring, sinks)
                for part in pack_documents(cu_seqlens, pieces, CPU)
            ]
        )
        torch.testing.assert_close(found, expected[rows], rtol=0, atol=1e-12)
        grads = torch.autograd.grad((found * weight[rows]).sum(), leaves)
        for total, grad in zip(totals, grads, strict=True):
            total += grad
    for total, grad in zip(totals, wanted, strict=True):
        torch.testing.assert_close(total, grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("crossover", [1, 40, NEVER])
@pytest.mark.parametrize("way", ["scale", "sinks"])
def test_mixed_scores_so_with_both_kernels(way, crossover):
    """Kernels of the CPU stand in for those of a GPU, with their shapes of log-sum-exps."""
    scoring, with_sinks = WAYS[way]
    leaves = draw(BOUNDS[-1], 2, with_sinks=with_sinks)
    q, k, v, *rest = leaves
    sinks = rest[0] if rest else None
    (documents,) = pack_documents(torch.tensor(BOUNDS, dtype=torch.int32), [(0, BOUNDS[-1])], CPU)
    found = mixed_attention(crossover, StandIns().kernels)(q, k, v, documents, scoring, sinks)
    expected = definition(q, k, v, BOUNDS, scoring, sinks)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    ours = torch.autograd.grad((found * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for grad, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-11)


def test_mixed_puts_sinks_into_an_output_of_any_memory_layout():
    stand_ins = StandIns()

    def heads_before_tokens(*inputs):
        out, kept = stand_ins.long_forward(*inputs)
        return out.contiguous(), kept

    bounds = [0, 256, 512]
    q, k, v, sinks = draw(bounds[-1], 2, with_sinks=True)
    kernels = replace(stand_ins.kernels, long_forward=heads_before_tokens)
    (documents,) = pack_documents(torch.tensor(bounds, dtype=torch.int32), [(0, bounds[-1])], CPU)
    found = mixed_attention(1, kernels)(q, k, v, documents, PLAIN, sinks)
    assert stand_ins.long == [(2, 256)]
    torch.testing.assert_close(found, definition(q, k, v, bounds, PLAIN, sinks), rtol=0, atol=1e-12)


def as_one_document(tokens: int):
    return pack_documents(torch.tensor([0, tokens], dtype=torch.int32), [(0, tokens)], CPU)[0]


class Module(torch.nn.Module):
    """What transformers' attention functions read of their module."""

    def __init__(self, groups: int, sinks=None):
        super().__init__()
        self.num_key_value_groups = groups
        self.head_dim = HEAD_SIZE
        self.sinks = None if sinks is None else torch.nn.Parameter(sinks.detach().clone())


def of_transformers(function, module, q, k, v, **options) -> torch.Tensor:
    """Run an eager attention function of transformers on one document -> [tokens, m, H]."""
    mask = torch.full((len(q), len(q)), float("-inf"), dtype=q.dtype).triu(1)[None, None]
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    return function(module, *heads, mask, **options)[0][0]


def test_sinks_are_those_of_gpt_oss():
    q, k, v, sinks = draw(50, 2, with_sinks=True)
    module = Module(2, sinks)
    expected = of_transformers(
        modeling_gpt_oss.eager_attention_forward, module, q, k, v, scaling=0.3
    )
    attend, _ = choose_attention("sdpa", CPU, torch.float64)
    found = attend(q, k, v, as_one_document(50), Scoring(scale=0.3), sinks)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    (ours,) = torch.autograd.grad((found * weight).sum(), sinks)
    (theirs,) = torch.autograd.grad((expected * weight).sum(), module.sinks)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_capped_scores_are_those_of_gemma_2(monkeypatch):
    # transformers rounds the shares to fp32, which fp64 need not.
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype: softmax(x, dim, dtype=x.dtype))
    leaves = draw(50, 2, with_sinks=False)
    expected = of_transformers(
        modeling_gemma2.eager_attention_forward, Module(2), *leaves, scaling=0.3, softcap=0.8
    )
    attend, _ = choose_attention("sdpa", CPU, torch.float64)
    found = attend(*leaves, as_one_document(50), Scoring(scale=0.3, softcap=0.8))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for grad, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-12)


def test_capped_scores_in_bf16_are_near_those_in_fp64():
    exact = draw(300, 2, with_sinks=True)
    narrow = [x.detach().bfloat16().requires_grad_() for x in exact]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    attend, _ = choose_attention("sdpa", CPU, torch.bfloat16)
    scoring = Scoring(100, softcap=2.0)
    results = [attend(*x[:3], as_one_document(300), scoring, x[3]) for x in (narrow, wide)]
    weight = torch.randn(300, HEADS, HEAD_SIZE).bfloat16()
    ours, theirs = (
        torch.autograd.grad(found, x, weight.to(found.dtype))
        for found, x in zip(results, (narrow, wide), strict=True)
    )
    for found, expected in zip(ours, theirs, strict=True):
        assert found.dtype == torch.bfloat16
        assert float((found.double() - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("way", ["cap, window", "sinks", "sinks, window", "sinks, cap"])
def test_tokens_are_scored_so_while_a_model_generates(way):
    """Token after token with a cache, a ring where there is a window, as all of them at once."""
    scoring, with_sinks = WAYS[way]
    q, k, v, *rest = (x.detach() for x in draw(60, 2, with_sinks=with_sinks))
    attend, _ = choose_attention("sdpa", CPU, torch.float64)
    expected = attend(q, k, v, as_one_document(60), scoring, *rest)
    slots = slots_of_window(scoring.window, 60)
    cache = LayerCache((1, 2, slots, HEAD_SIZE), scoring, (0, 0), torch.float64, CPU)
    cache.fill(k[:20], v[:20], [0, 20])
    for token in range(20, 60):
        of_token = [x[token : token + 1] for x in (q, k, v)]
        found = cache.attend(*of_token, Places([token], CPU), *rest)
        torch.testing.assert_close(found[0], expected[token], rtol=0, atol=1e-12)


# ---- the output's logits


@pytest.mark.parametrize("chunk", [3, 64])
def test_the_loss_of_capped_logits_is_what_its_definition_says(chunk):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 6, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(24, 6, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.arange(10) * 2
    labels[4] = IGNORED_LABEL
    # The last 3 rows pad the vocabulary.
    logits = 1.5 * torch.tanh(x @ weight[:21].T / 1.5)
    expected = 0.25 * F.cross_entropy(logits, labels, reduction="sum")
    settings = LossSettings(single_process_layout(CPU).tp, 21, chunk, 1.5)
    found = fused_loss(x, weight, labels, 0.25, settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    ours = torch.autograd.grad(found, (x, weight))
    theirs = torch.autograd.grad(expected, (x, weight))
    for grad, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-12)
    with torch.no_grad():
        total, hits = score(x, weight, labels, settings)
    torch.testing.assert_close(0.25 * total, expected.detach(), rtol=0, atol=1e-12)
    assert int(hits) == int((logits.argmax(1) == labels).sum())


# ---- which backend


@pytest.mark.parametrize(
    "name, needs, said",
    [
        ("te", ScoringNeeds(windows=True, sinks=True), "sliding windows and attention sinks are"),
        ("cudnn", ScoringNeeds(softcap=True), "capped scores are not proven"),
        ("mixed", ScoringNeeds(softcap=True), "cuDNN and torch's varlen op cap no scores"),
        ("varlen", ScoringNeeds(softcap=True), "torch's varlen_attn caps no scores"),
    ],
)
def test_a_backend_says_what_it_cannot_score(name, needs, said, monkeypatch):
    monkeypatch.setattr("model.attention_backends.backend.is_installed", lambda _name: True)
    missing = BACKENDS[name].missing(GPU, torch.bfloat16, needs=needs)
    assert missing is not None and missing.startswith(said)


def flash_of(monkeypatch, version: int, *arguments: str):
    """A release of flash-attn whose function takes these arguments, and notes them."""
    given = {}

    def function(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
        given.update(options)
        return q

    parameters = ", ".join(f"{name}=None" for name in arguments)
    lines = (
        f"def signature(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, causal=False, "
        f"window_size=None, {parameters}): ..."
    )
    scope: dict = {}
    exec(lines, scope)
    function.__signature__ = flash.inspect.signature(scope["signature"])
    released = type("Released", (), {"flash_attn_varlen_func": staticmethod(function)})
    inner = type("Inner", (), {})
    inner._flash_attn_bwd = scope["signature"]
    modules = {flash.FLASH[version]: released, f"{flash.FLASH[version]}.interface": inner}
    monkeypatch.setattr(flash.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(flash, "installed_flash_version", lambda _device: version)
    return given


@pytest.mark.parametrize("version", [2, 3, 4])
def test_flash_attention_gets_the_cap_and_the_scale(version, monkeypatch):
    given = flash_of(monkeypatch, version, "softcap", "learnable_sink")
    assert flash._not_scored(ScoringNeeds(softcap=True), GPU) is None
    q, k, v = draw(10, 2, with_sinks=False)
    flash.make_flash(NEVER)(q, k, v, as_one_document(10), Scoring(7, 0.3, 50.0))
    expected = {"softcap": 50.0, "softmax_scale": 0.3, "window_size": (6, 0), "causal": True}
    assert given == expected


@pytest.mark.parametrize(
    "version, arguments, needs, said",
    [
        (2, (), ScoringNeeds(softcap=True), "this release of flash-attn 2 caps no scores"),
        (3, ("softcap",), ScoringNeeds(sinks=True), "flash-attn 3 has no gradient of attention"),
        (4, ("softcap",), ScoringNeeds(sinks=True), "flash-attn 4 has no gradient of attention"),
        (4, ("softcap", "learnable_sink"), ScoringNeeds(sinks=True), None),
    ],
)
def test_a_release_of_flash_attention_says_what_it_cannot(
    version, arguments, needs, said, monkeypatch
):
    flash_of(monkeypatch, version, *arguments)
    reason = flash._not_scored(needs, GPU)
    assert reason is None if said is None else reason is not None and said in reason


def test_flash_attention_4_gets_the_sinks(monkeypatch):
    given = flash_of(monkeypatch, 4, "softcap", "learnable_sink")
    q, k, v, sinks = draw(10, 2, with_sinks=True)
    flash.make_flash(NEVER)(q, k, v, as_one_document(10), PLAIN, sinks)
    assert given["learnable_sink"] is sinks


def test_auto_passes_over_what_cannot_cap_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setitem(
        choice.BACKENDS, "mixed", replace(BACKENDS["mixed"], obstacle=lambda *_: None)
    )
    assert pick_backend("auto", GPU, torch.bfloat16)[0].name == "mixed"
    sinks = ScoringNeeds(sinks=True, windows=True)
    assert pick_backend("auto", GPU, torch.bfloat16, needs=sinks)[0].name == "mixed"
    found, why = pick_backend("auto", GPU, torch.bfloat16, needs=ScoringNeeds(softcap=True))
    assert found.name == "sdpa"
    assert "mixed: cuDNN and torch's varlen op cap no scores" in why


# ---- what a model has


def test_sinks_are_counted_among_the_parameters():
    sizes = dict(num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4)
    plain = ModelSize(ModelConfig(**sizes), 100).num_parameters
    with_sinks = ModelSize(ModelConfig(**sizes, softmax_type="learnable"), 100).num_parameters
    assert with_sinks == plain + 3 * 4


def test_a_model_says_how_its_layers_score():
    config = ModelConfig(
        num_layers=2, window_size=[6, 0], window_attn_skip_freq=[2], softmax_scale=0.5
    )
    assert config.scorings == (Scoring(7, 0.5), Scoring(None, 0.5))
    assert config.scoring_needs == ScoringNeeds(windows=True)
    capped = ModelConfig(attn_logit_softcapping=50.0, softmax_type="learnable")
    assert capped.scoring_needs == ScoringNeeds(softcap=True, sinks=True)
