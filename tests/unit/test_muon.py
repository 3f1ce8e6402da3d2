"""Muon in one process: beside torch's own, and the parts that it is made of."""

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

from parallel.layout import Layout
from pretrain.config.config import OptimizerConfig
from pretrain.guards.spikes import Limits
from pretrain.muon.muon import MOMENTUM, Muon, dtype_of_products, scale_of
from pretrain.muon.newton_schulz import orthogonalize, orthogonalize_all, steps_of
from pretrain.muon.owners import Matrix, assign_owners, make_buckets
from pretrain.optimizer import build_optimizer
from pretrain.parameter_groups import parameter_groups
from pretrain.step import train_step
from tools.bench.contenders import BenchModel, Ours, make_sample, one_process

VOCABULARY = 64
CONFIG = BenchModel(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2
)
LR = 3e-3
CPU = torch.device("cpu")


def build(layout: Layout, **settings) -> Ours:
    """The trainer in fp64 with Muon."""
    ours = Ours(CONFIG, VOCABULARY, "float64", layout, seed=1, master_dtype=torch.float64)
    settings = OptimizerConfig(optimizer="muon", lr=LR, **settings)
    ours.optimizer = build_optimizer(ours.stages, CONFIG, settings)
    return ours


@pytest.fixture
def layout() -> Iterator[Layout]:
    with one_process() as layout:
        yield layout


def parameters_of(ours: Ours) -> dict[str, torch.Tensor]:
    return {name: p.to_local().detach() for name, p in ours.stages[0].named_parameters()}


def torch_optimizers(parameters: dict[str, torch.nn.Parameter], **settings) -> list:
    """torch.optim's Muon for the layers' matrices, and AdamW for the others."""
    hidden = [p for name, p in parameters.items() if name.startswith("layers.") and p.dim() == 2]
    matrices = [
        p for name, p in parameters.items() if not name.startswith("layers.") and p.dim() == 2
    ]
    vectors = [p for p in parameters.values() if p.dim() == 1]
    assert len(hidden) == 14 and len(matrices) == 1 and len(vectors) == 5
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    return [
        torch.optim.Muon(
            hidden, lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", **settings
        ),
        torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8),
    ]


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({}, {}),
        ({"muon_nesterov": False, "muon_momentum": 0.6}, {"nesterov": False, "momentum": 0.6}),
        ({"muon_num_ns_steps": 3}, {"ns_steps": 3}),
    ],
)
def test_steps_are_those_of_torch(layout, ours, theirs):
    trainer = build(layout, **ours)
    copies = {
        name: torch.nn.Parameter(weight.clone()) for name, weight in parameters_of(trainer).items()
    }
    optimizers = torch_optimizers(copies, **theirs)
    assert trainer.optimizer is not None

    def copy_gradients(*_) -> None:
        for name, parameter in trainer.stages[0].named_parameters():
            copies[name].grad = parameter.grad.to_local().clone()

    trainer.optimizer.register_step_pre_hook(copy_gradients)
    # torch's Newton-Schulz is in bf16: here it takes what it gets.
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
        for _ in range(4):
            train_step(trainer.stepper, trainer.optimizer, [make_sample([6, 4], 64, 1)], LR, 1.0)
            for optimizer in optimizers:
                optimizer.step()
    for name, weight in parameters_of(trainer).items():
        error = float((weight - copies[name].detach()).abs().max() / weight.abs().max())
        assert error < 1e-13, (name, error)


def test_each_head_is_orthogonalized_by_itself(layout):
    """The update of q and k is then that of a model of which each head is a matrix."""
    trainer = build(layout, muon_per_head=True, weight_decay=0.0)
    before = {name: weight.clone() for name, weight in parameters_of(trainer).items()}
    grads = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: grads.update(
            {name: p.grad.to_local().clone() for name, p in trainer.stages[0].named_parameters()}
        )
    )
    train_step(trainer.stepper, trainer.optimizer, [make_sample([6, 4], 64, 1)], LR, 1.0)
    after = parameters_of(trainer)
    for part, heads in (("q", 4), ("k", 2), ("v", 2), ("o", 1)):
        name = f"layers.1.attention.{part}.weight"
        expected = [
            svd_polynomial(head) * 0.2 * max(head.shape) ** 0.5 for head in grads[name].chunk(heads)
        ]
        found = (before[name] - after[name]) / LR
        assert torch.allclose(found, torch.cat(expected), atol=1e-9), name


def svd_polynomial(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz on the singular values alone."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / matrix.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_newton_schulz_is_a_polynomial_of_the_singular_values(shape):
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    (found,) = orthogonalize_all([matrices], steps_of("simple", 5))
    for one, matrix in zip(found, matrices, strict=True):
        assert torch.allclose(one, svd_polynomial(matrix), atol=1e-12)


def test_matrices_of_one_shape_and_its_transpose_are_one_batch():
    matrices = [torch.randn(k, *shape) for k, shape in ((1, (4, 6)), (2, (6, 4)), (1, (4, 4)))]
    seen = []

    def note(batch, steps):
        seen.append(tuple(batch.shape))
        return orthogonalize(batch, steps)

    with mock.patch("pretrain.muon.newton_schulz.orthogonalize", note):
        found = orthogonalize_all(matrices, steps_of("simple", 2))
    assert seen == [(3, 4, 6), (1, 4, 4)]
    assert [one.shape for one in found] == [one.shape for one in matrices]


def test_quintic_coefficients_come_closer_to_orthogonal_than_simple_ones():
    matrix = torch.randn(1, 32, 64, dtype=torch.float64)

    def spread(kind: str, steps: int) -> float:
        (found,) = orthogonalize_all([matrix], steps_of(kind, steps))
        return float((torch.linalg.svdvals(found) - 1).abs().max())

    assert spread("quintic", 5) < 0.5 * spread("simple", 5)
    # The sixth step is the fifth one's again, and the first ones are taken where there are fewer.
    assert steps_of("quintic", 6)[5] == steps_of("quintic", 5)[4]
    assert steps_of("quintic", 2) == steps_of("quintic", 5)[:2]


def test_a_zero_matrix_stays_zero():
    assert not orthogonalize(torch.zeros(2, 3, 4), steps_of("simple", 5)).any()


@pytest.mark.parametrize(
    "mode, rows, columns, scale",
    [
        ("spectral", 16, 100, 2.0),
        ("spectral", 100, 16, 2.0),
        ("shape_scaling", 16, 100, 0.2),
        ("shape_scaling", 100, 4, 1.0),
        ("unit_rms_norm", 4, 100, 0.04),
        ("unit_rms_norm", 100, 4, 1.0),
    ],
)
def test_scales(mode, rows, columns, scale):
    assert scale_of(rows, columns, mode, 0.2) == pytest.approx(scale)


@pytest.mark.parametrize(
    "master, has_units, precision, dtype",
    [
        (torch.float32, True, "medium", torch.bfloat16),
        (torch.float32, False, "medium", torch.float32),
        (torch.float32, True, "highest", torch.float32),
        (torch.float64, True, "medium", torch.float64),
    ],
)
def test_products_are_bf16_where_the_device_has_units(master, has_units, precision, dtype):
    with mock.patch("pretrain.muon.muon.has_bf16_units", lambda device: has_units):
        assert dtype_of_products(master, CPU, precision) is dtype


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_a_step_that_does_not_count_changes_no_bit(layout, clip_grad):
    trainer = build(layout)
    optimizer = trainer.optimizer
    sample = make_sample([6, 4], VOCABULARY, 1)
    train_step(trainer.stepper, optimizer, [sample], LR, clip_grad)
    weights = parameters_of(trainer)
    # A zero keeps its sign, too.
    weights["layers.0.mlp.up.weight"][0, :2] = torch.tensor([0.0, -0.0])

    def bits() -> list[torch.Tensor]:
        states = [value for state in optimizer.state.values() for value in state.values()]
        tensors = [x.to_local() if hasattr(x, "to_local") else x for x in states]
        return [x.clone().view(torch.uint8) for x in (*weights.values(), *tensors) if x.dim()]

    # Beyond a limit, with a finite gradient; then without one.
    before = bits()
    result = train_step(trainer.stepper, optimizer, [sample], LR, clip_grad, Limits(loss=0.0))
    assert result.skipped
    assert all(torch.equal(one, other) for one, other in zip(before, bits(), strict=True))
    weights["final_norm.weight"][0] = float("inf")
    before = bits()
    assert train_step(trainer.stepper, optimizer, [sample], LR, clip_grad).skipped
    assert all(torch.equal(one, other) for one, other in zip(before, bits(), strict=True))
    weights["final_norm.weight"][0] = 1.0
    assert not train_step(trainer.stepper, optimizer, [sample], LR, clip_grad).skipped
    assert not any(torch.equal(one, other) for one, other in zip(before, bits(), strict=True))


def test_hidden_matrices_have_a_momentum_and_everything_else_adamws_moments(layout):
    trainer = build(layout)
    for name, parameter in trainer.stages[0].named_parameters():
        is_hidden = name.startswith("layers.") and parameter.dim() == 2
        expected = {MOMENTUM} if is_hidden else {"step", "exp_avg", "exp_avg_sq"}
        assert set(trainer.optimizer.state[parameter]) == expected, name


def test_a_vector_among_the_hidden_matrices_is_refused(layout):
    trainer = build(layout)
    groups = parameter_groups(trainer.stages, CONFIG, OptimizerConfig(optimizer="muon"))
    (vectors,) = [group for group in groups if group["weight_decay"] == 0]
    vectors["by_muon"] = True
    with pytest.raises(ValueError, match=r"norm\.weight of shape \[64\]: .*matrices.* Fix: "):
        Muon(groups, mock.Mock(), layout, OptimizerConfig(optimizer="muon"), lambda name: 1)


@pytest.mark.parametrize(
    "mode, lr_scale", [("spectral", 0.5), ("shape_scaling", 1.0), ("unit_rms_norm", 1.0)]
)
def test_mup_gives_muon_the_learning_rate_that_its_scale_needs(layout, mode, lr_scale):
    """Four times the base's width: the spectral norm of an update stays the same."""
    wide = dict(use_mup=True, mup_base_hidden_size=16, mup_base_head_dim=16.0)
    config = replace(CONFIG, untie_embeddings_and_output_weights=True, **wide)
    ours = Ours(config, VOCABULARY, "float64", layout, seed=1, optimizer=False)
    settings = OptimizerConfig(optimizer="muon", muon_scale_mode=mode)
    groups = [group for group in parameter_groups(ours.stages, config, settings)]
    (hidden,) = [group for group in groups if group["by_muon"]]
    assert hidden["lr_scale"] == lr_scale and len(hidden["params"]) == 14
    assert hidden["weight_decay"] == pytest.approx(0.1 / lr_scale)


def test_owners_are_busy_for_about_equally_long():
    """A 70B model's layer repeated: no rank has more than the mean and one matrix."""
    shapes = [(8192, 8192), (1024, 8192), (1024, 8192), (28672, 8192), (8192, 28672)] * 20
    costs = [Matrix(*shape, None).cost() for shape in shapes]
    for ranks in (1, 3, 8, 128):
        owners = assign_owners(costs, ranks)
        load = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)]
        assert sum(load) == sum(costs)
        assert max(load) <= max(max(costs), 1.1 * sum(costs) / ranks), (ranks, load)


def test_a_bucket_holds_no_more_than_its_limit_or_one_matrix():
    matrices = [Matrix(rows, 10, None) for rows in (100, 30, 30, 30, 5, 5, 5, 5)]
    owners = assign_owners([matrix.cost() for matrix in matrices], 2)
    buckets = make_buckets(matrices, owners, 2, limit=400)
    numbers = [number for bucket in buckets for numbers in bucket for number in numbers]
    assert sorted(numbers) == list(range(8))
    for bucket in buckets:
        for rank, mine in enumerate(bucket):
            assert all(owners[number] == rank for number in mine)
            assert len(mine) < 2 or sum(matrices[number].elements for number in mine) <= 400
    # The costliest matrix is first, and alone.
    assert buckets[0][owners[0]] == [0]
