"""QK-clip in one process: what is measured, what becomes of the weights, and its settings."""

import math

import pytest
import torch

from model.attention_backends.documents import pack_documents
from model.attention_logits import LargestLogits, TileSize, largest_logits
from model.scoring import Scoring
from parallel.context import group_pieces
from parallel.shard import own_shard
from pretrain.config.load import load_config
from pretrain.guards.spikes import Limits
from pretrain.qk_clip import LogitWatch
from pretrain.step import train_step
from tests.unit.test_step import VOCABULARY
from tools.bench.contenders import BenchModel, Ours, make_sample, one_process

CPU = torch.device("cpu")
LENGTHS = [1, 40, 7, 300, 1, 2, 129, 32]
GQA = BenchModel(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    add_qkv_bias=True,
    init_method_std=0.3,
)
RUN = (
    "--model tiny --mock-data --vocab-size 100 --seq-length 128 --global-batch-tokens 512 "
    "--train-tokens 1000"
).split()


# ---- what is measured


def by_definition(
    q: torch.Tensor, k: torch.Tensor, lengths: list[int], queries: slice, scoring: Scoring
) -> torch.Tensor:
    """The largest logit of each query head over a whole matrix of scores, in fp64."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(document))
    seen = (document[:, None] == document) & (place[:, None] >= place)
    if scoring.window is not None:
        seen &= place[:, None] < place + scoring.window
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scoring.factor(q.shape[-1])
    return scores.masked_fill(~seen, -math.inf)[:, queries].amax((1, 2))


SIZES = [TileSize(256, 100), TileSize(256, 1024), TileSize(50, 33), TileSize(512, 512)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.queries} by {size.keys}")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 20, 300])
def test_the_largest_logits_are_those_of_the_definition(window, groups, size, monkeypatch):
    """Tiles smaller and larger than documents, than the window and than all of it."""
    monkeypatch.setattr(TileSize, "choose", lambda *_, **__: size)
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(sum(LENGTHS), 6, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(sum(LENGTHS), 3, 8, generator=generator, dtype=torch.float64)
    scoring = Scoring(window, scale=0.7, softcap=0.1)
    edges = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    for group in range(groups):
        pieces = group_pieces(sum(LENGTHS), group, groups)
        for call, piece in zip(pack_documents(edges, pieces, CPU), pieces, strict=True):
            found = largest_logits(q[slice(*piece)], k[call.keys], call, scoring)
            expected = by_definition(q, k, LENGTHS, slice(*piece), scoring)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_logits_of_bf16_are_those_of_the_rounded_values():
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(90, 4, 16, generator=generator).bfloat16()
    k = torch.randn(90, 2, 16, generator=generator).bfloat16()
    (call,) = pack_documents(torch.tensor([0, 50, 90]).int(), [(0, 90)], CPU)
    found = largest_logits(q, k, call, Scoring())
    expected = by_definition(q, k, [50, 40], slice(None), Scoring())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


MIB = 2**20


def test_a_tile_on_a_cpu_does_not_depend_on_the_length():
    """Another one would round other sums: a run that goes on would not be the same bit for bit."""
    for tokens in (64, 1 << 20):
        assert TileSize.choose(tokens, 4, 128, 2, on_gpu=False) == TileSize(256, 4096)
        assert TileSize.choose(tokens, 64, 128, 4, on_gpu=False) == TileSize(256, 256)


@pytest.mark.parametrize("heads", [1, 2, 8, 32, 64])
@pytest.mark.parametrize("tokens", [1000, 8192, 131_072, 1 << 20])
def test_a_tile_on_a_gpu_is_no_larger_than_the_output_that_comes_after_it(tokens, heads):
    size = TileSize.choose(tokens, heads, 128, 2, on_gpu=True)
    pairs = size.queries * size.keys
    scores = 4 * heads * pairs
    output = 2 * tokens * heads * 128
    assert scores <= 128 * MIB, f"{size}: {scores:,} bytes"
    assert scores <= 16 * MIB or scores + pairs <= output, f"{size}: {scores:,} bytes and a mask"


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 64])
@pytest.mark.parametrize("tokens", [1000, 8192, 100_003, 1 << 20])
def test_rows_of_a_tile_on_a_gpu_begin_at_aligned_places(tokens, heads):
    """A row of fp32 scores that begins off a multiple of 16 bytes takes a slower product."""
    size = TileSize.choose(tokens, heads, 128, 2, on_gpu=True)
    assert 4 * size.keys % 16 == 0, f"{size}"


@pytest.mark.parametrize("heads", [1, 2, 8, 32])
def test_a_gpu_writes_and_reads_a_tile_of_a_long_document_longer_than_its_host_starts_it(heads):
    """A tile is three kernels, of some 10 microseconds each for the host; 5 TB/s are an H200's."""
    size = TileSize.choose(1 << 20, heads, 128, 2, on_gpu=True)
    seconds = 2 * 4 * heads * size.queries * size.keys / 5e12
    assert seconds > 3 * 10e-6, f"{size}: {seconds * 1e6:.0f} microseconds"
    # Neither side of a tile is much longer than the other: each key is read often, or much of a
    # block on the diagonal is scored for nothing.
    assert size.queries <= size.keys <= 2 * size.queries


def test_a_forward_that_runs_twice_changes_nothing():
    q = torch.randn(9, 2, 4)
    (call,) = pack_documents(torch.tensor([0, 9]).int(), [(0, 9)], CPU)
    largest = LargestLogits(3, 4, torch.float32, CPU)
    largest.note(1, 2, q, q, [call], Scoring())
    once = largest.values_LN.clone()
    largest.note(1, 2, q, q, [call], Scoring())
    assert torch.equal(largest.values_LN, once)
    assert torch.isfinite(once[1, 2:]).all()
    assert torch.isinf(once).sum() == 10, "only its own layer and heads are filled"


# ---- what it does to the weights


def trainer_with(threshold: float | None, layout, config: BenchModel = GQA) -> Ours:
    ours = Ours(config, VOCABULARY, "float64", layout, seed=1, master_dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in ours.stages[0].named_parameters():
        if name.endswith("bias"):
            bias = own_shard(parameter)
            bias.detach().copy_(torch.randn(bias.shape, generator=generator, dtype=bias.dtype))
    ours.stepper.logit_watch = LogitWatch(
        ours.stages, config, layout, torch.float64, threshold=threshold
    )
    return ours


def weights_of(ours: Ours) -> dict[str, torch.Tensor]:
    return {
        name: parameter.full_tensor().detach().clone()
        for name, parameter in ours.stages[0].named_parameters()
    }


def step(ours: Ours, lr: float = 0.0, limits: Limits | None = None):
    """A step whose learning rate moves no weight unless it says so."""
    sample = make_sample([30, 5, 61], VOCABULARY, 1)
    return train_step(ours.stepper, ours.optimizer, [sample], lr, 1.0, limits or Limits(1e9, 1e9))


def test_after_a_clip_the_same_inputs_give_no_larger_logit():
    one_layer = BenchModel(**(vars(GQA) | dict(num_layers=1)))
    with one_process() as layout:
        ours = trainer_with(None, layout, one_layer)
        largest = step(ours).max_attention_logit
        per_head = ours.stepper.logit_watch.largest.values_LN.clone()
        assert largest == per_head.max() and (per_head > 0).all()
        threshold = largest / 3
        ours = trainer_with(threshold, layout, one_layer)
        assert step(ours).max_attention_logit == largest
        assert step(ours).max_attention_logit == pytest.approx(threshold, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_rows_are_scaled_by_the_factor_of_their_key_head(alpha):
    with one_process() as layout:
        ours = trainer_with(None, layout)
        step(ours)
        per_key = ours.stepper.logit_watch.largest.values_LN.view(2, 2, 2).amax(-1)
        # The three largest of four are above.
        threshold = float(per_key.flatten().sort().values[:2].mean())
        before = weights_of(ours)
        ours.stepper.logit_watch = LogitWatch(
            ours.stages, GQA, layout, torch.float64, threshold=threshold, alpha=alpha
        )
        assert step(ours).qk_clipped_heads == 6
        after = weights_of(ours)
    eta = (threshold / per_key).clamp(max=1)
    for name, weight in before.items():
        expected = weight
        _, number, *_ = f"{name}...".split(".")
        for which, rows, exponent in ((".q.", 16, alpha), (".k.", 8, 1 - alpha)):
            if which in name:
                factors = (eta[int(number)] ** exponent).repeat_interleave(rows)
                expected = weight * factors.view(-1, *[1] * (weight.dim() - 1))
        torch.testing.assert_close(after[name], expected, rtol=1e-14, atol=0, msg=name)


def test_a_skipped_step_clips_nothing():
    with one_process() as layout:
        ours = trainer_with(0.01, layout)
        before = weights_of(ours)
        result = step(ours, limits=Limits(loss=0.0, grad_norm=1e9))
        after = weights_of(ours)
    assert result.skipped and result.qk_clipped_heads == 0
    assert result.max_attention_logit > 0.01
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_measuring_changes_no_weight_bit_for_bit():
    with one_process() as layout:
        measuring = trainer_with(None, layout)
        plain = trainer_with(None, layout)
        plain.stepper.logit_watch = None
        result = step(measuring, lr=0.1)
        other = step(plain, lr=0.1)
        assert result.loss == other.loss
        assert (other.max_attention_logit, other.qk_clipped_heads) == (None, None)
        assert result.max_attention_logit > 0 and result.qk_clipped_heads is None
        found = weights_of(measuring)
        for name, weight in weights_of(plain).items():
            assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("value", [-3.0, -math.inf, math.inf, math.nan])
def test_logits_below_zero_or_not_finite_scale_nothing(value):
    with one_process() as layout:
        ours = trainer_with(2.0, layout)
        watch = ours.stepper.logit_watch
        before = weights_of(ours)
        watch.largest.values_LN.fill_(value)
        _, clipped = watch.after_update(torch.tensor(True))
        after = weights_of(ours)
    assert clipped == 0
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_an_evaluation_is_not_measured():
    with one_process() as layout:
        ours = trainer_with(2.0, layout)
        ours.stepper.run([make_sample([30, 5], VOCABULARY, 1)], train=False)
        assert torch.isinf(ours.stepper.logit_watch.largest.values_LN).all()


# ---- settings


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--qk-clip --qk-layernorm", "qk_clip = True: the norms of qk_layernorm take any factor"),
        ("--qk-clip --qk-clip-alpha 1.5", "qk_clip_alpha = 1.5: must be at most 1"),
        ("--qk-clip --qk-clip-alpha -0.5", "qk_clip_alpha = -0.5: must be at least 0"),
        ("--qk-clip --qk-clip-threshold 0", "qk_clip_threshold = 0.0: must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, said):
    (problem,) = load_config([*RUN, *flags.split()]).validate()
    assert problem.startswith(said) and "Fix: " in problem


def test_nothing_is_measured_unless_asked_for():
    with one_process() as layout:
        stages = Ours(GQA, VOCABULARY, "float32", layout, seed=1).stages

        def made(flags: str) -> LogitWatch | None:
            config = load_config([*RUN, *flags.split()])
            config.model = GQA
            return LogitWatch.make(config, stages, layout, torch.bfloat16)

        assert made("") is None
        watch = made("--log-max-attention-logit")
        assert watch is not None and watch.threshold is None
        assert watch.largest.values_LN.dtype == torch.float32
        watch = made("--qk-clip --qk-clip-threshold 30 --qk-clip-alpha 0.25")
        assert watch is not None and (watch.threshold, watch.alpha) == (30.0, 0.25)
